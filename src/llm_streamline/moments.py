"""Second moments of two streams of states, and the linear map that they give: closed form, in one pass, in float64.

The map is M = (X'X + eps I)^-1 X'Y, for rows x of X and y of Y (Ghosted Layers, arXiv 2605.15491, with Y what a window
adds to its input; ReplaceMe, arXiv 2505.02819, with X the output of the MLP below the window). Shapes: D, E widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_streamline.parallel import World

RIDGE = 1e-6  # of the mean square of a coordinate of x


@dataclass
class Moments:
    """Sums over tokens: x'x (D, D), x'y (D, E) and y'y, in float64 on the CPU."""

    xx: Tensor
    xy: Tensor
    yy: float = 0.0
    tokens: int = 0

    @classmethod
    def of_widths(cls, inputs: int, outputs: int) -> Moments:
        return cls(torch.zeros(inputs, inputs, dtype=torch.float64), torch.zeros(inputs, outputs, dtype=torch.float64))

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Rows x (..., D) and y (..., E), each counted `weight` (...) times, or once."""
        x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
        scaled = x if weight is None else x * weight.flatten().double()[:, None]
        self.xx += (scaled.T @ x).cpu()
        self.xy += (scaled.T @ y).cpu()
        each = y.square().sum(dim=-1)
        self.yy += float(each.sum() if weight is None else (each * weight.flatten().double()).sum())
        self.tokens += len(x)

    def add_up(self, world: World) -> None:
        """The sums of all processes."""
        numbers = world.sum_(torch.tensor([self.yy, float(self.tokens)], dtype=torch.float64))
        self.yy, self.tokens = float(numbers[0]), int(numbers[1])
        world.sum_(self.xx)
        world.sum_(self.xy)

    def solve(self, ridge: float = RIDGE) -> Tensor:
        """(D, E) float64: the map with the least squared error of x @ map against y, plus the ridge's penalty.

        A stream that spans fewer than D directions gives a finite map too, which is small where nothing was seen.
        """
        ((_, mapping),) = self.solutions([ridge])
        return mapping

    def solutions(self, ridges: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
        """Each ridge with its map, as `solve` gives it; one eigendecomposition serves all."""
        values, vectors = torch.linalg.eigh(self.xx)
        rotated, mean = vectors.T @ self.xy, float(self.xx.diagonal().mean())
        for ridge in ridges:
            strength = ridge * mean or 1.0  # no x at all: any number divides its zeros
            yield ridge, vectors @ (rotated / (values.clamp_min(0) + strength)[:, None])

    def unexplained(self, mapping: Tensor) -> float:
        """The share of y's square that x @ mapping leaves, 0 where there is none; (D, E) float64."""
        if not self.yy:
            return 0.0
        left = self.yy - 2 * float((mapping * self.xy).sum()) + float(((self.xx @ mapping) * mapping).sum())
        return max(0.0, left / self.yy)
