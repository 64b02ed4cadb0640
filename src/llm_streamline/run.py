"""The pipeline: stages in order, done stages skipped. `compress` is the table of contents of the package."""

from __future__ import annotations

import gc
import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_streamline import checkpoint, figures, memory
from llm_streamline.analyze import analyze
from llm_streamline.assemble import Parts as ModelParts
from llm_streamline.assemble import assemble
from llm_streamline.cache import Cached, StateCache, cache_bytes
from llm_streamline.card import CARD, is_licence, origin, source_files, write_card
from llm_streamline.choose import check_request, choose
from llm_streamline.comparison import CUT, SAVED
from llm_streamline.errors import Dismissed, UserError
from llm_streamline.evaluation import EVALUATION, Evaluation, Request, Result
from llm_streamline.files import atomic, free_space, remove, sha256
from llm_streamline.forward import substituted
from llm_streamline.lock import run_lock
from llm_streamline.oracle import MANIFEST, versions
from llm_streamline.page import PAGE, write_evaluation_report, write_report
from llm_streamline.parallel import World
from llm_streamline.passages import Passages, passages_of
from llm_streamline.progress import say
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import Fit, Inputs, LayerPlan, Manifest, Scores, Similarity, Verification
from llm_streamline.replacement import ReplacementLayers
from llm_streamline.scoring.evaluate import evaluate as evaluate_request
from llm_streamline.scoring.given import Task, check_questions_fit, open_tasks
from llm_streamline.scoring.of_run import DENSE, OWN, Standing, evaluate_run, own_questions
from llm_streamline.scoring.perplexity import FORWARD_TOKENS as LOSS_TOKENS
from llm_streamline.scoring.perplexity import next_token_loss
from llm_streamline.snapshot import Snapshot
from llm_streamline.text import shuffled
from llm_streamline.tracking import check_tracker, tracking
from llm_streamline.train import Settings, Trainer, rates
from llm_streamline.workspace import RunFolder, Workspace, output_folder

NO_TASKS = "none"
CACHE = "cache"  # states for later epochs
SNAPSHOT = "checkpoint.safetensors"  # the state of a training that has not come to its end


def compress(recipe: Recipe, runtime: Runtime | None = None) -> Result:
    """Find the redundant layers, remove them, train their replacement, write a verified HuggingFace folder.

    Returns what lies in `runtime.output`. Errors: UserError before anything is written where the recipe cannot be
    followed, or another run holds the folder; VerificationError where the result does not compute what it should;
    Dismissed in every process but the first once it has helped to train.
    """
    runtime = runtime or Runtime()
    with ExitStack() as held:
        with World.opened(runtime.worker_timeout) as world:
            work = Workspace(recipe, runtime, world)
            begun = world.alone(lambda: begin(work, held))
            folder, tasks = begun or (RunFolder(Path(), recipe, world=world), [])
            similarity = folder.stage("similarity.json", Similarity, lambda: measure(work))
            folder.stage("inputs.json", Inputs, lambda: world.led(work.inputs))
            plan = folder.stage("plan.json", LayerPlan, lambda: world.led(lambda: decide(work, similarity)))
            say(describe(plan), work.runtime.quiet)
            world.alone(lambda: draw_choice(similarity, plan, folder))
            fit = train_replacement(work, plan, folder)
        if not world.first:
            raise Dismissed
        return finish(work, folder, tasks, similarity, plan, fit)


def begin(work: Workspace, held: ExitStack) -> tuple[RunFolder, list[Task]]:
    """The run folder, locked until `held` ends, and what will be asked in the end; all that can be is refused first.

    Errors: UserError, with nothing written or deleted.
    """
    recipe, runtime = work.recipe, work.runtime
    held.enter_context(run_lock(output_folder(runtime.output)))
    folder = RunFolder.open(runtime.output, recipe, runtime.fresh, work.world)
    check_all(work)
    folder.check_inputs(work.inputs)
    tasks = tasks_to_ask(work)
    folder.begin()
    return folder, tasks


