"""What takes a training step: Muon for the matrices of layers with AdamW for all else, or AdamW alone.

Measured in docs/decisions/0011: Muon learns more where there are many steps, AdamW where there are few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from llm_streamline.recipe import Recipe

ADAMW, MUON = "adamw", "muon"
MANY_STEPS = 250
RATES = {ADAMW: (2e-3, 5e-3), MUON: (4e-3, 1e-2)}  # at a width of 256, and at most


def optimizer_for(recipe: Recipe, sequences: int) -> str:
    """The one asked for; else Muon where so many sequences of training make many steps."""
    many = sequences >= MANY_STEPS * recipe.accumulate * (recipe.batch or 1)
    return recipe.optimizer or (MUON if many else ADAMW)


def default_rate(optimizer: str, width: int) -> float:
    """What a step does to a layer's output grows with the width: the rate falls with it."""
    rate, highest = RATES[optimizer]
    return min(highest, rate * 256 / width)


class Pace(NamedTuple):
    """Weights that train at so many times the learning rate; `turned` where Muon may take the matrices of them."""

    rate: float
    weights: Sequence[nn.Parameter]
    turned: bool = True


def make_optimizer(name: str, paces: Sequence[Pace], lr: float, decay: float) -> torch.optim.Optimizer:
    """`muon` or `adamw` over the weights; steps of the two are of one size at one learning rate.

    Each group has a 'pace', by which whoever sets its learning rate is to multiply it.
    """
    parts = []
    for pace in paces:
        parts.append(_of_one_pace(name if pace.turned else ADAMW, pace.weights, pace.rate * lr, decay))
        for group in parts[-1].param_groups:
            group["pace"] = pace.rate
    return Several(parts) if len(parts) > 1 else parts[0]


def _of_one_pace(name: str, weights: Sequence[nn.Parameter], lr: float, decay: float) -> torch.optim.Optimizer:
    matrices = [weight for weight in weights if weight.ndim == 2]
    if name == ADAMW or not matrices:
        return torch.optim.AdamW(weights, lr=lr, weight_decay=decay, fused=True)
    others = [weight for weight in weights if weight.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return Several([muon, *([torch.optim.AdamW(others, lr=lr, weight_decay=decay, fused=True)] if others else [])])


class Several(torch.optim.Optimizer):
    """Optimizers that step together, each for weights of its own; their state is numbered through."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([weight for part in parts for group in part.param_groups for weight in group["params"]], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """The groups are the parts' own, so that a rate that is set here is theirs."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"state": {}, "param_groups": []}
        for numbers, part in self._numbered():
            own = part.state_dict()
            found["state"] |= {numbers[place]: state for place, state in own["state"].items()}
            found["param_groups"] += own["param_groups"]
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for numbers, part in self._numbered():
            own = {number - numbers.start: state for number, state in state_dict["state"].items() if number in numbers}
            part.load_state_dict({"state": own, "param_groups": part.state_dict()["param_groups"]})
        self._share_groups()  # which loading has made anew

    def _numbered(self) -> Iterator[tuple[range, torch.optim.Optimizer]]:
        """Each part, with its weights' numbers."""
        first = 0
        for part in self.parts:
            count = sum(len(group["params"]) for group in part.param_groups)
            yield range(first, first + count), part
            first += count
