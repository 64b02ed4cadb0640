"""Multiple-choice questions in JSONL (`id, query, choices, gold`), answered by the likelihood of each choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_streamline.progress import progress


def read_questions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict[str, Any]],
    title: str,
    quiet: bool = False,
) -> float:
    """Share of questions whose gold choice has the highest summed log-likelihood after the query."""
    right = 0
    with progress(f"questions to {title}", len(questions), quiet) as advance:
        for question in questions:
            scores = [choice_score(model, tokenizer, question["query"], choice) for choice in question["choices"]]
            right += int(torch.tensor(scores).argmax()) == question["gold"]
            advance(1, "")
    return right / len(questions)


@torch.no_grad()
def choice_score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, query: str, choice: str) -> float:
    """Summed log-likelihood, in nats, of the choice's tokens after the query."""
    before = tokenizer(query)["input_ids"]
    ids: Tensor = tokenizer(query + choice, return_tensors="pt")["input_ids"].to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1].float()
    return float(logits.log_softmax(dim=-1).gather(1, ids[0, len(before) :, None]).sum())