def finish(
    work: Workspace, folder: RunFolder, tasks: list[Task], similarity: Similarity, plan: LayerPlan, fit: Fit | None
) -> Result:
    """What the first process does alone, once all have measured and trained."""
    gc.collect()  # the optimizer is part of a cycle, and its moments are as large as the replacement twice
    memory.trim()
    verification = assemble_model(work, plan, fit, similarity, folder)
    scores = folder.stage("scores.json", Scores, lambda: score(work, plan, folder))
    evaluation, news = evaluate_models(work, plan, tasks, folder)
    publish_scores(scores, evaluation, folder, news)
    if news or not folder.has(PAGE):
        write_report(folder.path)
    places = {"model": str(folder.path / "model"), "report": str(folder.path / PAGE)}
    return Result(plan=plan, fit=fit, scores=scores, verification=verification, evaluation=evaluation, **places)


def evaluate(request: Request, runtime: Runtime) -> Evaluation:
    """What models keep of the dense one, with every answer and a page in `runtime.output`.

    Errors: UserError, before weights are loaded where it can.
    """
    found = evaluate_request(request, runtime)
    assert runtime.output
    write_evaluation_report(runtime.output)
    return found


def decide(work: Workspace, similarity: Similarity) -> LayerPlan:
    """Stage 2: the window. Errors: UserError where its first layers cannot give what is to stand in."""
    plan = choose(similarity, work.shape, work.recipe)
    work.check_replacement([plan.window.start])
    return plan


def check_all(work: Workspace) -> None:
    """Refuse, before anything is measured, what cannot be done. Errors: UserError."""
    work.check_replacement(check_request(work.shape, work.recipe))
    rates(work.recipe, work.config.hidden_size)
    check_tracker(work.runtime.tracker)
    if work.runtime.cache and (work.recipe.epochs == 1 or work.world.size > 1):
        raise UserError("--cache is for several epochs in one process; give --epochs 2 or more, or leave it out.")
    work.estimate.check(free_space(work.runtime.output))


def describe(plan: LayerPlan) -> str:
    fewer = 1 - plan.parameters_after / plan.parameters_before
    lines = [
        f"{plan}: {plan.why}",
        f"parameters {plan.parameters_before:,} -> {plan.parameters_after:,} ({fewer:.1%} fewer)",
    ]
    if plan.replace == "mlp":
        lines.append("the mlp's attention is silent but stays: on disk, in compute and in the KV cache it is a layer")
    if plan.custom_code:
        lines.append("the model will carry code of its own and load only with trust_remote_code=True")
    return "\n".join(lines)


def measure(work: Workspace) -> Similarity:
    """Stage 1: the similarity of every window on the calibration part."""
    work.share()  # before the model is read, so that unusable text is refused first
    model, scratch = work.world.attempt(lambda: (work.model, work.scratch if work.offloads else None))
    calibration, batch = work.parts.calibration, work.batch(memory.FORWARD_TOKENS)
    return analyze(model, calibration, batch, quiet=work.runtime.quiet, scratch=scratch, world=work.world)


def draw_choice(similarity: Similarity, plan: LayerPlan, folder: RunFolder) -> None:
    if not folder.has("similarity.png"):
        figures.draw_similarity(similarity, folder.file("similarity.png"), plan.window)
    if not folder.has("heat-map.png"):
        figures.draw_heat_map(similarity, folder.file("heat-map.png"), plan.window)


