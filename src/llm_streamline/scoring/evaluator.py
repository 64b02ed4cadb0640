"""One model on tasks and texts -> its ModelScore; what is kept from before, by content hash, is taken as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy import stats

from llm_streamline.answers import Item
from llm_streamline.errors import UserError
from llm_streamline.evaluation import EXACT, Interval, ModelScore, Request, Size, TaskScore, TextScore, Timing, Written
from llm_streamline.files import sha256, write_text
from llm_streamline.progress import say
from llm_streamline.recipe import Runtime
from llm_streamline.records import Record
from llm_streamline.scoring.backend import language_model
from llm_streamline.scoring.given import Prompts, Questions, Task
from llm_streamline.scoring.peak import process_peak
from llm_streamline.scoring.prompts import Prompt
from llm_streamline.scoring.questions import Row, answers, encode
from llm_streamline.scoring.speed import size, timings
from llm_streamline.scoring.subject import Evaluated
from llm_streamline.scoring.tasks import Answers, HarnessTask, run_harness
from llm_streamline.scoring.texts import Text, score_text, stride_of
from llm_streamline.scoring.writing import summarize, write
from llm_streamline.text import LARGEST_BLOCK

NEW = 64  # tokens that a model may write to one prompt
SAMPLES = "samples"
FORMAT = 2  # of what is kept: another number is evaluated anew
WINDOWS = 2  # the same of texts alone


class Kept(Record):
    """A finished score, and what it was made of."""

    made_of: str
    task: TaskScore | None = None
    text: TextScore | None = None
    written: tuple[Written, ...] | None = None
    timings: tuple[Timing, ...] | None = None
    size: Size | None = None


def kept_file(folder: Path, kind: str, label: str, name: str) -> Path:
    ending = ".jsonl" if kind == "items" else ".json"
    return folder / kind / label / (name.replace("/", "-") + ending)


class Evaluator:
    """One model on tasks, texts and prompts; what is kept from before is taken as it is."""

    def __init__(self, subject: Evaluated, label: str, request: Request, folder: Path, quiet: bool) -> None:
        self._subject, self.label, self._folder, self._quiet = subject, label, folder, quiet
        self._limit, self._batch, self._backend = request.limit, request.batch, request.backend
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

    def run(self, tasks: Sequence[Task], texts: Sequence[Text], prompts: Sequence[Prompt] = ()) -> ModelScore:
        """Everything but speed, for which models take turns. What the model writes to `prompts` are its samples."""
        one = self._subject
        scores = [self._task(task) for task in tasks]
        predicted = [self._text(text) for text in texts]
        samples = self._samples(prompts) if prompts else ()
        one.release()
        self.__dict__.pop("_language_model", None)  # which holds the weights too
        return ModelScore(
            label=self.label,
            model=one.name,
            fingerprint=one.fingerprint,
            compute=one.compute,
            tasks=scores,
            texts=predicted,
            written=samples,
            writing=summarize(samples) if samples else None,
        )

    def speed(self, dense: Evaluator | None, runtime: Runtime) -> tuple[Kept, Kept | None]:
        """Timings and size of this model, and of the dense one that it took turns with."""
        one, other = self._subject, dense._subject if dense else None
        made_of = self._made_of("speed", other and other.fingerprint, runtime.device, runtime.threads)
        files = [kept_file(self._folder, "scores", self.label, name) for name in ("_speed", "_speed-of-dense")]
        kept = [Kept.read(file) for file in files if file.is_file()]
        if len(kept) < 1 + bool(dense) or any(found.made_of != made_of for found in kept):
            pair = [subject for subject in (other, one) if subject]
            found = timings([subject.model for subject in pair], one.context, self.label, self._quiet)
            sizes = [self._size(subject, runtime) for subject in pair]
            kept = [
                Kept(made_of=made_of, timings=tuple(times), size=size)
                for times, size in zip(reversed(found), reversed(sizes), strict=True)
            ]
            for record, file in zip(kept, files, strict=False):
                record.write(file)
            one.release()
        return kept[0], kept[1] if dense else None

    def _size(self, subject: Evaluated, runtime: Runtime) -> Size:
        found = size(subject.model, subject.context)
        if found.peak is not None or subject.path is None:
            return found
        return found.model_copy(update={"peak": process_peak(subject.path, runtime)})

    def _made_of(self, *more: object) -> str:
        one = self._subject
        parts = [FORMAT, one.fingerprint, one.tokenizer_digest, one.context, one.compute, self._limit, *more]
        return sha256(json.dumps(parts).encode())

    def _keep(self, name: str, made_of: str, make: Callable[[], Kept]) -> Kept:
        """What was made of the same before and is whole, or else made now."""
        file = kept_file(self._folder, "scores", self.label, name)
        kept = Kept.read(file) if file.is_file() else None
        items = kept_file(self._folder, "items", self.label, name)
        if kept and kept.made_of == made_of and (items.is_file() or not (kept.task and kept.task.kept_items)):
            return kept
        say(f"{self.label}: {name.lstrip('_')}", self._quiet)
        file.unlink(missing_ok=True)  # so that no older score stands beside newer items, wherever this ends
        found = make()
        found.write(file)
        return found

    def _task(self, task: Task) -> TaskScore:
        harness = isinstance(task, HarnessTask)
        made_of = self._made_of(task.digest, *([self._backend] if harness else []))
        kept = self._keep(task.name, made_of, lambda: Kept(made_of=made_of, task=self._ask(task)))
        assert kept.task
        about = {"group": task.group, "note": task.note} if isinstance(task, HarnessTask) else {}
        return kept.task.model_copy(update={**about, "digest": task.digest})

    def _ask(self, task: Task) -> TaskScore:
        if isinstance(task, Questions):
            return self._asked(task)
        return self._answered(task) if isinstance(task, Prompts) else self._harness(task)

    def _asked(self, task: Questions) -> TaskScore:
        rows = self._rows[task.name]
        items = answers(self._subject.model, task.questions, rows, task.name, self._batch, self._quiet)
        odd = next((item.id for item in items if not all(map(math.isfinite, item.ppl))), None)
        if odd is not None:
            raise UserError(
                f"{self._subject.name} gives no number for question {odd!r} of {task.name} (NaN or infinity, in "
                f"{self._subject.compute}); mend its weights, or try --compute float32."
            )
        self._write(items)
        cut = sum(any(row.cut for row in some) for some in rows)
        if cut:
            say(
                f"{cut} of {len(rows)} questions of {task.name} are longer than the model's context of "
                f"{self._subject.context} tokens and were cut at the front",
                self._quiet,
            )
        return task_score(items).model_copy(update={"cut": cut})

    def _answered(self, task: Prompts) -> TaskScore:
        found = self._writes(task.prompts, task.name)
        self._write(found)
        return written_score(found)

    def _writes(self, prompts: Sequence[Prompt], name: str) -> list[Written]:
        one = self._subject
        longest = (one.context, min(NEW, one.context // 2))
        return write(one.model, one.tokenizer, prompts, name, longest, self._batch, self._quiet)

    def _samples(self, prompts: Sequence[Prompt]) -> tuple[Written, ...]:
        made_of = self._made_of(NEW, *(prompt.text for prompt in prompts))
        make = lambda: Kept(made_of=made_of, written=tuple(self._writes(prompts, SAMPLES)))  # noqa: E731
        return self._keep(f"_{SAMPLES}", made_of, make).written or ()

    @cached_property
    def _language_model(self) -> Any:
        return language_model(self._subject, self._backend, self._batch)

    def _harness(self, task: HarnessTask) -> TaskScore:
        found = run_harness(self._language_model, self._subject.tokenizer, task, self._limit, self._quiet)
        if found.items or found.written:
            self._write(found.items or found.written)
        return harness_score(task.name, found)

    def _write(self, items: Sequence[Item] | Sequence[Written]) -> None:
        lines = "".join(item.model_dump_json() + "\n" for item in items)
        write_text(kept_file(self._folder, "items", self.label, items[0].task), lines)

    def _text(self, text: Text) -> TextScore:
        made_of, one = self._made_of(text.digest, self._steps, WINDOWS), self._subject

        def make() -> Kept:
            score = score_text(one.model, one.tokenizer, text, self._steps, self._batch, self._quiet)
            return Kept(made_of=made_of, text=score)

        found = self._keep(f"text-{text.name}", made_of, make).text
        assert found
        return found


def written_score(found: Sequence[Written]) -> TaskScore:
    """Share of exact matches with its Wilson interval, and the means of ROUGE."""
    right = sum(bool(one.exact) for one in found)
    rouges = [one.rouge for one in found if one.rouge]
    return TaskScore(
        task=found[0].task,
        metric=EXACT,
        value=right / len(found),
        interval=_wilson(right, len(found)),
        items=len(found),
        right_by_ppl=None,
        measure=None,
        cut=None,
        others={kind: fmean(rouge[kind] for rouge in rouges) for kind in rouges[0]} if rouges else None,
        written=True,
    )


def task_score(items: Sequence[Item]) -> TaskScore:
    """Accuracy by summed log-likelihood with its Wilson interval, and the share right by PPL."""
    right = sum(bool(item.likeliest_right) for item in items)
    return TaskScore(
        task=items[0].task,
        metric="accuracy",
        value=right / len(items),
        interval=_wilson(right, len(items)),
        items=len(items),
        right_by_ppl=sum(item.right for item in items) / len(items),
        measure=items[0].measure,
        cut=None,
    )


def _wilson(right: int, count: int) -> Interval:
    interval = stats.binomtest(right, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def harness_score(name: str, found: Answers) -> TaskScore:
    """Accuracy where there are items, exact match where that is the task's first metric, else its first figure.

    lm-eval's own figures are beside it. Errors: UserError where it gives none.
    """
    if not found.metrics:
        raise UserError(f"task {name} gives no figure; give a task that has a metric.")
    others = {key: value for key, (value, _) in found.metrics.items()}
    if found.items:
        return task_score(found.items).model_copy(update={"others": others})
    metric, (value, error) = next(iter(found.metrics.items()))
    if found.written and metric.startswith("exact_match,"):
        return written_score(found.written).model_copy(update={"others": others})
    interval: Interval | None = None if error is None else (value - 1.96 * error, value + 1.96 * error)
    return TaskScore(
        task=name,
        metric=metric,
        value=value,
        interval=interval,
        items=found.count,
        right_by_ppl=None,
        measure=None,
        cut=None,
        others={key: number for key, number in others.items() if key != metric},
        written=bool(found.written),
    )
