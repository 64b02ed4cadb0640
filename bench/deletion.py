"""What scoring a window by deletion costs, for each of one length, against a full forward over the same tokens.

It is done in the pass of the dense model that the analysis makes in any case: the cost is what it adds to that.
"""

from __future__ import annotations

from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench.common import Finding, interleaved, load, median_ratio, random_blocks
from llm_streamline.analyze import analyze
from llm_streamline.families import layers_of
from llm_streamline.rank import rank, survey
from llm_streamline.records import Window

BATCH, BOUND = 8, 0.6


def run(compute: str) -> list[Finding]:
    model = load(compute)
    found = [_scored(model, compute, length, blocks=32) for length in (1, 2, 3, 4, 5, 6)]
    deep = _deep().to(model.dtype)
    return found + [_scored(deep, compute, length, blocks=8) for length in (1, 8)]


def _deep() -> PreTrainedModel:
    """32 layers, and a head of two thirds of one: Llama-2-7B's proportions, narrow."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 2048}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=32, num_attention_heads=4)).eval()


def _scored(model: PreTrainedModel, compute: str, length: int, blocks: int) -> Finding:
    layers, ids = len(layers_of(model)), random_blocks(model, blocks)
    windows = [Window(start=start, stop=start + length) for start in range(1, layers - length)]

    @torch.no_grad()
    def full() -> None:
        for part in ids.split(BATCH):
            model(input_ids=part.long(), use_cache=False)

    actions = {
        "survey": lambda: survey(model, ids, BATCH, windows, "loss", quiet=True),
        "analyze": lambda: analyze(model, ids, BATCH, quiet=True),
        "rank": lambda: rank(model, ids, BATCH, windows, "loss", quiet=True),
        "forward": full,
    }
    rounds = interleaved(actions, rounds=5)
    ratio = median((one["survey"] - one["analyze"]) / one["forward"] for one in rounds) / len(windows)
    alone = median_ratio(rounds, "rank", "forward") / len(windows)
    what = (
        f"scoring a window of {length} of {layers} layers by deletion, of {len(windows)} such / full forward, "
        f"{compute} (in a pass of its own {alone:.3f})"
    )
    return Finding(what, ratio, f"at most {BOUND}", ratio <= BOUND)
