"""One model on tasks and texts -> its ModelScore; what is kept from before, by content hash, is taken as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from scipy import stats

from llm_streamline.errors import UserError
from llm_streamline.evaluation import Interval, ModelScore, Request, TaskScore, TextScore
from llm_streamline.files import sha256, write_text
from llm_streamline.progress import say
from llm_streamline.records import Item, Record
from llm_streamline.scoring.given import Questions, Task
from llm_streamline.scoring.questions import Row, answers, encode
from llm_streamline.scoring.subject import Subject
from llm_streamline.scoring.tasks import Answers, HarnessTask, run_harness
from llm_streamline.scoring.texts import Text, score_text, stride_of
from llm_streamline.text import LARGEST_BLOCK

FORMAT = 1  # of what is kept: another number is evaluated anew


class Kept(Record):
    """A finished score, and what it was made of."""

    made_of: str
    task: TaskScore | None = None
    text: TextScore | None = None


def kept_file(folder: Path, kind: str, label: str, name: str) -> Path:
    ending = ".jsonl" if kind == "items" else ".json"
    return folder / kind / label / (name.replace("/", "-") + ending)


class Evaluator:
    """One model on all tasks and texts; what is kept from before is taken as it is."""

    def __init__(self, subject: Subject, label: str, request: Request, folder: Path, quiet: bool) -> None:
        self._subject, self._label, self._folder, self._quiet = subject, label, folder, quiet
        self._limit, self._batch = request.limit, request.batch
        block = request.block or min(LARGEST_BLOCK, subject.context)
        if block > subject.context:
            raise UserError(f"--block {block} is longer than the context of {subject.name}, {subject.context} tokens.")
        self._steps = (block, stride_of(block, request.stride))
        self._rows: dict[str, list[list[Row]]] = {}

    def check(self, tasks: Sequence[Task]) -> None:
        """Errors: UserError for a question that this model's tokenizer or context cannot take."""
        for task in tasks:
            if isinstance(task, Questions):
                self._rows[task.name] = encode(self._subject.tokenizer, task.questions, self._subject.context)

    def run(self, tasks: Sequence[Task], texts: Sequence[Text]) -> ModelScore:
        one = self._subject
        scores = [self._task(task) for task in tasks]
        predicted = [self._text(text) for text in texts]
        one.release()
        return ModelScore(
            label=self._label,
            model=one.name,
            fingerprint=one.fingerprint,
            compute=one.compute,
            tasks=scores,
            texts=predicted,
        )

    def _made_of(self, *more: object) -> str:
        one = self._subject
        parts = [FORMAT, one.fingerprint, one.tokenizer_digest, one.context, one.compute, self._limit, *more]
        return sha256(json.dumps(parts).encode())

    def _task(self, task: Task) -> TaskScore:
        made_of = self._made_of(task.digest)
        file = kept_file(self._folder, "scores", self._label, task.name)
        kept = Kept.read(file) if file.is_file() else None
        items = kept_file(self._folder, "items", self._label, task.name)
        if kept and kept.task and kept.made_of == made_of and (items.is_file() or not kept.task.measure):
            return kept.task
        say(f"{self._label}: {task.name}", self._quiet)
        score = self._asked(task) if isinstance(task, Questions) else self._harness(task)
        Kept(made_of=made_of, task=score).write(file)
        return score

    def _asked(self, task: Questions) -> TaskScore:
        rows = self._rows[task.name]
        items = answers(self._subject.model, task.questions, rows, task.name, self._batch, self._quiet)
        self._write(items)
        cut = sum(any(row.cut for row in some) for some in rows)
        if cut:
            say(
                f"{cut} of {len(rows)} questions of {task.name} are longer than the model's context of "
                f"{self._subject.context} tokens and were cut at the front",
                self._quiet,
            )
        return task_score(items).model_copy(update={"cut": cut})

    def _harness(self, task: HarnessTask) -> TaskScore:
        found = run_harness(self._subject.model, self._subject.tokenizer, task, self._limit, self._batch)
        others = {name: value for name, (value, _) in found.metrics.items()}
        if found.items:
            self._write(found.items)
            return task_score(found.items).model_copy(update={"others": others})
        return _figure(task.name, found)

    def _write(self, items: Sequence[Item]) -> None:
        lines = "".join(item.model_dump_json() + "\n" for item in items)
        write_text(kept_file(self._folder, "items", self._label, items[0].task), lines)

    def _text(self, text: Text) -> TextScore:
        made_of = self._made_of(text.digest, self._steps)
        file = kept_file(self._folder, "scores", self._label, f"text-{text.name}")
        kept = Kept.read(file) if file.is_file() else None
        if kept and kept.text and kept.made_of == made_of:
            return kept.text
        say(f"{self._label}: {text.name}", self._quiet)
        one = self._subject
        score = score_text(one.model, one.tokenizer, text, self._steps, self._batch, self._quiet)
        Kept(made_of=made_of, text=score).write(file)
        return score


def task_score(items: Sequence[Item]) -> TaskScore:
    """Accuracy by summed log-likelihood with its Wilson interval, and the share right by PPL."""
    right = sum(bool(item.likeliest_right) for item in items)
    interval = stats.binomtest(right, len(items)).proportion_ci(method="wilson")
    return TaskScore(
        task=items[0].task,
        metric="accuracy",
        value=right / len(items),
        interval=(float(interval.low), float(interval.high)),
        items=len(items),
        right_by_ppl=sum(item.right for item in items) / len(items),
        measure=items[0].measure,
        cut=None,
    )


def _figure(name: str, found: Answers) -> TaskScore:
    """The first of lm-eval's own figures, and the others by name. Errors: UserError where there is none."""
    if not found.metrics:
        raise UserError(f"task {name} gives no figure; give a task that has a metric.")
    metric, (value, error) = next(iter(found.metrics.items()))
    interval: Interval | None = None if error is None else (value - 1.96 * error, value + 1.96 * error)
    others = {key: number for key, (number, _) in found.metrics.items() if key != metric}
    return TaskScore(
        task=name,
        metric=metric,
        value=value,
        interval=interval,
        items=found.count,
        right_by_ppl=None,
        measure=None,
        cut=None,
        others=others,
    )
