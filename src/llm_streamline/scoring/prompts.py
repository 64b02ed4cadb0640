"""Prompts: JSONL questions with written answers (`id, query, answer`), bundled openings, and openings of own text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_streamline.errors import UserError

_FORM = '{"id": 0, "query": "2 + 2 =", "answer": "4"}'
_OPENINGS = Path(__file__).parent / "quick" / "prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """`answers` are the right ones, any of them; None where there is no right or wrong."""

    id: str
    text: str
    answers: tuple[str, ...] | None = None


def read_prompts(path: Path, rows: Sequence[tuple[int, Any]]) -> list[Prompt]:
    """The prompts of a file's rows, each with the number of its line. Errors: UserError, by that number."""
    known: set[str] = set()
    prompts = []
    for number, row in rows:
        prompt = _prompt(row, f"{path}, line {number},")
        if prompt.id in known:
            raise UserError(f"{path}, line {number}, has the id {prompt.id!r} again; give every question its own.")
        known.add(prompt.id)
        prompts.append(prompt)
    return prompts


def _prompt(row: Any, where: str) -> Prompt:
    row = row if isinstance(row, dict) else {}
    answers = row.get("answer")
    answers = answers if isinstance(answers, list) else [answers]
    if row.get("id") is None or not isinstance(row.get("query"), str) or not row["query"].strip():
        raise UserError(f"{where} has no id or no query; write a question such as {_FORM}.")
    if not answers or not all(isinstance(one, str) and one.strip() for one in answers):
        raise UserError(f"{where} has an answer that is empty or no text; write a question such as {_FORM}.")
    return Prompt(str(row["id"]), row["query"], tuple(answers))


def bundled_openings() -> list[Prompt]:
    """A few openings in English, of different kinds of text."""
    rows = [json.loads(line) for line in _OPENINGS.read_text(encoding="utf-8").splitlines()]
    return [Prompt(str(row["id"]), row["prompt"]) for row in rows]


def own_openings(blocks: Tensor, tokenizer: PreTrainedTokenizerBase, count: int, tokens: int) -> list[Prompt]:
    """The first tokens of `count` blocks, evenly spread over all (N, T), as text."""
    rows = [index * len(blocks) // count for index in range(min(count, len(blocks)))]
    texts = [tokenizer.decode(blocks[row, :tokens].tolist(), skip_special_tokens=True) for row in rows]
    return [Prompt(str(row), text) for row, text in zip(rows, texts, strict=True) if text.strip()]
