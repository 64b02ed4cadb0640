"""Three epochs of training with states kept on the disk, against three that run the frozen layers each time."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from bench.common import Finding, interleaved, load, median_ratio, random_blocks
from llm_streamline.cache import Cached, StateCache
from llm_streamline.passages import streamed
from llm_streamline.records import Window
from llm_streamline.replacement import build_replacement
from llm_streamline.text import shuffled
from llm_streamline.train import Settings, Trainer

BATCH, BLOCKS, EPOCHS = 8, 48, 3
DEEP, SHALLOW = (
    Window(start=7, stop=11),
    Window(start=1, stop=3),
)  # of 12 layers: what lies below them is most, or little


def run(compute: str) -> list[Finding]:
    model = load(compute)
    blocks = random_blocks(model, BLOCKS)
    epochs = torch.cat([shuffled(blocks, seed) for seed in range(EPOCHS)])
    found = []
    for window in (DEEP, SHALLOW):
        actions = {
            "cached": lambda window=window: train(model, window, blocks, epochs, compute, cached=True),
            "streamed": lambda window=window: train(model, window, blocks, epochs, compute, cached=False),
        }
        ratio = median_ratio(interleaved(actions, rounds=5), "cached", "streamed")
        bound = 1.0 if window is DEEP else 1.1
        what = f"three epochs with a cache / streamed, window {window} of 12 layers, {compute}"
        found.append(Finding(what, ratio, f"at most {bound}", ratio <= bound))
    return found


def train(
    model: torch.nn.Module, window: Window, blocks: torch.Tensor, epochs: torch.Tensor, compute: str, cached: bool
) -> None:
    autocast = compute == "bfloat16"
    settings = Settings("nmse", BATCH, 1, 1e-3, 1e-4, 1e-3, 0.01, 5.0, autocast=autocast)
    replacement = build_replacement(model, [window.start], "inherited", 0)
    trainer = Trainer(model, window, replacement, settings, quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        if cached:
            dtype = torch.bfloat16 if autocast else torch.float32
            cache = StateCache(Path(folder), "bench", blocks, model.config.hidden_size, dtype)
            trainer.source = Cached(model, window, streamed(model, window, autocast), cache)
        trainer.fit(epochs, blocks[:1])
