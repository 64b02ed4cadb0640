"""Token blocks -> hidden states -> Similarity: every window of every length from one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_streamline.families import layers_of
from llm_streamline.forward import at_boundary, run_until_stopped, stop_forward
from llm_streamline.offload import is_offloaded
from llm_streamline.parallel import ALONE, World
from llm_streamline.progress import progress
from llm_streamline.records import Similarity
from llm_streamline.similarity import Sums, pairwise
from llm_streamline.spool import spooled


def analyze(
    model: PreTrainedModel,
    blocks: Tensor,
    batch: int,
    mask: Tensor | None = None,
    quiet: bool = False,
    scratch: Path | None = None,
    world: World = ALONE,
) -> Similarity:
    """Mean cosine similarity (Eq. 1) and relative change between every two boundaries, with standard errors.

    `blocks` (N, T) token ids; `mask` (N, T), 1 for tokens that count and 0 for padding. The mean is over tokens within
    a sequence, then over sequences; the standard error is over sequences. Where the model's weights are not held, its
    states go through a file in `scratch`. Each process of `world` takes its share of the batches. Errors: UserError
    for non-finite states, or a disk that is full.
    """
    parts = [
        _Part(first, ids, None if mask is None else mask[first : first + batch])
        for first, ids in zip(range(0, len(blocks), batch), blocks.split(batch), strict=True)
    ]
    own = world.share(parts)  # whole batches, so that each is computed as one process would
    sums = world.attempt(lambda: _summed(model, own, quiet, scratch))
    sums.add_up(world)
    return sums.result(tokens=blocks.numel() if mask is None else int(mask.sum()))


@dataclass(frozen=True)
class _Part:
    """A micro-batch (B, T) of token ids, the number of its first sequence, and which tokens count, if not all."""

    first: int
    ids: Tensor
    mask: Tensor | None

    @property
    def counts(self) -> Tensor:
        return torch.ones_like(self.ids) if self.mask is None else self.mask


def _summed(model: PreTrainedModel, parts: Sequence[_Part], quiet: bool, scratch: Path | None) -> Sums:
    """Over the sequences of these micro-batches, of which there may be none."""
    sums = Sums(len(layers_of(model)) + 1)
    if is_offloaded(model) and all(part.mask is None for part in parts):
        states = spooled(model, [part.ids for part in parts], scratch)
    else:
        states = _recorded(model, parts)
    with progress("analyzing", sum(len(part.ids) for part in parts), quiet) as advance:
        for found, part in zip(states, parts, strict=True):
            sums.add(*pairwise(found, part.counts.to(model.device)), part.first)
            advance(len(part.ids), "sequences")
    return sums


def _recorded(model: PreTrainedModel, parts: Sequence[_Part]) -> Iterator[list[Tensor]]:
    """The states at all boundaries, a micro-batch at a time."""
    with _Recorder(model).attached() as recorder:
        for part in parts:
            counts = None if part.mask is None or bool(part.mask.all()) else part.mask.to(model.device)
            run_until_stopped(model, part.ids.to(model.device, torch.long), counts)
            yield recorder.take()


class _Recorder:
    """Keeps the states at all boundaries of the last forward, which it ends before the final norm."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._states: list[Tensor] = []

    @contextmanager
    def attached(self) -> Iterator[_Recorder]:
        last = len(layers_of(self._model))
        with ExitStack() as hooks:
            for boundary in range(last + 1):
                hooks.enter_context(at_boundary(self._model, boundary, lambda state, _: self._states.append(state)))
            hooks.enter_context(at_boundary(self._model, last, stop_forward))
            yield self

    def take(self) -> list[Tensor]:
        states, self._states = self._states, []
        return states
