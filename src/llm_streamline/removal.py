"""What a recipe asks to remove -> how many layers go, and which windows or layers may: all that is refused first."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llm_streamline.errors import UserError
from llm_streamline.quantities import counted
from llm_streamline.recipe import Recipe
from llm_streamline.records import ModelShape, Window
from llm_streamline.staying import gone, last_ones, leaving_each, refuse_lacking
from llm_streamline.windows import places_for, split_evenly

DEFAULT_REMOVE = "25%"


def check_request(shape: ModelShape, recipe: Recipe) -> list[int]:
    """Where windows can begin. Errors: UserError, before anything is measured, for what no window can give."""
    check_protected(shape, recipe)
    if recipe.scattered and shape.period > 1:
        raise UserError(
            f"--select {recipe.select} takes single layers, and --for gguf needs {shape.period} in a row to go; leave "
            "out one of them."
        )
    return [window.start for window in candidates(shape, recipe)]


def check_protected(shape: ModelShape, recipe: Recipe) -> None:
    """Errors: UserError where every layer is protected."""
    if recipe.protect_first + recipe.protect_last >= shape.num_layers:
        raise UserError(
            f"--protect-first {recipe.protect_first} and --protect-last {recipe.protect_last} protect all "
            f"{shape.num_layers} layers; give less."
        )


def candidates(shape: ModelShape, recipe: Recipe, taken: Sequence[Window] = ()) -> list[Window]:
    """The windows that the recipe leaves to choose the next from, once some are taken; those that are given.

    One or more. Errors: UserError for what none can give.
    """
    if recipe.window is not None:
        return given_windows(recipe, shape)
    lengths = split_evenly(net_layers(recipe, shape) + recipe.occupied, recipe.count)
    bounds = Window(start=recipe.protect_first, stop=shape.num_layers - recipe.protect_last)
    left = lengths[len(taken) :]
    if recipe.scattered:  # single layers, of which `least_influence` and the like spare the last of a sort
        return places_for(bounds, left, taken)
    places = leaving_each(shape, bounds, left, recipe.each, taken)
    return places[-1:] if recipe.select == "last" else places


def single_layers(shape: ModelShape, recipe: Recipe, taken: Sequence[int]) -> list[int]:
    """Those that may go next: not protected, not taken, and of a hybrid not the last of a sort. Errors: UserError."""
    free = [one for one in range(recipe.protect_first, shape.num_layers - recipe.protect_last) if one not in taken]
    spared = last_ones(shape, taken)
    found = [one for one in free if one not in spared]
    if not found:
        refuse_lacking(shape, [*taken, *free], f"{len(taken) + 1} single layers")
    return found


def net_layers(recipe: Recipe, shape: ModelShape) -> int:
    """How many net layers go. A percentage is of L, rounded half up. Errors: UserError."""
    if recipe.max_params is not None:
        return _layers_for(recipe.max_params, shape, recipe)
    layers, asked = shape.num_layers, recipe.remove or DEFAULT_REMOVE
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", asked.strip())
    if not match or (not match[2] and "." in match[1]):
        raise UserError(f"--remove {asked} is no number of layers; give one such as 8, or a share such as 25%.")
    unit = _unit(shape, recipe)
    net = int(float(match[1]) * layers / 100 / unit + 0.5) * unit if match[2] else int(match[1])
    check_room(shape, recipe, net)
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
        raise UserError(too_long(net + recipe.occupied, layers, recipe))
    return net


def check_room(shape: ModelShape, recipe: Recipe, net: int) -> None:
    """Errors: UserError where so many windows do not fit, however few layers each takes. `net` go in all, or fewer."""
    free = shape.num_layers - recipe.protect_first - recipe.protect_last
    most = (free + 1) // (shape.period + recipe.each + 1)
    if 1 <= most < recipe.count:
        least = counted(shape.period, "net layer")
        raise UserError(
            f"--windows {recipe.count} do not fit in {shape.num_layers} layers, with {least} of each, what stands in, "
            f"one layer between any two and the protected ends; give at most {max(1, min(most, net // shape.period))}."
        )


def _unit(shape: ModelShape, recipe: Recipe) -> int:
    """Net layers of which a multiple has to go, so that each window's are a multiple of the period."""
    return shape.period * recipe.count if shape.period > 1 else 1


def _most(layers: int, recipe: Recipe) -> int:
    """The most net layers that can go."""
    free = layers - recipe.protect_first - recipe.protect_last - recipe.occupied - (recipe.count - 1)
    return max(0, min(free, layers - 1))


def too_long(length: int, layers: int, recipe: Recipe) -> str:
    """Why no window of so many layers can go, or several of as many together."""
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
    check_room(shape, recipe, shape.num_layers)
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


def given_windows(recipe: Recipe, shape: ModelShape) -> list[Window]:
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
            f"--window {window} has {counted(len(window), 'layer')} and --replace {recipe.replace} puts {recipe.each} "
            "in their place, so nothing is removed; give a longer window."
        )
    if (len(window) - recipe.each) % shape.period:
        raise UserError(
            f"--window {window} with --for gguf removes {len(window) - recipe.each} net, no multiple of the "
            f"{shape.period} layers after which llama.cpp takes their kinds to be repeated; give another length."
        )