def train_replacement(work: Workspace, plan: LayerPlan, folder: RunFolder) -> Fit | None:
    """Stage 3: `replacement/` with the trained weights, their Fit and its figure; None where nothing is trained."""
    if not plan.occupied:
        return None
    world = work.world
    snapshot = Snapshot(folder.path / SNAPSHOT, work.runtime.checkpoint_every, world=world)
    if fit := world.led(lambda: trained_before(folder, snapshot)):
        return fit
    work.share()
    training = torch.cat([shuffled(work.parts.training, seed) for seed in epoch_seeds(work.recipe)])
    replacement = world.attempt(lambda: work.replacement(work.model, plan.replaced()).to(work.device))
    replacement.load_state_dict(world.led(replacement.state_dict))  # that another machine may round otherwise
    settings = world.led(lambda: settings_of(work, training).continued(snapshot))
    steps = -(-len(training) // (settings.batch * settings.accumulate))
    say(
        f"training on {training.numel():,} tokens: {steps} steps of {settings.batch * settings.accumulate} sequences "
        f"of {training.shape[1]} tokens, learning rate {settings.lr:g} to {settings.min_lr:g}",
        work.runtime.quiet,
    )
    with tracking(work) as track:
        trainer = Trainer(work.model, plan.window, replacement, settings, work.runtime.quiet, track, snapshot)
        trainer.source, trainer.world = source_of(work, plan, settings, folder), world
        fit = trainer.fit(training, work.parts.validation)
    if world.first:
        keep_replacement(replacement, fit, folder)
        forget_training(folder, snapshot)
    return fit


def forget_training(folder: RunFolder, snapshot: Snapshot) -> None:
    """Delete what only a training that has not come to its end needs."""
    snapshot.remove()
    remove(folder.path / CACHE)


def epoch_seeds(recipe: Recipe) -> list[int]:
    return [recipe.seed + epoch for epoch in range(recipe.epochs)]


def source_of(work: Workspace, plan: LayerPlan, settings: Settings, folder: RunFolder) -> Passages | None:
    """States from the disk for later epochs, where a cache was asked for and is large enough to hold them."""
    limit, blocks = work.runtime.cache, work.parts.training
    if limit is None:
        return None
    size = cache_bytes(blocks, work.config.hidden_size, work.compute_dtype)
    if size > limit:
        say(f"no cache: its {size / 1e9:.3g} GB are more than --cache {limit / 1e9:.3g} GB", work.runtime.quiet)
        return None
    say(f"states are kept in {folder.path / CACHE} for later epochs: {size / 1e9:.3g} GB", work.runtime.quiet)
    owner = sha256(work.inputs().model_dump_json().encode(), str(plan.window).encode(), work.compute.encode())
    cache = StateCache(folder.path / CACHE, owner, blocks, work.config.hidden_size, work.compute_dtype)
    stream = passages_of(work.model, plan.window, settings.autocast)
    return Cached(work.model, plan.window, stream, cache, work.runtime.quiet)


def settings_of(work: Workspace, training: Tensor) -> Settings:
    return Settings.resolve(work.recipe, training, work.config.hidden_size, work.memory, work.bfloat16)


def trained_before(folder: RunFolder, snapshot: Snapshot) -> Fit | None:
    if not folder.has("replacement"):
        return None
    forget_training(folder, snapshot)  # where a run was killed in just this place
    return Fit.read(folder.file("replacement/fit.json"))


def keep_replacement(replacement: ReplacementLayers, fit: Fit, folder: RunFolder) -> None:
    with atomic(folder.file("replacement")) as temporary:
        temporary.mkdir()
        save_file(replacement.state_dict(), temporary / "replacement.safetensors")
        figures.draw_training(fit, temporary / "training.png")
        fit.write(temporary / "fit.json")


def assemble_model(
    work: Workspace, plan: LayerPlan, fit: Fit | None, similarity: Similarity, folder: RunFolder
) -> Verification:
    """Stage 4: `model/`, which appears only when verified."""
    target = folder.file("model")
    if folder.has("model"):
        verification = Manifest.read(target / MANIFEST).verification
        assert verification is not None  # written before the folder got its name
        return verification
    say("assembling and verifying in a fresh process", work.runtime.quiet)
    source = work.model_as_saved()
    replacement = load_replacement(work, plan, folder) if plan.occupied else ReplacementLayers()
    files = source_files(work.source.path)
    licences = [file for file in files if is_licence(file)]
    parts = ModelParts(source, plan, replacement, work.tokenizer, licences, work.ram - memory.held())
    manifest = Manifest(
        command=work.runtime.command,
        recipe=work.recipe.model_dump(mode="json", exclude_none=True),
        plan=plan,
        layer_map=plan.layer_map(),
        tensors={},
        fit=fit,
        data=work.parts.summary(),
        layer_similarities=similarity.of_layers(),
        versions=versions(),
        origin=origin(work.source.path, files),
    )
    return assemble(parts, work.dtype, work.parts.validation, manifest, target)


def load_replacement(work: Workspace, plan: LayerPlan, folder: RunFolder) -> ReplacementLayers:
    replacement = work.replacement(work.model, plan.replaced()).cpu()
    replacement.load_state_dict(load_file(folder.file("replacement/replacement.safetensors")))
    return replacement.requires_grad_(False)


def score(work: Workspace, plan: LayerPlan, folder: RunFolder) -> Scores:
    """Stage 5: held-out loss of the source, of the source cut to the same depth, and of the saved, cast model."""
    blocks, batch, quiet = work.parts.validation, work.batch(LOSS_TOKENS), work.runtime.quiet
    dense = next_token_loss(work.model, blocks, batch, "the dense model", quiet)
    with substituted(work.model, plan.plain_window):
        cut = next_token_loss(work.model, blocks, batch, "the merely cut model", quiet)
    saved_model = work.load_saved(folder.path / "model", plan.custom_code)
    saved = next_token_loss(saved_model, blocks, batch, "the saved model", quiet)
    return Scores(dense=dense, cut=cut, saved=saved)


def tasks_to_ask(work: Workspace) -> list[Task]:
    """What is asked in the end, besides questions of the run's own text. Errors: UserError."""
    given = tasks_given(work)
    if NO_TASKS in given and len(set(given)) > 1:
        raise UserError("--tasks none was given together with other tasks; give either.")
    tasks = open_tasks([name for name in given if name != NO_TASKS], None)
    check_questions_fit(tasks, work.tokenizer, checkpoint.context_length(work.config))
    if any(task.name == Path(OWN).stem for task in tasks):
        raise UserError(f"--tasks names a task {Path(OWN).stem}, as the run's own questions are; rename the file.")
    return tasks


def tasks_given(work: Workspace) -> tuple[str, ...]:
    """What was asked for; nothing, where nothing was said and each question would read the model from the disk."""
    return (NO_TASKS,) if work.offloads and "tasks" not in work.runtime.model_fields_set else work.runtime.tasks


def evaluate_models(
    work: Workspace, plan: LayerPlan, tasks: list[Task], folder: RunFolder
) -> tuple[Evaluation | None, bool]:
    """Stage 6: the models' answers, writing and speed, and whether there is any news in them.

    None where nothing was to be asked; what an earlier run has asked is not asked again.
    """
    if NO_TASKS in tasks_given(work):
        return None, False
    if folder.has(EVALUATION):
        kept = Evaluation.read(folder.path / EVALUATION)
        if {task.name for task in tasks} <= {task.task for task in kept.models[0].tasks}:
            return kept, False
    blocks = work.parts.validation
    own = own_questions(blocks, work.tokenizer, work.recipe.seed, folder.path)
    found = evaluate_run(standings(work, plan, folder), [*own, *tasks], blocks, folder.path, work.runtime)
    found.write(folder.path / EVALUATION)
    return found, True


def standings(work: Workspace, plan: LayerPlan, folder: RunFolder) -> dict[str, Standing]:
    """The dense model, the same with its window left out unless that is what was saved, and the saved one."""
    target = folder.path / "model"
    dense = checkpoint.fingerprint(work.source)
    saved = sha256(json.dumps(Manifest.read(target / MANIFEST).weights).encode())
    common = (work.compute, checkpoint.context_length(work.config), work.tokenizer)
    found = {DENSE: Standing(work.recipe.model, dense, *common, lambda: work.model)}
    if plan.occupied:
        cut = sha256(dense.encode(), str(plan.plain_window).encode())
        without = lambda: substituted(work.model, plan.plain_window)  # noqa: E731
        name = f"{work.recipe.model} without {plan.plain_window}"
        found[CUT] = Standing(name, cut, *common, lambda: work.model, without)
    found[SAVED] = Standing(str(target), saved, *common, lambda: work.load_saved(target, plan.custom_code))
    return found


def publish_scores(scores: Scores, evaluation: Evaluation | None, folder: RunFolder, news: bool) -> None:
    """Into the model's card and manifest, each replaced as a whole.

    The manifest goes last: where it has the scores, the card has them too, however a run ended.
    """
    model = folder.path / "model"
    manifest = Manifest.read(model / MANIFEST)
    if news or manifest.scores != scores or not (model / CARD).exists():
        manifest = manifest.model_copy(update={"scores": scores})
        write_card(manifest, model, evaluation)
        manifest.write(model / MANIFEST)
