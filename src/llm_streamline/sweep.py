"""One model at several ratios: the paper's Figure 4 as a table, a record and a figure.

Every ratio is an ordinary run in a folder of its own, which `compress` makes and continues; what is the same for all of
them, the similarities and the dense model's answers, is taken from the first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from llm_streamline import checkpoint, run, sweep_figure
from llm_streamline.comparison import mean_accuracy, mean_stability, saved_of
from llm_streamline.errors import UserError
from llm_streamline.evaluation import Evaluation, Interval, ModelScore, Point, Request, Result, Sweep
from llm_streamline.families import parameter_counts
from llm_streamline.files import TEMPORARY, atomic, remove
from llm_streamline.lock import run_lock
from llm_streamline.memory import release
from llm_streamline.preview import plan_only
from llm_streamline.progress import say
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import LayerPlan, Similarity
from llm_streamline.removal import net_layers
from llm_streamline.scoring.of_run import DENSE, OWN
from llm_streamline.scoring.perplexity import FORWARD_TOKENS, next_token_loss
from llm_streamline.scoring.subject import Subject
from llm_streamline.workspace import RunFolder, Workspace, output_folder, own_contents

SWEEP, FIGURE, BESIDE = "sweep.json", "sweep.png", "beside"


def sweep(recipe: Recipe, runtime: Runtime) -> Sweep:
    """Shorten a model at each of `recipe.remove`'s ratios, in folders of `runtime.output`, which get a figure.

    Errors: UserError before anything is measured where one of them cannot be; as `compress`.
    """
    root = _folder(runtime.output)
    wanted = ratios(recipe, runtime)
    check_folders(root, wanted, runtime)
    with run_lock(root):
        for left in root.glob(f"{TEMPORARY}*"):  # of a sweep that was killed
            remove(left)
        return _swept(root, recipe, runtime, wanted)


def _swept(root: Path, recipe: Recipe, runtime: Runtime, wanted: dict[str, Recipe]) -> Sweep:
    subjects = [Subject(name, runtime) for name in runtime.beside]
    results: dict[str, Result] = {}
    for number, (ratio, one) in enumerate(wanted.items(), start=1):
        say(f"{ratio}, {number} of {len(wanted)}", runtime.quiet)
        own = runtime.model_copy(update={"output": root / f"remove-{ratio}"})
        if results:
            _hand_on(root / f"remove-{next(iter(results))}", own, one)
        results[ratio] = run.compress(one, own)
        release()
    found = _sweep(recipe, results)
    beside = [_beside(recipe, runtime, one, root, found) for one in subjects]
    found = found.model_copy(update={"beside": beside})
    found.write(root / SWEEP)
    sweep_figure.draw(found, root / FIGURE)
    return found


def plans(recipe: Recipe, runtime: Runtime) -> dict[str, LayerPlan]:
    """By ratio what would go; nothing is written. Errors: as `sweep`."""
    alone = runtime.model_copy(update={"output": None})
    return {ratio: plan_only(one, alone) for ratio, one in ratios(recipe, runtime).items()}


def ratios(recipe: Recipe, runtime: Runtime) -> dict[str, Recipe]:
    """By ratio its recipe, each net number of layers once. Errors: UserError for what cannot be removed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("sweep is one process, and several were started; start it without torchrun.")
    if recipe.window or recipe.max_params:
        raise UserError("a sweep is over ratios: give --remove 10%,20%,30%, and neither --window nor --max-params.")
    asked = [ratio.strip() for ratio in (recipe.remove or "").split(",") if ratio.strip()]
    if not asked:
        raise UserError("sweep needs the ratios to remove; give for example --remove 10%,20%,30%.")
    found: dict[int, str] = {}
    recipes: dict[str, Recipe] = {}
    for ratio in asked:
        one = recipe.model_copy(update={"remove": ratio})
        work = Workspace(one, runtime)
        run.check_all(work)
        net = net_layers(one, work.shape)
        if net in found:
            say(f"{ratio} is {net} net layers, as {found[net]} is: one run for both", runtime.quiet)
            continue
        found[net], recipes[ratio] = ratio, one
    return recipes


def check_folders(root: Path, wanted: dict[str, Recipe], runtime: Runtime) -> None:
    """Errors: UserError where one holds a run of another recipe, or one of other text that others would go on from."""
    folders = [RunFolder.open(root / f"remove-{ratio}", one, runtime.fresh) for ratio, one in wanted.items()]
    begun = [folder for folder in folders if folder.has("inputs.json")]
    if len(begun) < len(folders):
        inputs = cache(Workspace(next(iter(wanted.values())), runtime).inputs)
        for folder in begun:
            folder.check_inputs(inputs, finished=True)


