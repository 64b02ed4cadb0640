"""Models, tasks and texts -> an Evaluation: everything checked before weights are loaded, nothing evaluated twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from scipy import stats

from llm_streamline.errors import UserError
from llm_streamline.evaluation import Evaluation, Interval, ModelScore, Request, TaskScore, TextScore
from llm_streamline.files import TEMPORARY, remove_leftovers, sha256, write_text
from llm_streamline.progress import say
from llm_streamline.recipe import Runtime
from llm_streamline.records import Item, Record
from llm_streamline.scoring.items import Tasks, read_items
from llm_streamline.scoring.questions import Question, Row, answers, encode, read_questions
from llm_streamline.scoring.stability import compare_tasks
from llm_streamline.scoring.subject import Subject
from llm_streamline.scoring.tasks import YAML, Answers, HarnessTask, open_harness, run_harness
from llm_streamline.scoring.texts import Text, read_text, score_text, stride_of
from llm_streamline.text import LARGEST_BLOCK

OURS = {"items", "scores", "evaluation.json"}
FORMAT = 1  # of what is kept: another number is evaluated anew


@dataclass(frozen=True)
class Questions:
    """A .jsonl file's questions."""

    name: str
    digest: str
    questions: list[Question]


Task = Questions | HarnessTask


class Kept(Record):
    """A finished score, and what it was made of."""

    made_of: str
    task: TaskScore | None = None
    text: TextScore | None = None


def evaluate(request: Request, runtime: Runtime) -> Evaluation:
    """What `llm-streamline evaluate` prints and writes. Errors: UserError, before weights are loaded where it can."""
    folder = _folder(runtime.output)
    tasks = _unique([task for given in request.tasks for task in _open(given, request.limit)])
    texts = _unique([read_text(Path(given), request.limit) for given in request.text])
    if not request.models or not (tasks or texts):
        what = "MODEL" if not request.models else "--tasks and no --text"
        raise UserError(f"no {what} was given; name a model, and questions with --tasks or a text with --text.")
    subjects = _subjects(request, runtime)
    evaluators = [Evaluator(one, label, request, folder, runtime.quiet) for label, one in subjects.items()]
    for one in evaluators:
        one.check(tasks)
    remove_leftovers(folder)
    found = [one.run(tasks, texts) for one in evaluators]
    dense = next((label for label, one in subjects.items() if one.name == request.against), None)
    result = Evaluation(against=dense, models=_compared(found, dense, folder))
    result.write(folder / "evaluation.json")
    return result


def _folder(path: Path | None) -> Path:
    """Errors: UserError where a folder is not ours."""
    if path is None:
        raise UserError("no output folder was given; name one with -o, such as -o evaluation.")
    if path.exists():
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
        if {name for name in names if not name.startswith(TEMPORARY)} - OURS:
            raise UserError(f"-o {path} holds other things than an evaluation; give a folder that is new or empty.")
    return path


def _open(given: str, limit: int | None) -> Sequence[Task]:
    path = Path(given)
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise UserError(f"--tasks {given} is no file here; give a .jsonl of questions, or a task of lm-eval.")
        return [Questions(path.stem, sha256(path.read_bytes()), read_questions(path)[:limit])]
    if path.exists() and path.suffix not in YAML:
        raise UserError(f"--tasks {given} is no task; give a .jsonl of questions, a .yaml of lm-eval's, or a name.")
    return open_harness(given)


N = TypeVar("N", Questions | HarnessTask, Text)


def _unique(found: list[N]) -> list[N]:
    names = [one.name for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"two tasks or two texts are named {twice}; rename a file, or give each once.")
    return found


def _subjects(request: Request, runtime: Runtime) -> dict[str, Subject]:
    """The models by label, the dense one first. Errors: UserError for one that cannot be used or compared."""
    names = list(dict.fromkeys([*([request.against] if request.against else []), *request.models]))
    subjects = [Subject(name, runtime) for name in names]
    if request.against:
        other = next((one for one in subjects if one.tokenizer_digest != subjects[0].tokenizer_digest), None)
        if other:
            raise UserError(
                f"{other.name} has another tokenizer than {request.against}, so that their PPL cannot be compared; "
                "give the model that it was made from, or leave out --against."
            )
    labels = [one.label for one in subjects]
    full = [
        label if labels.count(label) == 1 else f"{label}-{one.fingerprint[:8]}"
        for label, one in zip(labels, subjects, strict=True)
    ]
    if len(set(full)) < len(full):
        raise UserError(f"two of the models are the same ({', '.join(names)}); give each once.")
    return dict(zip(full, subjects, strict=True))


def _compared(found: list[ModelScore], dense: str | None, folder: Path) -> list[ModelScore]:
    """The scores, with every other model's stability against the dense one's items."""
    if dense is None or not any(task.measure for task in found[0].tasks):
        return found
    before = _items(folder, found[0])
    after = {one.label: compare_tasks(before, _items(folder, one)) for one in found if one.label != dense}
    return [one.model_copy(update={"stability": after.get(one.label)}) for one in found]


def _items(folder: Path, score: ModelScore) -> Tasks:
    files = [_file(folder, "items", score.label, task.task) for task in score.tasks if task.measure]
    return {name: items for file in files for name, items in read_items(file).items()}


def _file(folder: Path, kind: str, label: str, name: str) -> Path:
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
        file = _file(self._folder, "scores", self._label, task.name)
        kept = Kept.read(file) if file.is_file() else None
        items = _file(self._folder, "items", self._label, task.name)
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
        write_text(_file(self._folder, "items", self._label, items[0].task), lines)

    def _text(self, text: Text) -> TextScore:
        made_of = self._made_of(text.digest, self._steps)
        file = _file(self._folder, "scores", self._label, f"text-{text.name}")
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
