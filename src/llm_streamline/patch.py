"""A patch at the cut that scales the state's rotated channels to what they are above the window; nothing is solved for.

P = H diag(d) H', with H a Hadamard rotation, which spreads the few outliers of a state over all channels, and d the
ratio of a channel's mean magnitude where the window is left to that where it is entered (LinearPatch, NeurIPS 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.fft import dct
from scipy.linalg import hadamard
from torch import Tensor

from llm_streamline.parallel import World


def rotation(width: int) -> Tensor:
    """An orthogonal (D, D) matrix in float64: Hadamard, times a cosine transform for a width that is no power of 2."""
    power = width & -width  # the largest power of 2 that divides it
    odd = torch.from_numpy(dct(torch.eye(width // power, dtype=torch.float64).numpy(), norm="ortho"))
    return torch.kron(odd, torch.from_numpy(hadamard(power)).double() / power**0.5)


@dataclass
class Magnitudes:
    """Sums over tokens of what the states that enter and leave a window have in each rotated channel: (D,) float64."""

    turn: Tensor
    entering: Tensor
    leaving: Tensor

    @classmethod
    def of_width(cls, width: int) -> Magnitudes:
        return cls(rotation(width), *torch.zeros(2, width, dtype=torch.float64))

    def add(self, entering: Tensor, leaving: Tensor) -> None:
        """States (..., D) of some tokens."""
        for total, state in ((self.entering, entering), (self.leaving, leaving)):
            total += (state.flatten(0, -2).double().cpu() @ self.turn).abs().sum(dim=0)

    def add_up(self, world: World) -> None:
        """The sums of all processes."""
        world.sum_(self.entering)
        world.sum_(self.leaving)


def patch_map(found: Magnitudes) -> Tensor:
    """P - I (D, D) float64: a state x of the first boundary becomes x P; channels without any magnitude stay."""
    scale = torch.where(found.entering > 0, found.leaving / found.entering.clamp_min(1e-300), 1.0)
    return found.turn @ (scale - 1).diag() @ found.turn.T
