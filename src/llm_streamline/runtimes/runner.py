"""What every runtime can be asked for, so that one comparison serves all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Runner(Protocol):
    """A model that was loaded by one runtime. It computes on the CPU, in the number format of its file."""

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """What the model expects after each of the T tokens: (T, V), float32."""
        ...

    def greedy(self, ids: Sequence[int], new: int) -> list[int]:
        """So many tokens after the prompt, each the likeliest, through the runtime's cache; no end token stops it."""
        ...

    def close(self) -> None:
        """Let go of the weights."""
        ...
