"""What has to stay of a hybrid, whose layers attend or recur: a layer of either sort, or no cache counts its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PretrainedConfig

from llm_streamline.architectures import RECURRING
from llm_streamline.errors import UserError
from llm_streamline.families import kinds_of_layers
from llm_streamline.records import ModelShape, Window
from llm_streamline.windows import places_for


def sorts(config: PretrainedConfig) -> list[list[int]]:
    """The numbers of the layers that attend and of the others; none where all are of one sort."""
    kinds = kinds_of_layers(config) or []
    recurring = [number for number, kind in enumerate(kinds) if kind in RECURRING]
    attending = [number for number, kind in enumerate(kinds) if kind not in RECURRING]
    return [attending, recurring] if attending and recurring else []


def leaving_each(
    shape: ModelShape, bounds: Window, lengths: Sequence[int], each: int, taken: Sequence[Window]
) -> list[Window]:
    """Where a window of the first length can lie, so that the others find places that leave layers of each sort.

    Errors: UserError where there is no such place.
    """
    places = places_for(bounds, lengths, taken)
    found = [one for one in places if _can_follow(shape, bounds, lengths[1:], each, [*taken, one])]
    if places and not found:  # wherever they lie: the first places are as good an example as any
        windows = [*taken]
        for number in range(len(lengths)):
            windows.append(places_for(bounds, lengths[number:], windows)[0])
        named = " and ".join(map(str, windows[len(taken) :]))
        refuse_lacking(shape, gone(windows, each), f"{'windows' if len(lengths) > 1 else 'a window'} such as {named}")
    return found


def _can_follow(shape: ModelShape, bounds: Window, lengths: Sequence[int], each: int, taken: Sequence[Window]) -> bool:
    if not lengths or not shape.sorts:
        return not _lost(shape, gone(taken, each))
    places = places_for(bounds, lengths, taken)
    return any(_can_follow(shape, bounds, lengths[1:], each, [*taken, one]) for one in places)


def last_ones(shape: ModelShape, without: Sequence[int]) -> set[int]:
    """Layers that are the last of their sort once some have gone."""
    left = (set(sort) - set(without) for sort in shape.sorts)
    return set().union(*(some for some in left if len(some) == 1))


def gone(windows: Iterable[Window], each: int) -> list[int]:
    """The layers that go: each window's but for the first, so many as have layers of their own sort in their place."""
    return [layer for window in windows for layer in window.layers()[each:]]


def refuse_lacking(shape: ModelShape, without: Sequence[int], what: str) -> None:
    """Errors: UserError where none of a sort would stay."""
    if lost := _lost(shape, without):
        raise UserError(
            f"with {what} none of layers {', '.join(map(str, lost))} stays, and a hybrid needs one that attends and "
            "one that does not, or it cannot generate with a cache; remove fewer layers, or others."
        )


def _lost(shape: ModelShape, without: Sequence[int]) -> list[int]:
    return next((sort for sort in shape.sorts if set(sort) <= set(without)), [])
