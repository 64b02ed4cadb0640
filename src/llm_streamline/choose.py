"""Similarity -> LayerPlan, and why: which windows go, from what the recipe asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from llm_streamline.errors import UserError
from llm_streamline.ranking import NAMES, Ranking, disagreement
from llm_streamline.recipe import Recipe
from llm_streamline.records import LayerPlan, ModelShape, Similarity, Window, runs_of
from llm_streamline.staying import gone, last_ones, leaving_each, refuse_lacking
from llm_streamline.windows import places_for, split_evenly

DEFAULT_REMOVE = "25%"


def choose(similarity: Similarity, shape: ModelShape, recipe: Recipe, ranking: Ranking | None = None) -> LayerPlan:
    """The plan that the recipe asks for: by `ranking`, or by cosine. Errors: UserError where no window can give it."""
    if recipe.window is not None:
        windows = _given_windows(recipe, shape)
        why = f"the window{'s were' if recipe.count > 1 else ' was'} given with --window"
        return _plan(similarity, shape, recipe, Choice(windows, _plain(similarity, recipe, windows), why))
    return choose_windows(similarity, shape, recipe, [pick(similarity, shape, recipe, ranking)])


class Choice(NamedTuple):
    """What goes: windows, and layers besides them; what goes from the model that is merely cut; and why."""

    windows: Sequence[Window]
    plain: Window
    why: str
    dropped: Sequence[int] = ()


class Pick(NamedTuple):
    """A window, and why it and no other."""

    window: Window
    why: str


def pick(
    similarity: Similarity,
    shape: ModelShape,
    recipe: Recipe,
    ranking: Ranking | None = None,
    taken: Sequence[Window] = (),
) -> Pick:
    """The next window once some are taken, by `ranking`, or Eq. 2-3: the one whose boundaries are most alike."""
    if ranking:
        return Pick(ranking.winner.window, why_ranked(ranking))
    left = sorted(candidates(shape, recipe, taken), key=similarity.of, reverse=True)
    return Pick(left[0], _why(similarity, left, recipe))


def choose_windows(
    similarity: Similarity, shape: ModelShape, recipe: Recipe, picks: Sequence[Pick], before: LayerPlan | None = None
) -> LayerPlan:
    """The plan to remove windows, in the order in which they were picked, after those of the round `before`."""
    earlier = [before.window, *before.others] if before else []
    whys = [before.why] if before else []
    for number, one in enumerate(picks):
        left = [other.window for other in picks[:number]]
        states = filter(None, [_told(earlier, "replaced"), _told(left, "left out")])
        prefix = f"then, with {' and '.join(states)}, " if earlier or left else ""
        whys.append(prefix + (f"{one.window}: {one.why}" if recipe.count > 1 else one.why))
    windows = [*earlier, *(one.window for one in picks)]
    return _plan(similarity, shape, recipe, Choice(windows, _plain(similarity, recipe, windows), "; ".join(whys)))


def _told(windows: Sequence[Window], what: str) -> str:
    return f"{' and '.join(map(str, windows))} {what}" if windows else ""


def _plain(similarity: Similarity, recipe: Recipe, windows: Sequence[Window]) -> Window:
    """What goes from the model that is merely cut: one window of the same net length, within the one that is given."""
    net = sum(map(len, windows)) - len(windows) * recipe.each
    if len(windows) > 1:
        return most_similar(similarity, net, recipe)
    if not recipe.occupied:
        return windows[0]
    if recipe.window is None:
        return most_similar(similarity, net, recipe)
    (given,) = windows
    return next(one for one in similarity.windows(net) if given.start <= one.start and one.stop <= given.stop)


def choose_layers(similarity: Similarity, shape: ModelShape, recipe: Recipe, layers: Sequence[int]) -> LayerPlan:
    """The plan to remove single layers, in the order given, wherever they lie, with nothing in their place."""
    window = max(runs_of(layers), key=len)
    plain = most_similar(similarity, len(layers), recipe)
    how = {
        "influence": "each of them changes the state less than any other that may go",
        "greedy": "one after the other, that by whose deletion the loss rises least",
    }
    why = f"{how[recipe.select or '']}: {', '.join(map(str, layers))}"
    dropped = sorted(set(layers) - set(window.layers()))
    return _plan(similarity, shape, recipe, Choice([window], plain, why, dropped))


def least_influence(similarity: Similarity, shape: ModelShape, recipe: Recipe, count: int) -> list[int]:
    """The layers of the least Block Influence, 1 - cosine of input and output (ShortGPT, arXiv 2403.03853)."""
    cosines, found = similarity.of_layers(), list[int]()
    for _ in range(count):
        found.append(max(single_layers(shape, recipe, found), key=lambda layer: cosines[layer]))
    return found


def single_layers(shape: ModelShape, recipe: Recipe, taken: Sequence[int]) -> list[int]:
    """Those that may go next: not protected, not taken, and of a hybrid not the last of a sort. Errors: UserError."""
    free = [one for one in range(recipe.protect_first, shape.num_layers - recipe.protect_last) if one not in taken]
    spared = last_ones(shape, taken)
    found = [one for one in free if one not in spared]
    if not found:
        refuse_lacking(shape, [*taken, *free], f"{len(taken) + 1} single layers")
    return found


def _plan(similarity: Similarity, shape: ModelShape, recipe: Recipe, choice: Choice) -> LayerPlan:
    """Errors: UserError where what stands in is larger than what goes."""
    (window, *others), plain = choice.windows, choice.plain
    after = shape.total - sum(parameters_saved(shape, one, recipe.each) for one in choice.windows)
    after -= sum(shape.layers[layer] for layer in choice.dropped)
    after += shape.untied
    if after >= shape.total:
        named = ", ".join(map(str, choice.windows))
        what = f"--replace {recipe.replace}" + (f" with --heal {recipe.heal}" if shape.untied else "")
        raise UserError(
            f"{what} has more parameters than layers {named} it stands for "
            f"({shape.total:,} -> {after:,}); remove more layers, or use another replacement."
        )
    return LayerPlan(
        model=shape.name,
        model_type=shape.model_type,
        num_layers=shape.num_layers,
        window=window,
        replace=recipe.replace,
        custom_code=recipe.network,
        occupied=len(choice.windows) * recipe.each,
        parameters_before=shape.total,
        parameters_after=after,
        similarity=similarity.of(window),
        similarity_se=similarity.error_of(window),
        plain_window=plain,
        plain_parameters=parameters_after(shape, plain, 0),
        why=choice.why,
        heal=recipe.heal,
        dropped=list(choice.dropped),
        others=others,
    )


def check_request(shape: ModelShape, recipe: Recipe) -> list[int]:
    """Where windows can begin. Errors: UserError, before anything is measured, for what no window can give."""
    check_protected(shape, recipe)
    if recipe.scattered and shape.period > 1:
        raise UserError(
            f"--select {recipe.select} takes single layers, and --for gguf needs {shape.period} in a row to go; leave "
            "out one of them."
        )
    return [window.start for window in candidates(shape, recipe)]


def candidates(shape: ModelShape, recipe: Recipe, taken: Sequence[Window] = ()) -> list[Window]:
    """The windows that the recipe leaves to choose the next from, once some are taken; those that are given.

    One or more. Errors: UserError for what none can give.
    """
    if recipe.window is not None:
        return _given_windows(recipe, shape)
    lengths = split_evenly(net_layers(recipe, shape) + recipe.occupied, recipe.count)
    bounds = Window(start=recipe.protect_first, stop=shape.num_layers - recipe.protect_last)
    left = lengths[len(taken) :]
    if recipe.scattered:  # single layers, of which `least_influence` and the like spare the last of a sort
        return places_for(bounds, left, taken)
    places = leaving_each(shape, bounds, left, recipe.each, taken)
    return places[-1:] if recipe.select == "last" else places


def check_protected(shape: ModelShape, recipe: Recipe) -> None:
    """Errors: UserError where every layer is protected."""
    if recipe.protect_first + recipe.protect_last >= shape.num_layers:
        raise UserError(
            f"--protect-first {recipe.protect_first} and --protect-last {recipe.protect_last} protect all "
            f"{shape.num_layers} layers; give less."
        )


def most_similar(similarity: Similarity, length: int, recipe: Recipe) -> Window:
    """Eq. 2-3: the window of `length` layers whose boundaries are most alike, away from the protected ends."""
    windows = similarity.windows(length, recipe.protect_first, recipe.protect_last)
    if not windows:
        raise UserError(_too_long(length, similarity.num_layers, recipe))
    return windows[0]


def net_layers(recipe: Recipe, shape: ModelShape) -> int:
    """How many net layers go. A percentage is of L, rounded half up. Errors: UserError."""
    if recipe.max_params is not None:
        return _layers_for(recipe.max_params, shape, recipe)
    asked = recipe.remove or DEFAULT_REMOVE
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", asked.strip())
    if not match or (not match[2] and "." in match[1]):
        raise UserError(f"--remove {asked} is no number of layers; give one such as 8, or a share such as 25%.")
    layers = shape.num_layers
    unit = _unit(shape, recipe)
    net = int(float(match[1]) * layers / 100 / unit + 0.5) * unit if match[2] else int(match[1])
    if net % unit:
        raise UserError(
            f"--remove {asked} with --for gguf is no multiple of {unit}, the layers after which llama.cpp takes their "
            f"kinds to be repeated; give one, such as {max(1, round(net / unit)) * unit}."
        )
    if net < 1:
        raise UserError(f"--remove {asked} of {layers} layers removes none; give at least 1.")
    if net >= layers:
        raise UserError(f"--remove {asked} leaves no layer of {layers}; give at most {_most(layers, recipe)}.")
    if net < recipe.count:
        raise UserError(
            f"--remove {asked} of {layers} layers is {net} net, and each of {recipe.count} windows takes at least one; "
            "remove more, or give fewer --windows."
        )
    if net > _most(layers, recipe):
        raise UserError(_too_long(net + recipe.occupied, layers, recipe))
    return net


def _unit(shape: ModelShape, recipe: Recipe) -> int:
    """Net layers of which a multiple has to go, so that each window's are a multiple of the period."""
    return shape.period * recipe.count if shape.period > 1 else 1


