"""Interleaved timing, the model to time, and the table that says what came out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

from llm_streamline.checkpoint import BUNDLED, Source, load_model

REAL = Path(__file__).parents[2] / "shared" / "models" / "prose-llama-10m"


@dataclass(frozen=True)
class Finding:
    """One measured ratio and the bound it is held to."""

    what: str
    ratio: float
    bound: str
    holds: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.holds else 'MISS'} {self.what}: {self.ratio:.3f} (to be {self.bound})"


def interleaved(actions: dict[str, Callable[[], object]], rounds: int) -> list[dict[str, float]]:
    """Seconds of every action in every round; a round runs each once, so that drift hits all alike."""
    found = []
    for action in actions.values():
        action()  # warm up
    for _ in range(rounds):
        seconds = {}
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            seconds[name] = time.perf_counter() - started
        found.append(seconds)
    return found


def median_ratio(rounds: list[dict[str, float]], over: str, under: str) -> float:
    return median(seconds[over] / seconds[under] for seconds in rounds)


def model_name() -> str:
    """The real model where it is at hand, else the bundled one."""
    return str(REAL) if REAL.is_dir() else BUNDLED


def load(compute: str) -> PreTrainedModel:
    """The model as `--compute` would have it: the checkpoint's format for bfloat16, else float32."""
    return load_model(Source(model_name()), "auto" if compute == "bfloat16" else torch.float32)


def random_blocks(model: PreTrainedModel, blocks: int, length: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (blocks, length), generator=generator, dtype=torch.int32)
