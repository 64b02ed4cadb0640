"""Named sets of recipe values. Their meaning never changes; what a user gives wins over them."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"replace": "layer", "init": "inherited"},
    "paper-random": {"replace": "layer", "init": "random"},
    "paper-ffn": {"replace": "ffn", "init": "random"},
    "paper-swiglu": {"replace": "swiglu", "init": "random"},
    "paper-none": {"replace": "none"},
}
# method.md section 2: the authors' settings. Batch and steps stay ours, so that no preset is starved.
PAPER = {
    "select": "cosine",
    "loss": "mse",
    "lr": 2e-4,
    "min_lr": 5e-5,
    "weight_decay": 1e-3,
    "warmup": 0.01,
    "clip": 5.0,
    "protect_first": 0,
    "protect_last": 0,
}
