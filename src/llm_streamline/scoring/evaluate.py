"""Models, tasks and texts -> an Evaluation: everything checked before weights are loaded, nothing evaluated twice."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from llm_streamline.errors import UserError
from llm_streamline.evaluation import EVALUATION, EXACT, Evaluation, ModelScore, Request, Written
from llm_streamline.files import TEMPORARY, remove_leftovers
from llm_streamline.findings import warnings
from llm_streamline.lock import LOCK, run_lock
from llm_streamline.oracle import versions
from llm_streamline.recipe import Runtime
from llm_streamline.scoring.backend import check_vllm
from llm_streamline.scoring.evaluator import Evaluator, Kept, kept_file
from llm_streamline.scoring.given import open_tasks, unique
from llm_streamline.scoring.groups import grouped
from llm_streamline.scoring.items import Tasks, read_items
from llm_streamline.scoring.prompts import bundled_openings
from llm_streamline.scoring.stability import compare_tasks
from llm_streamline.scoring.subject import Subject
from llm_streamline.scoring.suites import DEFAULT
from llm_streamline.scoring.tasks import HarnessTask
from llm_streamline.scoring.texts import read_text
from llm_streamline.scoring.writing import compare_written

OURS = {"items", "scores", EVALUATION, "report.html"}


def evaluate(request: Request, runtime: Runtime, held: ExitStack) -> Evaluation:
    """What `llm-streamline evaluate` prints and writes, in a folder that is locked until `held` ends.

    Errors: UserError, before weights are loaded where it can.
    """
    if not request.models:
        raise UserError("no MODEL was given; name a folder, a model of the Hub, or 'bundled'.")
    folder = _folder(runtime.output)
    request = _with_default(request)
    tasks = open_tasks(request.tasks, request.limit)
    if request.backend == "vllm":
        check_vllm(sum(isinstance(task, HarnessTask) for task in tasks))
    texts = unique([read_text(Path(given), request.limit) for given in request.text])
    subjects = _subjects(request, runtime)
    evaluators = [Evaluator(one, label, request, folder, runtime.quiet) for label, one in subjects.items()]
    for one in evaluators:
        one.check(tasks)
    held.enter_context(run_lock(folder))
    remove_leftovers(folder)
    found = [one.run(tasks, texts, bundled_openings() if request.samples else ()) for one in evaluators]
    dense = next((label for label, one in subjects.items() if one.name == request.against), None)
    if request.speed:
        found = with_speed(found, evaluators, dense, runtime)
    result = concluded(found, dense, folder, runtime)
    result.write(folder / EVALUATION)
    return result


def concluded(found: list[ModelScore], dense: str | None, folder: Path, runtime: Runtime) -> Evaluation:
    """The scores compared with the dense model's, and where they contradict one another."""
    plain = Evaluation(
        against=dense, models=compared(found, dense, folder), command=runtime.command, versions=versions()
    )
    return plain.model_copy(update={"warnings": warnings(plain)})


def _with_default(request: Request) -> Request:
    """The suite quick where nothing was asked for; to it belong samples and speed."""
    nothing = not (request.tasks or request.text or request.samples or request.speed)
    tasks = (DEFAULT,) if nothing else request.tasks
    quick = DEFAULT in tasks
    more = {"tasks": tasks, "samples": request.samples or quick, "speed": request.speed or quick}
    return request.model_copy(update=more)


def _folder(path: Path | None) -> Path:
    """Errors: UserError where a folder is not ours."""
    if path is None:
        raise UserError("no output folder was given; name one with -o, such as -o evaluation.")
    if path.exists():
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
        if {name for name in names if not name.startswith((TEMPORARY, LOCK))} - OURS:
            raise UserError(f"-o {path} holds other things than an evaluation; give a folder that is new or empty.")
    return path


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


def with_speed(
    found: list[ModelScore], evaluators: list[Evaluator], dense: str | None, runtime: Runtime
) -> list[ModelScore]:
    """The scores with timings and sizes, every model taking turns with the dense one."""
    first = next((one for one in evaluators if one.label == dense), None)
    measured: dict[str, Kept] = {}
    for one in evaluators:
        if one is not first or len(evaluators) == 1:
            own, of_dense = one.speed(first if one is not first else None, runtime)
            measured[one.label] = own
            if of_dense and dense:
                measured.setdefault(dense, of_dense)
    return [
        one.model_copy(update={"timings": measured[one.label].timings, "size": measured[one.label].size})
        if one.label in measured
        else one
        for one in found
    ]


def compared(found: list[ModelScore], dense: str | None, folder: Path) -> list[ModelScore]:
    """The scores, with every other model's stability and flips against the dense one's items, and with groups."""
    first = next((one for one in found if one.label == dense), None)
    done = [one if first is None or one is first else _against(first, one, folder) for one in found]
    return [one.model_copy(update={"groups": grouped(one)}) for one in done]


def _against(dense: ModelScore, one: ModelScore, folder: Path) -> ModelScore:
    both = {task.task for task in one.tasks if task.measure}
    chosen = [task.task for task in dense.tasks if task.measure and task.task in both]
    written = [task.task for task in dense.tasks if task.metric == EXACT]
    stability = compare_tasks(_items(folder, dense, chosen), _items(folder, one, chosen)) if chosen else None
    flips = [compare_written(_answers(folder, dense, task), _answers(folder, one, task)) for task in written]
    return one.model_copy(update={"stability": stability, "flips": flips or None})


def _items(folder: Path, score: ModelScore, tasks: list[str]) -> Tasks:
    files = [kept_file(folder, "items", score.label, task) for task in tasks]
    return {name: items for file in files for name, items in read_items(file).items()}


def _answers(folder: Path, score: ModelScore, task: str) -> list[Written]:
    lines = kept_file(folder, "items", score.label, task).read_text(encoding="utf-8").split("\n")
    return [Written.model_validate_json(line) for line in lines if line]