def _folder(output: Path | None) -> Path:
    output = output_folder(output)
    if left := {name for name in own_contents(output) if not name.startswith("remove-")} - {SWEEP, FIGURE, BESIDE}:
        raise UserError(f"-o {output} holds {min(left)}, which is no sweep's; give a folder that is new or empty.")
    return output


def _hand_on(done: Path, runtime: Runtime, recipe: Recipe) -> None:
    """What a finished run has measured of the dense model alone, to a run of the same text that is to begin."""
    folder = RunFolder.open(runtime.output, recipe, runtime.fresh)
    if runtime.fresh or folder.has("similarity.json"):
        return
    Similarity.read(done / "similarity.json").write(folder.file("similarity.json"))
    for kept in (f"items/{DENSE}", f"scores/{DENSE}"):  # in this order: a score vouches for its items
        for file in (done / kept).glob("*"):
            with atomic(folder.path / kept / file.name) as temporary:
                shutil.copyfile(file, temporary)


def _sweep(recipe: Recipe, results: dict[str, Result]) -> Sweep:
    first = next(iter(results.values()))
    plan, dense = first.plan, first.evaluation.models[0] if first.evaluation else None
    return Sweep(
        dense=Point(
            name=recipe.model,
            layers=plan.num_layers,
            parameters=plan.parameters_before,
            share=0.0,
            nats=first.scores.dense.nats,
            stability=1.0 if dense else None,
            decode=1.0 if dense and dense.timings else None,
            **_answers(dense),
        ),
        points=[_point(ratio, result) for ratio, result in results.items()],
    )


def _point(ratio: str, result: Result) -> Point:
    plan, saved = result.plan, saved_of(result.evaluation) if result.evaluation else None
    return Point(
        name=ratio,
        layers=plan.num_layers - plan.net,
        parameters=plan.parameters_after,
        share=1 - plan.parameters_after / plan.parameters_before,
        folder=str(Path(result.model).parent),
        removed=",".join(map(str, plan.windows)),
        nats=result.scores.saved.nats,
        **_answers(saved),
        **_compared(saved),
    )


def _answers(one: ModelScore | None) -> dict[str, float | Interval | None]:
    if one is None or not one.tasks:
        return {}
    value, interval = mean_accuracy(one)
    return {"accuracy": value, "accuracy_interval": interval}


def _compared(one: ModelScore | None) -> dict[str, float | Interval | None]:
    if one is None:
        return {}
    alone = next((timing for timing in one.timings if timing.batch == 1), None)
    value, interval = mean_stability(one)
    return {"stability": value, "stability_interval": interval, "decode": alone.decode_ratio if alone else None}


def _beside(recipe: Recipe, runtime: Runtime, subject: Subject, root: Path, found: Sweep) -> Point:
    """A dense model with the same questions and text; compared with the other where their tokenizers are the same."""
    name = subject.name
    say(f"{name}, beside", runtime.quiet)
    alike = subject.tokenizer_digest == Subject(recipe.model, runtime).tokenizer_digest
    own = Path(found.points[0].folder or "") / OWN
    tasks = (*([str(own)] if own.exists() else []), *(task for task in runtime.tasks if task != run.NO_TASKS))
    evaluation: Evaluation | None = None
    if tasks and found.dense.accuracy is not None:
        request = Request(models=(name,), against=recipe.model if alike else None, tasks=tasks, speed=True)
        place = root / BESIDE / _place(name, runtime.beside)
        evaluation = run.evaluate(request, runtime.model_copy(update={"output": place}))
    work = Workspace(recipe.model_copy(update={"model": name, "remove": None, "block": None}), runtime)
    if not alike:
        say(f"{name} has another tokenizer: its loss and stability cannot be compared", runtime.quiet)
    own_loss = _loss(recipe, runtime, work) if alike else None
    parameters, layers = parameter_counts(work.skeleton)
    last = evaluation.models[-1] if evaluation else None
    return Point(
        name=name,
        layers=len(layers),
        parameters=parameters,
        share=1 - parameters / found.dense.parameters,
        nats=own_loss,
        **_answers(last),
        **_compared(last),
    )


def _place(name: str, names: Sequence[str]) -> str:
    """The model's own name, with a number where several of these share it."""
    alike = [one for one in names if Path(one).name == Path(name).name]
    return Path(name).name + (f"-{alike.index(name) + 1}" if len(alike) > 1 else "")


def _loss(recipe: Recipe, runtime: Runtime, work: Workspace) -> float:
    """On the validation part that the runs have, which depends on nothing but the text, its tokens and the seed."""
    blocks = Workspace(recipe.model_copy(update={"remove": None}), runtime).parts.validation
    blocks = blocks[:, : checkpoint.context_length(work.config)]
    batch = max(1, FORWARD_TOKENS // blocks.shape[1])
    return next_token_loss(work.model, blocks, batch, str(work.recipe.model), runtime.quiet).nats
