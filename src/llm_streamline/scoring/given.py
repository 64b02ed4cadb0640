"""What --tasks names -> tasks to ask: a .jsonl of our own, a task of lm-eval by name or .yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_streamline.errors import UserError
from llm_streamline.files import sha256
from llm_streamline.scoring.questions import Question, read_questions
from llm_streamline.scoring.tasks import YAML, HarnessTask, open_harness


@dataclass(frozen=True)
class Questions:
    """A .jsonl file's questions."""

    name: str
    digest: str
    questions: list[Question]


Task = Questions | HarnessTask


def open_tasks(given: str, limit: int | None) -> Sequence[Task]:
    path = Path(given)
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise UserError(f"--tasks {given} is no file here; give a .jsonl of questions, or a task of lm-eval.")
        return [Questions(path.stem, sha256(path.read_bytes()), read_questions(path)[:limit])]
    if path.exists() and path.suffix not in YAML:
        raise UserError(f"--tasks {given} is no task; give a .jsonl of questions, a .yaml of lm-eval's, or a name.")
    return open_harness(given)
