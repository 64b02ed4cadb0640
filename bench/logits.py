"""Peak memory of a loss of logits at a vocabulary of 128,000, in chunks and all at once; and the text beside it.

Each in a process of its own, as what both take without any logits is: only the difference to that is compared. Run
`python -m bench.logits HOW COMPUTE` for one of them, HOW being none, chunks or whole. The time of `kl+0.1lm` and its
gradient is beside that of `kl`, from the state after the last layer, as healing has them.
"""

from __future__ import annotations

import subprocess
import sys

from bench.common import Finding, interleaved, load, median_ratio, random_blocks

VOCABULARY, LENGTH, BOUND = 128_000, 1024, 0.4
TEXT_BOUND = 1.3


def run(compute: str) -> list[Finding]:
    none, chunks, whole = (peak_in_a_process(how, compute) for how in ("none", "chunks", "whole"))
    ratio = (chunks - none) / (whole - none)
    sizes = f"{(chunks - none) / 2**20:.0f} / {(whole - none) / 2**20:.0f} MiB"
    what = f"memory of kl and its gradient in chunks / on all {LENGTH} x {VOCABULARY} logits, {compute} ({sizes})"
    return [Finding(what, ratio, f"at most {BOUND}", ratio <= BOUND), text_beside(compute)]


def text_beside(compute: str) -> Finding:
    """How much longer a step's loss takes with the text's next token in it."""
    from llm_streamline.forward import run_window
    from llm_streamline.objective import Part
    from llm_streamline.records import Window
    from llm_streamline.upper import Upper

    model = load(compute).requires_grad_(False)
    ids = random_blocks(model, 4)
    layers = model.config.num_hidden_layers
    passage = run_window(model, Window(start=0, stop=layers), ids)
    state = (passage.leaving.float() * 1.1).requires_grad_()
    upper = Upper(model, layers, autocast=compute == "bfloat16")
    parts = {"kl": Part("kl"), "both": Part("kl", text=0.1)}
    actions = {name: lambda part=part: upper.loss(passage, state, part).backward() for name, part in parts.items()}
    ratio = median_ratio(interleaved(actions, rounds=15), "both", "kl")
    what = f"time of kl+0.1lm / kl, with the head and their gradients, {compute}"
    return Finding(what, ratio, f"at most {TEXT_BOUND}", ratio <= TEXT_BOUND)


def peak_in_a_process(how: str, compute: str) -> int:
    command = [sys.executable, "-m", "bench.logits", how, compute]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(how: str, compute: str) -> int:
    """Bytes of the process's peak resident set after one loss and its gradient."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llm_streamline.forward import run_window
    from llm_streamline.objective import Part
    from llm_streamline.records import Window
    from llm_streamline.scoring.peak import own_peak
    from llm_streamline.upper import Upper

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)
    dtype = torch.bfloat16 if compute == "bfloat16" else torch.float32
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    passage = run_window(model, Window(start=1, stop=2), torch.arange(LENGTH)[None])
    state = (passage.leaving.float() * 1.1).requires_grad_()
    if how == "chunks":
        Upper(model, 2, autocast=compute == "bfloat16").loss(passage, state, Part("kl")).backward()
    elif how == "whole":
        plainly(model, passage, state.to(dtype)).backward()
    return own_peak()


def plainly(model, passage, state):
    """The same loss by the whole upper model on all positions, teacher and student."""
    import torch

    from llm_streamline.layerwise import Layerwise
    from llm_streamline.losses import kl

    layers = Layerwise(model)
    (flow,) = layers.enter([passage.ids])
    (above,) = [model.model.layers[2]]
    with torch.no_grad():
        teacher = layers.head(passage.ids, flow.calls[2].replay(above, passage.leaving))
    return kl(layers.head(passage.ids, flow.calls[2].replay(above, state)), teacher).mean()


if __name__ == "__main__":
    print(peak(sys.argv[1], sys.argv[2]))
