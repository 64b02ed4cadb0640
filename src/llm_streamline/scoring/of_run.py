"""The last look at a run: the dense, the merely cut and the saved model are asked, let write and timed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_streamline.evaluation import Evaluation, Request
from llm_streamline.files import write_text
from llm_streamline.recipe import Runtime
from llm_streamline.scoring.continuations import continuation_questions
from llm_streamline.scoring.evaluate import concluded, with_speed
from llm_streamline.scoring.evaluator import Evaluator
from llm_streamline.scoring.given import Task, open_jsonl
from llm_streamline.scoring.prompts import own_openings
from llm_streamline.scoring.subject import digest

DENSE = "dense"
OWN = "own-text.jsonl"
SAMPLES, OPENING = 12, 32  # samples, and tokens of each opening


@dataclass
class Standing:
    """A model of the run, as `Evaluated` has it; `during` is what has to hold while it is used."""

    name: str
    fingerprint: str
    compute: str
    context: int
    tokenizer: PreTrainedTokenizerBase
    load: Callable[[], PreTrainedModel]
    during: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    path: str | None = None
    only_asked: bool = False  # and neither let write nor timed

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.load()

    @cached_property
    def tokenizer_digest(self) -> str:
        return digest(self.tokenizer)

    def release(self) -> None:
        """Nothing: the run keeps its models."""


def own_questions(blocks: Tensor, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path) -> list[Task]:
    """Questions from the run's validation blocks, kept in own-text.jsonl for later models; none where text is short."""
    questions = continuation_questions(blocks, tokenizer, seed)
    if not questions:
        return []
    rows = [{"id": one.id, "query": one.query, "choices": one.choices, "gold": one.gold} for one in questions]
    write_text(folder / OWN, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return [open_jsonl(folder / OWN, None)]


def evaluate_run(
    standings: dict[str, Standing], tasks: Sequence[Task], blocks: Tensor, folder: Path, runtime: Runtime
) -> Evaluation:
    """The evaluation of a run's models; the dense one is the first of them. `blocks` give the openings of samples."""
    dense = standings[DENSE]
    request = Request(models=tuple(standings), against=DENSE)
    evaluators = {label: Evaluator(one, label, request, folder, runtime.quiet) for label, one in standings.items()}
    openings = own_openings(blocks, dense.tokenizer, SAMPLES, min(OPENING, blocks.shape[1] // 2))
    whole = [label for label, one in standings.items() if not one.only_asked]
    found = []
    for label, one in evaluators.items():
        one.check(tasks)
        with standings[label].during():
            found.append(one.run(tasks, (), openings if label in whole else ()))
    timed = [evaluators[label] for label in whole]
    found = with_speed(found, timed, DENSE, runtime)
    return concluded(found, DENSE, folder, runtime)
