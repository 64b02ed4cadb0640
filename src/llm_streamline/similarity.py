"""States at all boundaries -> Similarity: what every two boundaries have in common, per sequence and on the whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_streamline.errors import UserError
from llm_streamline.parallel import World
from llm_streamline.records import Matrix, Similarity
from llm_streamline.spool import States

_CHUNK_TOKENS, _CHUNK_BYTES = 2048, 2**25  # bound the float32 copies of the states at all boundaries
_TINY = 1e-12


def pairwise(states: Sequence[States], mask: Tensor) -> tuple[Tensor, Tensor]:
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


class Sums:
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
