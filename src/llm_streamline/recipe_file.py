"""A Recipe as a YAML file, and how two recipes differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_streamline.conflicts import TARGETS
from llm_streamline.errors import UserError, reason
from llm_streamline.presets import PRESETS
from llm_streamline.recipe import Recipe


def make_recipe(values: dict[str, Any], file: Path | None = None) -> Recipe:
    """A Recipe from a preset, then a YAML file, then `values`: the later one wins. Errors: UserError.

    Of what says how much goes, a file's is nothing beside another one that is given.
    """
    own = read_yaml(file) if file else {}
    if any(values.get(key) is not None for key in TARGETS):
        own = {key: value for key, value in own.items() if key not in TARGETS}
    return Recipe(**{**own, **values})


def read_yaml(file: Path) -> dict[str, Any]:
    import yaml  # here, so that a help page does not wait for it

    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_loader())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"recipe {file} cannot be read ({reason(error)}); give a YAML file of `key: value` lines."
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"recipe {file} holds no `key: value` lines; write for example `model: path/to/model`.")
    return values


def _loader() -> Any:
    """YAML without whole numbers and dates: in YAML 1.1, `window: 21:30` is the number 1290. The schema converts."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    unwanted = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in unwanted]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def as_values(recipe: Recipe) -> dict[str, Any]:
    """Every field that has a value, or has lost the preset's, in the schema's order, as JSON has them."""
    preset = PRESETS.get(recipe.preset or "", {})  # whose values would come back where nothing is said
    values = recipe.model_dump(mode="json", by_alias=True).items()
    return {key: value for key, value in values if value is not None or key in preset}


def to_yaml(recipe: Recipe) -> str:
    """The values of a recipe; reads back as an equal one."""
    import yaml

    return yaml.safe_dump(as_values(recipe), sort_keys=False)


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """The fields in which two recipes differ, as flags."""
    pairs = zip(old.model_dump(by_alias=True).items(), new.model_dump().values(), strict=True)
    return [f"--{key.replace('_', '-')}" for (key, before), after in pairs if before != after]
