"""Multiple-choice questions in JSONL (`id, query, choices, gold`), and a model's answers to them as items.

Two measures of each choice come out of one forward. `Item.ppl` is the mean negative log-likelihood in nats per token of
query and choice, over every token but the first, which nothing predicts: stability calls right what has the lowest.
`Item.log_likelihoods` is the summed log-likelihood of the choice given the query: accuracy, as lm-eval's `acc`, calls
right what has the highest. Texts are tokenised as lm-eval does it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_streamline.answers import Item
from llm_streamline.errors import UserError, reason
from llm_streamline.progress import progress
from llm_streamline.scoring.perplexity import token_losses

_FIELDS = ("id", "query", "choices", "gold")
_FORM = '{"id": 0, "query": "2 + 2 =", "choices": ["4", "5"], "gold": 0}'


@dataclass(frozen=True)
class Question:
    """`gold` is the number of the right choice, from 0."""

    id: str
    query: str
    choices: tuple[str, ...]
    gold: int

    def continuations(self) -> list[str]:
        """What follows the query: each choice, after a space unless one of the two brings whitespace."""
        return [choice if choice[0].isspace() or self.query[-1].isspace() else f" {choice}" for choice in self.choices]


@dataclass(frozen=True)
class Row:
    """A query and one of its choices as token ids; the last `choice` of them are the choice's, `cut` went first."""

    ids: list[int]
    choice: int
    cut: int


def read_rows(path: Path) -> list[tuple[int, Any]]:
    """The lines of a JSONL file, each with its number from 1. Errors: UserError, by that number."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also split inside of strings
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); give questions in JSONL.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [(number, json.loads(line))] if line.strip() else []
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}, is not JSON ({error.msg}); write a question such as {_FORM}."
            ) from error
    if not rows:
        raise UserError(f"{path} holds no questions; write one per line, such as {_FORM}.")
    return rows


def read_questions(path: Path) -> list[Question]:
    """Errors: UserError for the first line that holds no question, by its number."""
    return check_questions(path, read_rows(path))


def check_questions(path: Path, rows: Sequence[tuple[int, Any]]) -> list[Question]:
    """What `read_rows` found, as questions. Errors: UserError."""
    numbers: dict[str, int] = {}
    questions = []
    for number, row in rows:
        question = _question(row, f"{path}, line {number},")
        if question.id in numbers:
            raise UserError(
                f"{path}, line {number}, has the id {question.id!r} of line {numbers[question.id]}; "
                "give every question an id of its own."
            )
        numbers[question.id] = number
        questions.append(question)
    return questions


def _question(row: Any, where: str) -> Question:
    """Errors: UserError."""
    lacking = [name for name in _FIELDS if not isinstance(row, dict) or row.get(name) is None]
    if lacking:
        raise UserError(f"{where} has no {' and no '.join(lacking)}; write a question such as {_FORM}.")
    _check(row, where)
    return Question(str(row["id"]), row["query"], tuple(row["choices"]), row["gold"])


def _check(row: dict[str, Any], where: str) -> None:
    query, choices, gold = row["query"], row["choices"], row["gold"]
    if not isinstance(query, str) or not query.strip():
        raise UserError(f"{where} has a query that is no text; give the words that come before the choices.")
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{where} has fewer than two choices; give a list of two or more.")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise UserError(f"{where} has a choice that is empty or no text; write every choice out.")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise UserError(
            f"{where} has gold {gold!r} and {len(choices)} choices; give the right one's number, "
            f"0 to {len(choices) - 1}."
        )


def encode(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], longest: int) -> list[list[Row]]:
    """Per question a row per choice; what is longer than the model's context of `longest` is cut at the front.

    Errors: UserError where a choice adds no token, or is itself longer than the context.
    """
    return [[_row(tokenizer, question, text, longest) for text in question.continuations()] for question in questions]


def _row(tokenizer: PreTrainedTokenizerBase, question: Question, continuation: str, longest: int) -> Row:
    """As lm-eval tokenises: the whole text is encoded, and the choice is what the query's own encoding leaves of it."""
    query = question.query.rstrip()
    continuation = question.query[len(query) :] + continuation
    ids = _ids(tokenizer, query + continuation)
    choice = len(ids) - len(_ids(tokenizer, query))
    if not 0 < choice <= longest:
        what = f"is longer than the model's context of {longest} tokens" if choice > 0 else "adds no token to its query"
        raise UserError(f"question {question.id!r} has a choice that {what} ({continuation[:40]!r}); leave it out.")
    kept = ids[-(longest + 1) :]  # the last token is predicted, and never an input
    return Row(kept, choice, len(ids) - len(kept))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Special tokens as the tokenizer adds them, but no second first one."""
    first = tokenizer.bos_token
    return tokenizer.encode(text, add_special_tokens=not (first and text.startswith(first)), verbose=False)


def answers(
    model: PreTrainedModel,
    questions: Sequence[Question],
    rows: Sequence[Sequence[Row]],
    task: str,
    batch: int | None = None,
    quiet: bool = False,
) -> list[Item]:
    """The model's items for questions that `encode` has encoded. `batch` is in rows; it changes no number."""
    flat = [row for some in rows for row in some]
    with progress(f"questions of {task}", len(flat), quiet) as advance:
        losses = iter(token_losses(model, [row.ids for row in flat], batch, lambda done: advance(done, "choices")))
    return [
        item_of(question, some, list(islice(losses, len(some))), task)
        for question, some in zip(questions, rows, strict=True)
    ]


def item_of(question: Question, rows: Sequence[Row], losses: Sequence[Tensor], task: str) -> Item:
    """From each choice's row the losses of all its tokens but the first, in nats."""
    ppl = [float(loss.double().mean()) for loss in losses]
    return Item(
        task=task,
        id=question.id,
        measure="whole",
        ppl=ppl,
        prediction=str(min(range(len(ppl)), key=ppl.__getitem__)),
        gold=str(question.gold),
        log_likelihoods=[-float(loss[-row.choice :].double().sum()) for loss, row in zip(losses, rows, strict=True)],
        choice_bytes=[len(text.encode()) for text in question.continuations()],
    )
