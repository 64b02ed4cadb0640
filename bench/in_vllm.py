"""`python -m bench.in_vllm NAME ...`: whether vLLM runs families as transformers does once layers are gone.

A small random model of each configuration of the tests, with heads as wide as vLLM takes them, whole and without two
layers; each is run in a process of its own. A line of JSON says how many greedy tokens are the same, and the error.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from llm_streamline.families import sliced_config
from llm_streamline.runtimes.compare import compare
from llm_streamline.runtimes.vllm_model import VllmModel
from tests import tiny

KEPT = {"cut": [0, 3, 4, 5], "whole": list(range(tiny.LAYERS))}
WIDTHS = {"hidden_size": 128, "n_embd": 128, "head_dim": 32, "vocab_size": 512, "word_embed_proj_dim": 128}
PROMPTS, LENGTH = 4, 40  # past every sliding window


def main() -> None:
    if sys.argv[1] == "--one":
        print(json.dumps({"found": _found(*sys.argv[2:])}), flush=True)
        return
    for name in sys.argv[1:]:
        print(json.dumps({"name": name, **{which: _run(name, which) for which in KEPT}}), flush=True)


def _run(name: str, which: str) -> str:
    command = [sys.executable, "-m", "bench.in_vllm", "--one", name, which]
    done = subprocess.run(command, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith('{"found"')), None)
    return json.loads(line)["found"] if line else f"failed: {done.stderr.strip()[-200:]}"


def _found(name: str, which: str) -> str:
    config = sliced_config(copy.deepcopy(tiny.CONFIGS[name]), KEPT[which])
    for key, width in WIDTHS.items():
        if hasattr(config, key):
            setattr(config, key, width)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tiny.make_tokenizer().save_pretrained(folder)
        prompts = torch.randint(3, config.vocab_size, (PROMPTS, LENGTH)).tolist()
        found = compare(model, VllmModel(Path(folder), 2 * LENGTH), prompts, exact=True)
    return f"{found.equal}/{found.tokens} {found.error:.1e}"


if __name__ == "__main__":
    main()
