"""A runtime's answers held against those of transformers in float32: tokens, logits, and the tokenizer's ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm_streamline.errors import UserError
from llm_streamline.oracle import FOLDER
from llm_streamline.progress import progress
from llm_streamline.runtimes.runner import Runner
from llm_streamline.runtimes.texts import TEXTS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS, NEW_TOKENS = 20, 16


@dataclass
class Difference:
    """Of so many tokens that transformers wrote greedily, those that the runtime writes too; and how far logits are.

    `error` is the largest difference of a logit, relative to the largest logit of its prompt; `divergence` the mean
    over tokens of the KL divergence of the runtime's next-token distribution from transformers', in nats.
    """

    tokens: int = 0
    equal: int = 0
    error: float = 0.0
    divergence: float = 0.0


def prompts_of(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """Token ids to begin with: those that a shortened model was verified with, at many lengths, the full one included.

    They reach past a sliding window. A folder that has none gets twenty short texts. Errors: UserError for one that has
    no tokenizer either.
    """
    from safetensors.torch import load_file

    oracle = folder / FOLDER / "oracle.safetensors"
    if oracle.is_file():
        rows = load_file(oracle)["input_ids"].tolist()
        each = math.ceil(PROMPTS / len(rows))
        return [row[: max(1, len(row) * left // each)] for left in range(each, 0, -1) for row in rows][:PROMPTS]
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer, so that no prompt can be made for it; put its files there.")
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS[:PROMPTS]]


def compare(model: PreTrainedModel, runner: Runner, prompts: Sequence[Sequence[int]], exact: bool) -> Difference:
    """A runtime against `model`, with the prompts and what transformers writes after each.

    An `exact` one writes by itself, and what comes after the first other token counts as other. One of a lossy format
    is asked after every token of transformers what it would write, so that a near tie does not decide all that follows.
    """
    import torch

    found, positions, errors = Difference(), 0, list[torch.Tensor]()
    with progress("prompts in the other runtime", len(prompts)) as advance:
        for prompt in prompts:
            expected = greedy(model, prompt)
            whole = [*prompt, *expected[:-1]]
            reference, other = logits(model, whole), _tensor(runner, whole)
            written = runner.greedy(prompt, NEW_TOKENS) if exact else other[-NEW_TOKENS:].argmax(-1).tolist()
            same = [a == b for a, b in zip(expected, written, strict=True)]
            found.tokens += len(same)
            found.equal += [*same, False].index(False) if exact else sum(same)
            errors.append((other - reference).abs().max() / reference.abs().max())
            found.divergence += float(_divergences(reference, other).sum())
            positions += len(whole)
            advance(1)
    found.divergence /= positions
    found.error = float(torch.stack(errors).max())  # which NaN, unlike Python's, is never lost in
    return found


def greedy(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """NEW_TOKENS tokens that transformers writes after a prompt, through its cache."""
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    ids = torch.tensor([list(prompt)], device=model.device)
    with torch.no_grad():
        return list(model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist())


def logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """(T, V), float64, centred."""
    import torch

    with torch.no_grad():
        found = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0]
    return _centred(found.double().cpu())


def _tensor(runner: Runner, ids: Sequence[int]) -> torch.Tensor:
    import torch

    return _centred(torch.from_numpy(runner.logits(ids)).double())


def _centred(logits: torch.Tensor) -> torch.Tensor:
    """Around 0 at every position: what is added to all logits there says nothing, and some programs leave it out."""
    return logits - logits.mean(-1, keepdim=True)


def _divergences(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    expected, found = reference.log_softmax(-1), other.log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)
