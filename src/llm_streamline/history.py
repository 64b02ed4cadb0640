"""The curves, the clock and the best weights of one training run, kept so that a later process can go on with them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llm_streamline.errors import UserError
from llm_streamline.records import Check, Point

VALIDATIONS = 5  # while training, besides the one before it
FEWEST_CHECKED = 16
CURVE_POINTS = 100

Track = Callable[[dict[str, float], int], None]
Keep = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def checked(training: int, validation: int) -> int:
    """How many of the `validation` sequences each check reads: all of them, or what half the training ones come to.

    The half is of all six together, and no check reads fewer than 16: with few sequences to train on, reading all of
    them at every check would take most of the time.
    """
    return min(validation, max(FEWEST_CHECKED, training // (2 * (VALIDATIONS + 1))))


def in_memory(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in weights.items()}


@dataclass
class History:
    """What has happened until the end of `step` of `steps` optimizer steps."""

    network: nn.Module
    validate: Callable[[], float]
    steps: int
    track: Track
    keep: Keep = in_memory  # the best weights, until a better one
    switches: Collection[int] = ()  # steps after which another loss is trained on: no point of the curve mixes two
    step: int = 0
    tokens: int = 0
    lr: float = 0.0
    seconds: float = 0.0  # of training, without validations
    curve: list[Point] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    pending: list[Tensor] = field(default_factory=list)  # losses since the curve's last point
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def begin(self) -> None:
        """Judge the network as it starts, and start the clock."""
        self._check()
        self._since = time.perf_counter()

    def add(self, tokens: int, lr: float, loss: Tensor) -> None:
        """Note one more optimizer step. Errors: UserError for a loss that is no number."""
        self.step += 1
        self.tokens += tokens
        self.lr = lr
        self.pending.append(loss)
        last = self.step == self.steps
        if last or self.step in self.switches or self.step % max(1, self.steps // CURVE_POINTS) == 0:
            self._point()
        self.catch_up()

    def catch_up(self) -> None:
        """The validation that is due at this step, unless it is done: one may have been cut short."""
        due = self.step == self.steps or self.step % max(1, self.steps // VALIDATIONS) == 0
        if due and self.checks[-1].step < self.step:
            self._stop_clock()
            self._check()
            self._since = time.perf_counter()

    def _stop_clock(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def _point(self) -> None:
        loss = torch.stack(self.pending).mean().item()
        self.pending.clear()
        if not math.isfinite(loss):
            raise UserError(
                f"the training loss is {loss} at step {self.step}; "
                f"begin in another folder with a smaller --lr than {self.lr:g}."
            )
        self.curve.append(Point(step=self.step, tokens=self.tokens, lr=self.lr, loss=loss))
        self.track({"train/loss": loss, "train/lr": self.lr}, self.step)

    def _check(self) -> None:
        loss = self.validate()
        if not self.checks or loss < self.best.loss:
            self.best_weights = self.keep(self.network.state_dict())
        self.checks.append(Check(step=self.step, loss=loss))
        self.track({"validation/loss": loss}, self.step)

    @property
    def best(self) -> Check:
        return min(self.checks, key=lambda check: check.loss)

    def note(self) -> str:
        return f"loss {self.curve[-1].loss:.4g}" if self.curve else ""

    def as_json(self) -> dict[str, Any]:
        """Everything but the best weights, in numbers that read back to the bit."""
        self._stop_clock()
        return {
            **{name: getattr(self, name) for name in ("step", "tokens", "lr", "seconds")},
            "curve": [point.model_dump() for point in self.curve],
            "checks": [check.model_dump() for check in self.checks],
            "pending": torch.stack(self.pending).tolist() if self.pending else [],
        }

    def restore(self, kept: dict[str, Any], best_weights: dict[str, Tensor], device: torch.device) -> None:
        """Go on from what `as_json` and `best_weights` were."""
        for name in ("step", "tokens", "lr", "seconds"):
            setattr(self, name, kept[name])
        self.curve = [Point(**point) for point in kept["curve"]]
        self.checks = [Check(**check) for check in kept["checks"]]
        self.pending = [torch.tensor(loss, device=device) for loss in kept["pending"]]
        self.best_weights = best_weights
        self._since = time.perf_counter()
