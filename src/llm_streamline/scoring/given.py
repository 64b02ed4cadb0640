"""What --tasks names -> tasks to ask: a suite, a .jsonl of our own, a task of lm-eval by name or .yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from llm_streamline.errors import UserError
from llm_streamline.files import sha256
from llm_streamline.scoring.prompts import Prompt, read_prompts
from llm_streamline.scoring.questions import Question, check_questions, encode, read_rows
from llm_streamline.scoring.suites import members
from llm_streamline.scoring.tasks import YAML, HarnessTask, open_harness
from llm_streamline.scoring.writing import check_rouge


@dataclass(frozen=True)
class Questions:
    """A .jsonl file's questions."""

    name: str
    digest: str
    questions: list[Question]


@dataclass(frozen=True)
class Prompts:
    """A .jsonl file's questions that are to be answered in writing."""

    name: str
    digest: str
    prompts: list[Prompt]


Task = Questions | Prompts | HarnessTask


def open_tasks(given: Sequence[str], limit: int | None) -> list[Task]:
    """All tasks of suites, files and names; what two suites share, once. Errors: UserError for what is no task."""
    asked = dict.fromkeys(member for name in given for member in members(name))
    return unique([task for member in asked for task in _open(member, limit)])


def _open(given: str, limit: int | None) -> Sequence[Task]:
    path = Path(given)
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise UserError(f"--tasks {given} is no file here; give a .jsonl of questions, or a task of lm-eval.")
        return [open_jsonl(path, limit)]
    if path.exists() and path.suffix not in YAML:
        raise UserError(f"--tasks {given} is no task; give a .jsonl of questions, a .yaml of lm-eval's, or a name.")
    return open_harness(given)


def open_jsonl(path: Path, limit: int | None) -> Questions | Prompts:
    """Questions with choices, or, where the first has an `answer` and no choices, to be answered in writing."""
    rows, digest = read_rows(path), sha256(path.read_bytes())
    first = rows[0][1]
    if isinstance(first, dict) and "answer" in first and "choices" not in first:
        check_rouge()
        return Prompts(path.stem, digest, read_prompts(path, rows)[:limit])
    return Questions(path.stem, digest, check_questions(path, rows)[:limit])


def check_questions_fit(tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    """Errors: UserError for a question that the tokenizer or the context cannot take."""
    for task in tasks:
        if isinstance(task, Questions):
            encode(tokenizer, task.questions, context)


class Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def unique(found: list[N]) -> list[N]:
    """The same list. Errors: UserError where two have one name, and so one file of items."""
    names = [one.name for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"two tasks or two texts are named {twice}; rename a file, or give each once.")
    return found
