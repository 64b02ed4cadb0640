"""Token blocks -> hidden states -> Similarity: every window of every length from one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_streamline.errors import UserError
from llm_streamline.families import layers_of
from llm_streamline.forward import at_boundary, run_until_stopped, stop_forward
from llm_streamline.offload import is_offloaded
from llm_streamline.parallel import ALONE, World
from llm_streamline.progress import progress
from llm_streamline.records import Matrix, Similarity
from llm_streamline.spool import States, spooled

_CHUNK_TOKENS, _CHUNK_BYTES = 2048, 2**25  # bound the float32 copies of the states at all boundaries
_TINY = 1e-12


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


def _summed(model: PreTrainedModel, parts: Sequence[_Part], quiet: bool, scratch: Path | None) -> _Sums:
    """Over the sequences of these micro-batches, of which there may be none."""
    sums = _Sums(len(layers_of(model)) + 1)
    if is_offloaded(model) and all(part.mask is None for part in parts):
        states = spooled(model, [part.ids for part in parts], scratch)
    else:
        states = _recorded(model, parts)
    with progress("analyzing", sum(len(part.ids) for part in parts), quiet) as advance:
        for found, part in zip(states, parts, strict=True):
            sums.add(*_pairwise(found, part.counts.to(model.device)), part.first)
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


def _pairwise(states: Sequence[States], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Per sequence the mean cosine and relative change between boundaries: two (B, L+1, L+1) in float32.

    Both come from one Gram matrix G of each token's states: cos = G_ij / sqrt(G_ii G_jj) and
    ||x_j - x_i||^2 = G_ii + G_jj - 2 G_ij.
    """
    sequences, length = mask.shape
    cosine = torch.zeros(sequences, len(states), len(states), device=mask.device)
    change = torch.zeros_like(cosine)
    # bytes of a token's float32 copies, and of the half dozen matrices that are made of them
    width = 4 * sequences * len(states) * (states[0].shape[-1] + 6 * len(states))
    step = max(1, min(_CHUNK_TOKENS // sequences, _CHUNK_BYTES // width))
    for first in range(0, length, step):
        part = slice(first, min(first + step, length))
        gram = _gram([state[:, part] for state in states])
        weight = mask[:, part].float()
        _refuse_non_finite(gram, weight)
        squares = gram.diagonal(dim1=-2, dim2=-1).clamp_min(_TINY)  # (B, T, L+1)
        norms = squares.sqrt()
        cosines = gram / (norms.unsqueeze(-1) * norms.unsqueeze(-2))
        distances = (squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * gram).clamp_min(0).sqrt()
        cosine += torch.einsum("bt,btij->bij", weight, cosines)
        change += torch.einsum("bt,btij->bij", weight, distances / norms.unsqueeze(-1))
    counts = mask.sum(dim=1).clamp_min(1).float()[:, None, None]
    return cosine / counts, change / counts


def _gram(states: list[Tensor]) -> Tensor:
    """(B, T, L+1, L+1): inner products of each token's states, in float32 whatever autocast says."""
    stacked = torch.stack(states, dim=2).float()
    with torch.autocast(stacked.device.type, enabled=False):
        return stacked @ stacked.transpose(-1, -2)


def _refuse_non_finite(gram: Tensor, weight: Tensor) -> None:
    finite = gram.diagonal(dim1=-2, dim2=-1).isfinite() | (weight == 0).unsqueeze(-1)
    bad = (~finite).any(dim=0).any(dim=0)
    if bool(bad.any()):
        boundary = int(bad.nonzero()[0])
        where = "what enters layer 0" if boundary == 0 else f"the output of layer {boundary - 1}"
        raise UserError(
            f"{where} has infinite or undefined values; "
            "try --compute float32, and check the checkpoint if that does not help."
        )


class _Sums:
    """Sums over sequences, in float64: enough for means, standard errors, and the means of two halves."""

    def __init__(self, boundaries: int) -> None:
        self.count = 0
        self.first = torch.zeros(2, boundaries, boundaries, dtype=torch.float64)
        self.second = torch.zeros_like(self.first)
        self.odd = torch.zeros_like(self.first[0])  # of the cosines, those of every other sequence

    def add(self, cosine: Tensor, change: Tensor, number: int) -> None:
        """Of sequences (B, L+1, L+1), the first of which has a number."""
        values = torch.stack([cosine, change]).double().cpu()  # (2, B, L+1, L+1)
        self.count += values.shape[1]
        self.odd += values[0, 1 - number % 2 :: 2].sum(dim=0)
        self.first += values.sum(dim=1)
        self.second += values.square().sum(dim=1)

    def add_up(self, world: World) -> None:
        """The sums of all processes' sequences."""
        counted = torch.tensor([float(self.count)], dtype=torch.float64)
        self.count = int(world.sum_(counted))
        world.sum_(self.first)
        world.sum_(self.second)
        world.sum_(self.odd)

    def result(self, tokens: int) -> Similarity:
        mean = self.first / self.count
        variance = (self.second / self.count - mean.square()).clamp_min(0) * self.count / max(self.count - 1, 1)
        error = (variance / self.count).sqrt()
        matrices: list[Matrix] = [m.tolist() for m in (*mean, *error)]
        return Similarity(
            num_layers=self.first.shape[-1] - 1,
            sequences=self.count,
            tokens=tokens,
            cosine=matrices[0],
            relative_change=matrices[1],
            cosine_se=matrices[2],
            relative_change_se=matrices[3],
            halves=self._halves(),
        )

    def _halves(self) -> list[Matrix]:
        odd = self.count // 2
        if not odd:
            return []
        return [((self.first[0] - self.odd) / (self.count - odd)).tolist(), (self.odd / odd).tolist()]
