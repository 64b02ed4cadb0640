"""Models, tasks and texts -> an Evaluation: everything checked before weights are loaded, nothing evaluated twice."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from llm_streamline.errors import UserError
from llm_streamline.evaluation import Evaluation, ModelScore, Request
from llm_streamline.files import TEMPORARY, remove_leftovers
from llm_streamline.recipe import Runtime
from llm_streamline.scoring.evaluator import Evaluator, kept_file
from llm_streamline.scoring.given import Task, open_tasks
from llm_streamline.scoring.items import Tasks, read_items
from llm_streamline.scoring.stability import compare_tasks
from llm_streamline.scoring.subject import Subject
from llm_streamline.scoring.texts import Text, read_text

OURS = {"items", "scores", "evaluation.json"}


def evaluate(request: Request, runtime: Runtime) -> Evaluation:
    """What `llm-streamline evaluate` prints and writes. Errors: UserError, before weights are loaded where it can."""
    folder = _folder(runtime.output)
    tasks = _unique([task for given in request.tasks for task in open_tasks(given, request.limit)])
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


N = TypeVar("N", Task, Text)


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
    files = [kept_file(folder, "items", score.label, task.task) for task in score.tasks if task.measure]
    return {name: items for file in files for name, items in read_items(file).items()}
