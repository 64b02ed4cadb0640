"""What scoring a window by deletion costs, for each of one length, against a full forward over the same tokens."""

from __future__ import annotations

import torch

from bench.common import Finding, interleaved, load, median_ratio, random_blocks
from llm_streamline.families import layers_of
from llm_streamline.rank import rank
from llm_streamline.records import Window

BATCH, BLOCKS, LENGTHS, BOUND = 8, 32, (1, 2, 4, 6), 0.6


def run(compute: str) -> list[Finding]:
    model = load(compute)
    blocks = random_blocks(model, BLOCKS)

    @torch.no_grad()
    def full() -> None:
        for ids in blocks.split(BATCH):
            model(input_ids=ids.long(), use_cache=False)

    found = []
    for length in LENGTHS:
        windows = [Window(start=start, stop=start + length) for start in range(1, len(layers_of(model)) - length)]
        actions = {
            "rank": lambda windows=windows: rank(model, blocks, BATCH, windows, "loss", quiet=True),
            "forward": full,
        }
        # the dense model's own pass, which gives all windows their states, is in it
        ratio = median_ratio(interleaved(actions, rounds=5), "rank", "forward") / len(windows)
        what = f"scoring a window of {length} by deletion, of {len(windows)} such / full forward, {compute}"
        found.append(Finding(what, ratio, f"at most {BOUND}", ratio <= BOUND))
    return found
