"""What takes a training step: Muon for the matrices of layers with AdamW for all else, or AdamW alone.

Measured in docs/decisions/0011: Muon learns more where there are many steps, AdamW where there are few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from llm_streamline.precision import multiplies_bfloat16

if TYPE_CHECKING:
    from llm_streamline.recipe import Recipe

ADAMW, MUON = "adamw", "muon"
AS_ADAMW = "match_rms_adamw"  # what makes Muon's steps of the size of AdamW's
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
    fast = multiplies_bfloat16(str(matrices[0].device))
    kind = torch.optim.Muon if fast else Float32Muon
    muon = kind(matrices, lr=lr, weight_decay=decay, adjust_lr_fn=AS_ADAMW)
    return Several([muon, *([torch.optim.AdamW(others, lr=lr, weight_decay=decay, fused=True)] if others else [])])


class Float32Muon(torch.optim.Muon):
    """torch's Muon with steps computed in float32: its own are in bfloat16, which some processors only emulate."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["adjust_lr_fn"] == AS_ADAMW
            for weight in [weight for weight in group["params"] if weight.grad is not None]:
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                held = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(held, group["momentum"]) if group["nesterov"] else held
                turned = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(turned, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def orthogonal(matrix: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """A matrix of about the same row and column spaces whose singular values are all near 1, by Newton and Schulz.

    The quintic iteration of Muon: X <- a X + (b X X' + c (X X')^2) X, from X of norm 1.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if tall else matrix
    found = found / found.norm().clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if tall else found


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