def _most(layers: int, recipe: Recipe) -> int:
    """The most net layers that can go."""
    free = layers - recipe.protect_first - recipe.protect_last - recipe.occupied - (recipe.count - 1)
    return max(0, min(free, layers - 1))


def _too_long(length: int, layers: int, recipe: Recipe) -> str:
    what = f"a window of {length}" if recipe.count == 1 else f"{length} in {recipe.count} windows, one between any two,"
    return (
        f"{what} of {layers} layers would take the protected ends; remove at most "
        f"{_most(layers, recipe)} net, or lower --protect-first {recipe.protect_first} or "
        f"--protect-last {recipe.protect_last}."
    )


def _layers_for(max_params: int, shape: ModelShape, recipe: Recipe) -> int:
    """The fewest net layers that bring the model to `max_params`, whichever window goes."""
    if shape.total <= max_params:
        raise UserError(
            f"--max-params {max_params:,} is no less than the {shape.total:,} that {shape.name} has; ask for fewer."
        )
    fewest = shape.total
    unit = _unit(shape, recipe)
    for net in range(max(unit, recipe.count), _most(shape.num_layers, recipe) + 1, unit):
        lengths = split_evenly(net + recipe.occupied, recipe.count)
        fewest = shape.total + shape.untied - sum(_least_saved(shape, recipe, length) for length in lengths)
        if fewest <= max_params:
            return net
    raise UserError(
        f"--max-params {max_params:,} cannot be reached: without the layers that may go, {shape.name} still has "
        f"{fewest:,} parameters; ask for that many at least, or lower --protect-first or --protect-last."
    )


