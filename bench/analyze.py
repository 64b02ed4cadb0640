"""What measuring the similarity of all windows costs, against a bare forward without head over the same tokens."""

from __future__ import annotations

import torch

from bench.common import Finding, interleaved, load, median_ratio, random_blocks
from llm_streamline.analyze import analyze

BATCH = 16


def run(compute: str) -> list[Finding]:
    model = load(compute)
    blocks = random_blocks(model, 2 * BATCH)

    @torch.no_grad()
    def bare() -> None:
        for ids in blocks.split(BATCH):
            model.base_model(input_ids=ids.long(), use_cache=False)

    actions = {"analyze": lambda: analyze(model, blocks, BATCH, quiet=True), "bare": bare}
    ratio = median_ratio(interleaved(actions, rounds=9), "analyze", "bare")
    return [Finding(f"analyze / bare forward, {compute}", ratio, "at most 1.15", ratio <= 1.15)]
