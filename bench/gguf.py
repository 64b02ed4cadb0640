"""`python -m bench.gguf [NAME ...]`: which families llama.cpp runs as transformers does once layers are gone.

A tiny random model of every proven kind loses two layers, is converted and run in a process of its own (llama.cpp ends
the process where it meets what it does not expect), whatever the export would refuse; a line of JSON for each.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_streamline.checkpoint import BUNDLED, Source
from llm_streamline.families import sliced_config
from llm_streamline.runtimes import convert
from llm_streamline.runtimes.compare import compare
from llm_streamline.runtimes.gguf import find_converter
from llm_streamline.runtimes.gguf_model import GgufModel
from llm_streamline.runtimes.patterns import mixed_keys, why_not_gguf
from llm_streamline.runtimes.spelling import earlier_names
from tests import tiny

# published models of some kinds have none of the options that the configurations of the tests turn on
PLAIN = {
    "qwen3-plain": tiny._like_llama("qwen3", head_dim=8),
    "gpt2-plain": tiny._config("gpt2"),
    "gpt_bigcode-plain": tiny._config("gpt_bigcode"),
    "starcoder2-unlimited": tiny._like_llama("starcoder2", sliding_window=None),
    "phi-plain": tiny._like_llama("phi", num_key_value_heads=4),
    "cohere-plain": tiny._like_llama("cohere"),
    "olmo2-plain": tiny._like_llama("olmo2", tie_word_embeddings=False),
    "falcon-plain": tiny._config("falcon"),
    "arcee-plain": tiny._like_llama("arcee"),
    "olmoe-plain": tiny._like_llama("olmoe", num_experts=4, num_experts_per_tok=2, num_key_value_heads=4),
}
CONFIGS = {**tiny.CONFIGS, **PLAIN}
KEPT = {"cut": [0, 3, 4, 5], "whole": list(range(tiny.LAYERS))}
PROMPTS, LENGTH = 4, 40  # past every sliding window


def main() -> None:
    names = sys.argv[1:] or list(CONFIGS)
    context = multiprocessing.get_context("fork")
    torch.set_num_threads(1)
    for name in names:
        parent, child = context.Pipe(duplex=False)
        process = context.Process(target=_report, args=(name, child))
        process.start()
        process.join(300)
        alive = process.is_alive()
        process.kill()
        found = (
            parent.recv()
            if parent.poll()
            else {"failed": "took too long" if alive else f"ended with {process.exitcode}"}
        )
        print(json.dumps({"name": name, "type": CONFIGS[name].model_type, **found}), flush=True)


def _report(name: str, out: object) -> None:
    """What came of one configuration, with the layers of `cut` and with all."""
    found = {}
    for which, kept in KEPT.items():
        config = sliced_config(CONFIGS[name], kept)
        found |= {"mixed": mixed_keys(config), "refused": why_not_gguf(config)} if which == "cut" else {}
        try:
            found[which] = _compared(config)
        except BaseException as error:
            found[which] = f"{type(error).__name__}: {error}"[:200]
    out.send(found)


def _compared(config: object) -> str:
    config = copy.deepcopy(config)
    tokenizer = AutoTokenizer.from_pretrained(Source(BUNDLED).path)
    config.vocab_size = len(tokenizer) + 10  # some kinds of model get a tokenizer with tokens of its own
    if getattr(config, "rope_parameters", None) and "rope_theta" in config.rope_parameters:
        config.rope_parameters["rope_theta"] = 500.0  # no default
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = Path(scratch) / "model", Path(scratch) / "model.gguf"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        sink = io.StringIO()
        with contextlib.redirect_stderr(sink), contextlib.redirect_stdout(sink):
            options = [str(folder), "--outfile", str(file), "--outtype", "f32"]
            convert.main(find_converter(), "gpt-2", earlier_names(folder), options)
        prompts = torch.randint(3, config.vocab_size, (PROMPTS, LENGTH)).tolist()
        difference = compare(model, GgufModel(file, 2 * LENGTH), prompts, exact=True)
    return f"{difference.equal}/{difference.tokens} {difference.error:.1e}"


if __name__ == "__main__":
    main()