def _least_saved(shape: ModelShape, recipe: Recipe, length: int) -> int:
    """By the removal of a window of so many layers, wherever it lies."""
    starts = range(recipe.protect_first, shape.num_layers - recipe.protect_last - length + 1)
    windows = (Window(start=start, stop=start + length) for start in starts)
    return min(parameters_saved(shape, window, recipe.each) for window in windows)


def parameters_after(shape: ModelShape, window: Window, occupied: int) -> int:
    """Exact parameters of the model with one window replaced."""
    return shape.total - parameters_saved(shape, window, occupied)


def parameters_saved(shape: ModelShape, window: Window, occupied: int) -> int:
    """Exact parameters that a window's removal saves: stand-ins are shaped like its first layers, or networks."""
    if shape.network is not None:
        return sum(shape.layers[window.start : window.stop]) - occupied * shape.network
    return sum(shape.layers[window.start + occupied : window.stop])


def _given_windows(recipe: Recipe, shape: ModelShape) -> list[Window]:
    """Errors: UserError where one of them cannot go."""
    windows = recipe.given
    for window in windows:
        _check_given(window, recipe, shape)
    if len(windows) == 1 and len(windows[0]) == shape.num_layers and not recipe.occupied:
        raise UserError(f"--window {windows[0]} leaves no layer; give a shorter one.")
    refuse_lacking(shape, gone(windows, recipe.each), f"--window {recipe.window}")
    return windows


