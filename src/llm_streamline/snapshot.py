"""A training run's state in one file: written every few minutes, whole or not at all, and continued to the bit."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_streamline.errors import UserError, reason
from llm_streamline.files import atomic, remove
from llm_streamline.history import History, in_memory
from llm_streamline.parallel import ALONE, World

_STATE = "state"  # in the file's metadata: everything that is no tensor
_RANDOM = "random.torch"


@dataclass
class Snapshot:
    """The file at `path`, written anew where `every` seconds have passed. A run without one is not continued."""

    path: Path
    every: float
    setting: dict[str, Any] = field(default_factory=dict)  # what has to be the same for the state to mean anything
    world: World = ALONE  # whose first process reads for all
    _last: float = field(default_factory=time.monotonic)

    @property
    def due(self) -> bool:
        return time.monotonic() - self._last >= self.every

    def write(self, network: nn.Module, optimizer: torch.optim.Optimizer, history: History) -> None:
        """Replace the file. Errors: UserError for a full disk; what was there before is still there."""
        moments = optimizer.state_dict()["state"]
        tensors = {
            _RANDOM: torch.get_rng_state(),
            **{f"weights.{key}": value for key, value in network.state_dict().items()},
            **{f"best.{key}": value for key, value in history.best_weights.items()},
            **{f"optimizer.{place}.{key}": value for place, own in moments.items() for key, value in own.items()},
        }
        state = {"setting": self.setting, **history.as_json()}
        with atomic(self.path) as temporary:
            save_file(
                {key: value.contiguous() for key, value in tensors.items()}, temporary, {_STATE: json.dumps(state)}
            )
        self._last = time.monotonic()

    def restore(self, network: nn.Module, optimizer: torch.optim.Optimizer, history: History) -> bool:
        """Put everything back where the file had left it; False where there is no file. Errors: UserError."""
        found = self.world.led(self._own)
        if found is None:
            return False
        state, tensors = found
        device = next(network.parameters()).device
        network.load_state_dict(_below("weights", tensors))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in _below("optimizer", tensors).items():
            place, _, name = key.partition(".")
            moments.setdefault(int(place), {})[name] = value.clone()  # which is written to, as the file must not be
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        history.restore(state, _below("best", tensors), device)
        torch.set_rng_state(tensors[_RANDOM])
        return True

    def _own(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if not self.path.exists():
            return None
        state, tensors = self._read()
        if state["setting"] != self.setting:
            raise UserError(
                f"{self.path} belongs to another training ({_difference(state['setting'], self.setting)}); "
                "repeat the command as it was, or begin again with --fresh."
            )
        return state, tensors

    def kept_setting(self) -> dict[str, Any]:
        """The setting in the file; nothing where there is no file."""
        return dict(self._read(whole=False)[0]["setting"]) if self.path.exists() else {}

    def remove(self) -> None:
        remove(self.path)
        remove(self._best)

    @property
    def _best(self) -> Path:
        return self.path.with_stem(f"{self.path.stem}-best")

    def keep_best(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights in a file of their own, mapped, so that they take no memory while training goes on."""
        if not self.world.first:
            return in_memory(weights)
        with atomic(self._best) as temporary:
            save_file({key: value.contiguous() for key, value in weights.items()}, temporary)
        with safe_open(self._best, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def _read(self, whole: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state and, where the whole is wanted, its tensors, mapped: they take no memory until they are copied."""
        try:
            with safe_open(self.path, framework="pt") as file:
                state = json.loads(file.metadata()[_STATE])
                return state, {key: file.get_tensor(key) for key in (file.keys() if whole else ())}
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"{self.path} is damaged ({reason(error)}); delete it and repeat the command to train anew."
            ) from error


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def _difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    key = next(key for key in {**then, **now} if then.get(key) != now.get(key))
    return f"{key} {then.get(key)} then, {now.get(key)} now"
