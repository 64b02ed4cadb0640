"""Multiple-choice questions in JSONL (`id, query, choices, gold`), answered by the likelihood of each choice."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_streamline.progress import progress

AT_ONCE = 8  # questions per forward


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
        for first in range(0, len(questions), AT_ONCE):
            some = questions[first : first + AT_ONCE]
            pairs = [(question["query"], choice) for question in some for choice in question["choices"]]
            scores = iter(choice_scores(model, tokenizer, pairs))
            for question in some:
                answers = list(islice(scores, len(question["choices"])))
                right += answers.index(max(answers)) == question["gold"]
            advance(len(some))
    return right / len(questions)


@torch.no_grad()
def choice_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]
) -> list[float]:
    """Summed log-likelihood, in nats, of each choice's tokens after its query.

    Sequences are padded on the right, where a causal model does not look.
    """
    rows = [tokenizer(query + choice)["input_ids"] for query, choice in pairs]
    starts = [len(tokenizer(query)["input_ids"]) for query, _ in pairs]
    padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(model.device)
    log_p = model(input_ids=padded, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)
    picked = log_p.gather(2, padded[:, 1:, None])[:, :, 0]
    return [
        float(scores[start - 1 : len(row) - 1].sum()) for scores, start, row in zip(picked, starts, rows, strict=True)
    ]