def _check_given(window: Window, recipe: Recipe, shape: ModelShape) -> None:
    first, last = recipe.protect_first, shape.num_layers - recipe.protect_last
    if window.stop > shape.num_layers:
        raise UserError(
            f"--window {window} ends past the model's {shape.num_layers} layers; give one within {first}:{last}."
        )
    if window.start < first or window.stop > last:
        raise UserError(
            f"--window {window} takes protected layers; give one within {first}:{last}, or lower "
            f"--protect-first {recipe.protect_first} or --protect-last {recipe.protect_last}."
        )
    if len(window) <= recipe.each:
        raise UserError(
            f"--window {window} has {len(window)} layers and --replace {recipe.replace} puts {recipe.each} "
            "in their place, so nothing is removed; give a longer window."
        )
    if (len(window) - recipe.each) % shape.period:
        raise UserError(
            f"--window {window} with --for gguf removes {len(window) - recipe.each} net, no multiple of the "
            f"{shape.period} layers after which llama.cpp takes their kinds to be repeated; give another length."
        )


def _why(similarity: Similarity, ranked: Sequence[Window], recipe: Recipe) -> str:
    """The reason for the first of some windows, with its runner-up and whether the two can be told apart."""
    window = ranked[0]
    best = f"cosine {similarity.of(window):.4f} ± {similarity.error_of(window):.4f}"
    if recipe.select == "last":
        return f"the highest window of {len(window)} layers below the protected end, as --select last asks ({best})"
    if len(ranked) == 1:
        return f"the only window of {len(window)} layers between the protected ends ({best})"
    second = ranked[1]
    return (
        f"the most similar of {len(ranked)} windows of {len(window)} layers ({best}; next {second} with "
        f"{similarity.of(second):.4f} ± {similarity.error_of(second):.4f})"
    )


def why_ranked(ranking: Ranking) -> str:
    """The reason for a ranked window: what decided, by how much, how surely, and what other scores would have taken."""
    found, judged, every = ranking.winner, ranking.judged(), len(ranking.candidates)
    score = ranking.of(found.window).of(ranking.by)
    assert score is not None
    most = "highest" if ranking.by == "cosine" else "least"
    among = f"{every}" if len(judged) == every else f"{len(judged)}, the best by other scores of {every},"
    details = [f"{score.value:.4f} ± {score.se:.4f}"]
    if found.margin:
        details.append(f"next {found.runner_up}, worse by {found.margin.value:.4f} ± {found.margin.se:.4f}")
    details.append(f"the same in {found.confidence:.0%} of resamples of {ranking.sequences} sequences")
    return (
        f"the {most} {NAMES[ranking.by]} among {among} windows of {len(found.window)} layers ({'; '.join(details)}); "
        f"{disagreement(ranking)}"
    )
