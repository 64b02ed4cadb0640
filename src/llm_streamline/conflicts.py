"""What of a recipe does not go together, each in a sentence that says what to do about it; None where it does.

Nothing here needs torch, so that a recipe can be read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llm_streamline.heal import parse_heal
from llm_streamline.objective import parse_objective
from llm_streamline.presets import PRESETS
from llm_streamline.replace import ONE_OF_ITS_OWN, solvable

if TYPE_CHECKING:
    from llm_streamline.recipe import Recipe

TARGETS = ("remove", "window", "max_params")  # how much goes, or what
# what is nothing to a run in which nothing trains
TRAINING = ("epochs", "batch", "accumulate", "optimizer", "lr", "min_lr", "weight_decay", "warmup", "clip")


def several_targets(recipe: Recipe) -> str | None:
    given = [f"--{name.replace('_', '-')}" for name in TARGETS if getattr(recipe, name)]
    if len(given) > 1:
        return f"{' and '.join(given)} were given; give one of --remove, --window and --max-params"
    return None


def rates_that_rise(recipe: Recipe) -> str | None:
    if recipe.lr is not None and recipe.min_lr is not None and recipe.min_lr > recipe.lr:
        return f"--min-lr {recipe.min_lr} is above --lr {recipe.lr}; give a smaller one"
    return None


def nothing_to_select(recipe: Recipe) -> str | None:
    if recipe.window is not None and recipe.select not in (None, "auto", "cosine"):
        return f"--select {recipe.select} goes with no --window, which leaves nothing to select; give one of them"
    return None


def windows_and_rounds(recipe: Recipe) -> str | None:
    if recipe.given and recipe.windows > 1:
        return f"--windows {recipe.windows} was given with --window, which names them; leave it out"
    if recipe.given and recipe.rounds > 1:
        return f"--rounds {recipe.rounds} chooses windows one after the other, and --window names them; leave one out"
    if recipe.rounds > recipe.windows:
        return (
            f"--rounds {recipe.rounds} choose at least one window each, and --windows is {recipe.windows}; give more "
            "--windows or fewer rounds"
        )
    if recipe.rounds > 1 and not recipe.learns:
        return (
            f"--rounds {recipe.rounds} with --replace {recipe.replace} has nothing to train between them; leave it out"
        )
    return None


def one_window_alone(recipe: Recipe) -> str | None:
    if recipe.count > 1 and recipe.scattered:
        return f"--select {recipe.select} takes single layers, not windows; leave out --windows"
    if recipe.count > 1 and recipe.select == "last":
        return "--select last takes the layers below the protected end, which are one window; leave out --windows"
    if recipe.count > 1 and (recipe.solved or recipe.network):
        return (
            f"--replace {recipe.replace} stands in for one window, and {recipe.count} were asked for; use --replace "
            "layer, mlp or none, or remove one"
        )
    return None


def single_layers(recipe: Recipe) -> str | None:
    if recipe.scattered and recipe.replace != "none":
        return (
            f"--select {recipe.select} takes single layers, in whose places nothing can stand: give --replace none "
            "with it (and --heal, to train those that stay), or another --select"
        )
    return None


def tried_with_what(recipe: Recipe) -> str | None:
    if recipe.family_from and recipe.replace.partition(":")[0] not in ("none", "layer", "merged"):
        return (
            f"--replace {recipe.replace} needs to know a model's MLP, and --family-from {recipe.family_from} tells "
            "only its layers; use --replace layer, merged or none"
        )
    return None


def asked_for(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """The flags of those that someone gave. What a preset sets may have lost its meaning by what was given."""
    fields, preset = type(recipe).model_fields, PRESETS.get(recipe.preset or "", {})
    found = [name for name in names if getattr(recipe, name) not in (fields[name].default, preset.get(name))]
    return [f"--{name.replace('_', '-')}" for name in found]


def temperature_of_nothing(recipe: Recipe) -> str | None:
    parts = [part for objective in recipe.trained_by for part in objective.parts]
    if asked_for(recipe, ["temperature"]) and all(part.kind != "kl" for part in parts):
        return f"--temperature {recipe.temperature:g} is for a loss of kl, and nothing trains by one here; leave it out"
    return None


def rate_of_nothing(recipe: Recipe) -> str | None:
    if asked_for(recipe, ["lr"]) and recipe.heal_lr and recipe.heals and not recipe.learns:
        return (
            f"--lr {recipe.lr:g} is for what stands in, and --replace {recipe.replace} trains nothing; give --heal-lr "
            "instead"
        )
    return None


def best_of_what(recipe: Recipe) -> str | None:
    trained = not solvable(recipe.replace) and recipe.replace not in ("none", "merged")
    if recipe.init == "best" and trained and recipe.replace not in ONE_OF_ITS_OWN:
        return (
            f"--init best is for one layer of the model's own, and --replace is {recipe.replace}; use --init "
            "inherited or random, or --replace layer or mlp"
        )
    return None


def nothing_to_train(recipe: Recipe) -> str | None:
    given = asked_for(recipe, ["init", "epochs"])
    if (recipe.solved or recipe.replace == "merged") and given:
        how = "solved for in one pass" if recipe.solved else "made of the window's weights"
        return f"--replace {recipe.replace} is {how}, not trained: leave out {' and '.join(given)}"
    if recipe.replace == "none" and "--init" in given:
        return f"--init {recipe.init} is for what stands in, and --replace none puts nothing there; leave it out"
    return None


def without_effect(recipe: Recipe) -> str | None:
    """What was given and changes nothing, as no stand-in trains; it may be one file for several ways to replace."""
    if recipe.learns and not recipe.solved:
        return None
    loss = [] if recipe.solved else ["loss"]
    given = asked_for(recipe, loss if recipe.heals else [*loss, *TRAINING])
    also = "; healing has a --heal-loss" if recipe.heals else ""
    return f"without effect with --replace {recipe.replace}: {', '.join(given)}{also}" if given else None


def start_of_a_map(recipe: Recipe) -> str | None:
    if solvable(recipe.replace) and asked_for(recipe, ["init"]):
        return f"--replace {recipe.replace} begins as its closed form: leave out --init {recipe.init}"
    return None


def unsolvable(recipe: Recipe) -> str | None:
    known = solvable(recipe.replace)
    if recipe.solved and recipe.loss_used not in known:
        return (
            f"--loss {recipe.loss} is not what --replace {recipe.replace} can be solved for; give one of "
            f"{', '.join(known)}, or --replace linear:free or layer, which are trained"
        )
    return None


def code_not_allowed(recipe: Recipe) -> str | None:
    if recipe.network and not recipe.custom_code:
        return (
            f"--replace {recipe.replace} is saved with code of its own and loads only where that is trusted; "
            "allow it with --custom-code, or use --replace mlp or layer, which load everywhere"
        )
    return None


def domain_of_nothing(recipe: Recipe) -> str | None:
    if recipe.mixture is None and recipe.domain != type(recipe).model_fields["domain"].default:
        return f"--domain {recipe.domain} is for --mixture; give that too, or leave it out"
    return None


def nothing_to_heal(recipe: Recipe) -> str | None:
    given = asked_for(recipe, ["heal_share", "heal_loss", "heal_lr"])
    if given and not recipe.heals:
        return f"{given[0]} is for --heal; give that too, or leave it out"
    if recipe.heals and solvable(recipe.replace) and not recipe.each:
        return (
            f"--heal {recipe.heal} does not go with --replace {recipe.replace}, whose map is part of a layer that "
            "stays; use --replace linear:free or layer"
        )
    return None


def unseen_above(recipe: Recipe) -> str | None:
    wanted, parts = parse_heal(recipe.heal), parse_objective(recipe.heal_loss_used).parts
    if wanted and wanted.above and not all(part.above for part in parts):
        return (
            f"--heal {recipe.heal} trains what only a loss of logits sees, and --heal-loss is {recipe.heal_loss}; use "
            "kl or lm, or leave out the norm and the head"
        )
    return None


CHECKS: tuple[Callable[[Recipe], str | None], ...] = (
    several_targets,
    rates_that_rise,
    nothing_to_select,
    windows_and_rounds,
    one_window_alone,
    single_layers,
    tried_with_what,
    temperature_of_nothing,
    rate_of_nothing,
    best_of_what,
    start_of_a_map,
    nothing_to_train,
    unsolvable,
    code_not_allowed,
    domain_of_nothing,
    nothing_to_heal,
    unseen_above,
)
