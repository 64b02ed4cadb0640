"""A command's flags, made from the schemas of its arguments: one per field, with the field's help."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llm_streamline.recipe import Runtime
    from llm_streamline.schema import Schema

_SHORT = {"output": "-o"}
ONLY_COMPRESS = {
    *("window", "windows", "rounds", "init", "loss", "temperature", "tokens", "batch", "accumulate", "lr", "min_lr"),
    *("weight_decay", "warmup", "clip", "dtype", "preset", "dry_run", "tracker", "tasks", "checkpoint_every", "fresh"),
    *("epochs", "cache", "optimizer", "beside", "then", "heal", "heal_share", "heal_loss", "heal_lr"),
}
NOT_ESTIMATE = {"output", "dry_run", "tracker", "tasks", "checkpoint_every", "worker_timeout", "fresh"}
NOT_ESTIMATE |= {"beside", "then", "seed", "lr", "min_lr", "clip", "warmup", "temperature"}
NOT_EVALUATE = {
    "tracker",
    "dry_run",
    "models",
    "checkpoint_every",
    "worker_timeout",
    "fresh",
    "cache",
    "beside",
    "then",
}
NOT_SWEEP = {"window", "max_params", "then"}
SAID = {  # by command and field, where a flag is not what it is of `compress`
    ("evaluate", "output"): "A folder for the evaluation: new, empty or of an earlier one, and no run folder.",
    ("analyze", "output"): "A folder for the analysis. [default: NAME-analysis, in the current folder]",
    ("analyze", "remove"): "Net layers of the windows to rank, as of compress. [default: none, or 25% with --select]",
    ("sweep", "output"): "The sweep's folder, with a run folder for each ratio (OUT/remove-25%).",
    ("sweep", "remove"): "Net layers to remove, several by commas: 2,4,6 or 10%,20%,30%. It has to be given.",
}


def _annotation(kind: Any) -> Any:
    """What typer should parse for a schema's field; the schema itself checks the value."""
    text = str(kind)
    if "bool" in text:
        return bool
    if "tuple" in text:
        return list[str] | None
    return str | None


def _option(schema: type[Schema], name: str, command: str) -> inspect.Parameter:
    field = schema.model_fields[name]
    flag = f"--{(field.alias or name).replace('_', '-')}"
    kind = _annotation(field.annotation)
    help_text = SAID.get((command, name), field.description or "")
    if field.default not in (None, ()) and field.default is not False and "[default" not in help_text:
        help_text += f" [default: {field.default}]"
    metavar = None if kind is bool else name.upper()
    flags = filter(None, (flag, _SHORT.get(name)))
    option = typer.Option(*flags, help=help_text, show_default=False, metavar=metavar)
    default: Any = False if kind is bool else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def with_flags(command: Callable[..., None], leave_out: set[str]) -> Callable[..., None]:
    """Give a command its models and a flag for every field of its two schemas, but those left out.

    What lacks `models` makes a recipe, which a YAML file may hold too.
    """
    return _request_flags(command, leave_out) if "models" in leave_out else _recipe_flags(command, leave_out)


def _recipe_flags(command: Callable[..., None], leave_out: set[str]) -> Callable[..., None]:
    from llm_streamline.recipe import Recipe
    from llm_streamline.recipe_file import make_recipe

    def run(model: str | None = None, recipe: Path | None = None, **given: Any) -> None:
        wanted, runtime = _parted(given, Recipe)
        if model is not None:
            wanted["model"] = model
        command(make_recipe(wanted, recipe), runtime)

    model_help = Recipe.model_fields["model"].description
    model = Annotated[str | None, typer.Argument(help=model_help, show_default=False)]
    file = Annotated[
        Path | None, typer.Option("--recipe", help="A YAML file of these fields; flags win.", show_default=False)
    ]
    first = [
        inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=model),
        inspect.Parameter("recipe", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=file),
    ]
    return _signed(run, command, [*first, *_options(Recipe, {"model", *leave_out}, command)])


def _request_flags(command: Callable[..., None], leave_out: set[str]) -> Callable[..., None]:
    from llm_streamline.evaluation import Request

    def run(models: list[str] | None = None, **given: Any) -> None:
        wanted, runtime = _parted(given, Request)
        command(Request(models=models or (), **wanted), runtime)

    models_help = Request.model_fields["models"].description
    models = Annotated[list[str] | None, typer.Argument(help=models_help, show_default=False)]
    first = inspect.Parameter("models", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=models)
    return _signed(run, command, [first, *_options(Request, leave_out, command)])


def _parted(given: dict[str, Any], schema: type[Schema]) -> tuple[dict[str, Any], Runtime]:
    """The values that were given: those of the schema's fields, and the runtime of the others."""
    from llm_streamline.recipe import Runtime

    values = {key: value for key, value in given.items() if value not in (None, False, [])}
    wanted = {key: value for key, value in values.items() if key in schema.model_fields}
    rest = {key: value for key, value in values.items() if key not in wanted and key in Runtime.model_fields}
    return _by_alias(schema, wanted), Runtime(**_by_alias(Runtime, rest)).model_copy(update={"command": command_line()})


def _by_alias(schema: type[Schema], values: dict[str, Any]) -> dict[str, Any]:
    """Values under the names that the schema takes them by."""
    return {schema.model_fields[key].alias or key: value for key, value in values.items()}


def _options(schema: type[Schema], leave_out: set[str], command: Callable[..., None]) -> list[inspect.Parameter]:
    from llm_streamline.recipe import Runtime

    common = schema.model_fields.keys() & Runtime.model_fields.keys()  # which the schema has for its own purpose
    names = [(schema, name) for name in schema.model_fields]
    names += [(Runtime, name) for name in Runtime.model_fields if name not in {"command", *common}]
    return [_option(one, name, command.__name__) for one, name in names if name not in leave_out]


def _signed(
    run: Callable[..., None], command: Callable[..., None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    """`run` with the parameters and the help of a command, as typer reads them."""
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = command.__doc__
    return run


def command_line() -> str:
    return shlex.join(["llm-streamline", *sys.argv[1:]])
