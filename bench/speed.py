"""Whether a shortened model is as fast as its depth says: on the line through models of 0, 6, 9 and 12 layers.

Beside it stands how far the stock model of that depth is from the same line: what the machine does out of proportion.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench.common import Finding, model_name
from llm_streamline.checkpoint import BUNDLED, Source
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.run import compress
from llm_streamline.scoring.speed import Load, Round, take_turns

DEPTHS = (0, 6, 9, 12)
SHORTENED = {"none, 25 %": ("none", "25%"), "layer, 25 %": ("layer", "25%"), "layer, 50 %": ("layer", "50%")}
LOADS = (Load(1, 224, 32), Load(8, 224, 32))  # the longest prompt that leaves room in a context of 256
ROUNDS, BOUND = 40, 0.05


def run(compute: str) -> list[Finding]:
    dtype = torch.bfloat16 if compute == "bfloat16" else torch.float32
    shortened = {name: _shortened(*how, dtype) for name, how in SHORTENED.items()}
    models = [*(_of_depth(depth, dtype) for depth in DEPTHS), *shortened.values()]
    findings = []
    for load in LOADS:
        rounds = take_turns(models, load, "seven models", rounds=ROUNDS)
        for place, name in enumerate(shortened, start=len(DEPTHS)):
            depth = models[place].config.num_hidden_layers
            findings += _held_against_line(rounds, place, depth, f"{name}, batch {load.batch}, {compute}")
    return findings


def _of_depth(depth: int, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(Source(model_name()).path)
    config.num_hidden_layers = depth
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _shortened(replace: str, remove: str, dtype: torch.dtype) -> PreTrainedModel:
    """As `compress` saves it, after hardly any training: what it has learnt does not change its speed."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(model=model_name(), data=(BUNDLED,), replace=replace, remove=remove, tokens=10_000)
        result = compress(recipe, Runtime(output=Path(folder) / "run", quiet=True, tasks=("none",)))
        return AutoModelForCausalLM.from_pretrained(result.model, dtype=dtype).eval()


def _held_against_line(rounds: list[list[Round]], place: int, depth: int, what: str) -> list[Finding]:
    """Its seconds over those of the line, through the reference models, at its depth.

    Each model's seconds are its least disturbed round's: what else runs on a machine only ever adds to a round.
    """
    found = []
    for part, name in enumerate(("prefill", "decode")):
        seconds = [min(one[part] for one in own) for own in rounds]
        line = float(np.polyval(np.polyfit(DEPTHS, seconds[: len(DEPTHS)], 1), depth))
        ratio, stock = seconds[place] / line, seconds[DEPTHS.index(depth)] / line
        what_else = f"{name} / the line at {depth} layers, {what} (the stock model: {stock:.3f})"
        found.append(Finding(what_else, ratio, f"within {BOUND:.0%} of 1", abs(ratio - 1) <= BOUND))
    return found
