"""What has to stay of a hybrid, whose layers attend or recur: a layer of either sort, or no cache counts its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PretrainedConfig

from llm_streamline.architectures import RECURRING
from llm_streamline.errors import UserError
from llm_streamline.families import kinds_of_layers
from llm_streamline.records import ModelShape, Window


def sorts(config: PretrainedConfig) -> list[list[int]]:
    """The numbers of the layers that attend and of the others; none where all are of one sort."""
    kinds = kinds_of_layers(config) or []
    recurring = [number for number, kind in enumerate(kinds) if kind in RECURRING]
    attending = [number for number, kind in enumerate(kinds) if kind not in RECURRING]
    return [attending, recurring] if attending and recurring else []


def leaving_each(shape: ModelShape, windows: Sequence[Window], each: int, taken: Sequence[Window]) -> list[Window]:
    """The windows after which layers of each sort stay, once those taken have gone too.

    Errors: UserError where there is none.
    """
    found = [one for one in windows if not _lost(shape, gone([*taken, one], each))]
    if windows and not found:
        refuse_lacking(shape, gone([*taken, windows[0]], each), f"a window such as {windows[0]}")
    return found


def gone(windows: Iterable[Window], each: int) -> list[int]:
    """The layers that go: each window's but for the first, so many as have layers of their own sort in their place."""
    return [layer for window in windows for layer in window.layers()[each:]]


def refuse_lacking(shape: ModelShape, without: Sequence[int], what: str) -> None:
    """Errors: UserError where none of a sort would stay."""
    if lost := _lost(shape, without):
        raise UserError(
            f"with {what} none of layers {', '.join(map(str, lost))} stays, and a hybrid needs one that attends and "
            "one that recurs, or it cannot generate with a cache; remove fewer layers, or others."
        )


def _lost(shape: ModelShape, without: Sequence[int]) -> list[int]:
    return next((sort for sort in shape.sorts if set(sort) <= set(without)), [])
