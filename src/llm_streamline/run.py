"""The pipeline: stages in order, done stages skipped. `compress` is the table of contents of the package."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from llm_streamline import checkpoint, figures, fingerprints, memory
from llm_streamline.analyze import analyze
from llm_streamline.assemble import Parts as ModelParts
from llm_streamline.assemble import assemble
from llm_streamline.card import CARD, is_licence, origin, source_files, write_card
from llm_streamline.chain import check_asked, check_then, kinds, links, make_lighter, standing
from llm_streamline.comparison import CUT, SAVED
from llm_streamline.conflicts import without_effect
from llm_streamline.errors import Dismissed, UserError
from llm_streamline.evaluation import CHAIN, EVALUATION, Chain, Evaluation, Lighter, ModelScore, Request, Result
from llm_streamline.files import free_space, sha256
from llm_streamline.forward import substituted
from llm_streamline.healing import check_healing, check_heals, heal, load_healed
from llm_streamline.lock import run_lock
from llm_streamline.oracle import MANIFEST, versions
from llm_streamline.page import PAGE, write_evaluation_report, write_report
from llm_streamline.parallel import World
from llm_streamline.progress import say
from llm_streamline.quantities import counted
from llm_streamline.ranking import RANKING, By, Ranking, ranking_in
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.recipe_file import as_values
from llm_streamline.records import Fit, Fitted, Inputs, LayerPlan, Manifest, Scores, Similarity, Verification, runs_of
from llm_streamline.removal import check_request
from llm_streamline.rounds import settle
from llm_streamline.scoring.evaluate import evaluate as evaluate_request
from llm_streamline.scoring.given import Task, check_questions_fit, open_tasks
from llm_streamline.scoring.of_run import DENSE, OWN, Standing, evaluate_run, own_questions
from llm_streamline.scoring.perplexity import FORWARD_TOKENS as LOSS_TOKENS
from llm_streamline.scoring.perplexity import next_token_loss
from llm_streamline.selection import deciding, ranked, surveyed
from llm_streamline.tracking import check_tracker
from llm_streamline.training import check_training, earlier_fits, load_replacement, train_replacement
from llm_streamline.workspace import RunFolder, Workspace, output_folder

NO_TASKS = "none"
FEWEST = 4  # sequences that can be halved and still be several


class Trained(NamedTuple):
    """The plan, and what the trainings that it asked for did."""

    plan: LayerPlan
    fit: Fitted
    healing: Fit | None


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
            similarity = folder.stage("similarity.json", Similarity, lambda: measured_into(folder, work))
            folder.stage("inputs.json", Inputs, lambda: world.led(work.inputs))
            plan = folder.stage("plan.json", LayerPlan, lambda: settle(work, similarity, folder))
            check_heals(recipe.heal, plan)
            say(describe(plan), work.runtime.quiet)
            world.alone(lambda: draw_choice(similarity, plan, folder))
            fit = train_replacement(work, plan, folder)
            healing = heal(work, plan, folder)
        if not world.first:
            raise Dismissed
        return finish(work, folder, tasks, similarity, Trained(plan, fit, healing))


def begin(work: Workspace, held: ExitStack) -> tuple[RunFolder, list[Task]]:
    """The run folder, locked until `held` ends, and what will be asked in the end; all that can be is refused first.

    Errors: UserError, with nothing written or deleted.
    """
    recipe, runtime = work.recipe, work.runtime
    held.enter_context(run_lock(output_folder(runtime.output)))
    held.callback(work.let_go)
    folder = RunFolder.open(runtime.output, recipe, runtime.fresh, work.world)
    check_all(work)
    folder.check_inputs(work.inputs)
    tasks = tasks_to_ask(work)
    check_asked(tasks, kinds(runtime.then, folder, afresh=runtime.fresh))
    folder.begin()
    return folder, tasks


def finish(work: Workspace, folder: RunFolder, tasks: list[Task], similarity: Similarity, trained: Trained) -> Result:
    """What the first process does alone, once all have measured and trained."""
    memory.release()
    plan = trained.plan
    verification = assemble_model(work, trained, similarity, folder)
    memory.release()
    scores = folder.stage("scores.json", Scores, lambda: score(work, plan, folder))
    lighter = make_lighter(work, folder, scores)
    evaluation, news = evaluate_models(work, plan, tasks, folder, lighter)
    publish_scores(scores, evaluation, folder, news)
    chain, changed = chained(work, scores, lighter, evaluation, folder)
    if news or changed or not folder.has(PAGE):
        write_report(folder.path)
    places = {"model": str(folder.path / "model"), "report": str(folder.path / PAGE)}
    found = {"scores": scores, "verification": verification, "evaluation": evaluation}
    fits = {"fit": trained.fit, "earlier": earlier_fits(work, folder), "healing": trained.healing}
    return Result(plan=plan, **fits, **found, **places, chain=chain)


def chained(
    work: Workspace, scores: Scores, lighter: list[Lighter], evaluation: Evaluation | None, folder: RunFolder
) -> tuple[Chain | None, bool]:
    """Where a lighter model was asked for, what is then in chain.json, and whether that is news."""
    if not lighter:
        return None, False
    chain = Chain(links=links(work, scores, lighter, evaluation, folder.path))
    if folder.has(CHAIN) and Chain.read(folder.path / CHAIN) == chain:
        return chain, False
    chain.write(folder.file(CHAIN))
    return chain, True


def evaluate(request: Request, runtime: Runtime) -> Evaluation:
    """What models keep of the dense one, with every answer and a page in `runtime.output`.

    Errors: UserError, before weights are loaded where it can.
    """
    with ExitStack() as held:
        found = evaluate_request(request, runtime, held)
        assert runtime.output
        write_evaluation_report(runtime.output)
    return found


def check_all(work: Workspace) -> None:
    """Refuse, before anything is measured, what cannot be done. Errors: UserError."""
    work.check_checkpoint()
    work.check_replacement(check_request(work.shape, work.recipe))
    check_tracker(work.runtime.tracker)
    if work.runtime.cache and (work.recipe.epochs == 1 or work.world.size > 1):
        raise UserError("--cache is for several epochs in one process; give --epochs 2 or more, or leave it out.")
    if work.runtime.cache and not work.recipe.learns:
        raise UserError(
            f"--cache is for what stands in, and --replace {work.recipe.replace} trains none; leave it out."
        )
    if unused := without_effect(work.recipe):
        say(unused, work.runtime.quiet)
    check_training(work)
    check_healing(work)
    check_then(work)
    work.estimate.check(free_space(work.runtime.output))


def describe(plan: LayerPlan) -> str:
    fewer = 1 - plan.parameters_after / plan.parameters_before
    counts = f"parameters {plan.parameters_before:,} -> {plan.parameters_after:,} ({fewer:.1%} fewer)"
    lines = [f"{plan}: {plan.why}", counts]
    if plan.replace == "mlp":
        lines.append("the mlp's attention is silent but stays: on disk, in compute and in the KV cache it is a layer")
    if plan.heal != "none":
        lines.append(f"what stays is healed ({plan.heal}): it will not be the source's any more")
    if plan.custom_code:
        lines.append("the model will carry code of its own and load only with trust_remote_code=True")
    return "\n".join(lines)


def measured_into(folder: RunFolder, work: Workspace) -> Similarity:
    """Stage 1; where the ranking comes with it, that is kept first, for stage 2."""
    similarity, ranking = measured(work, work.recipe, deciding_held(work))
    if ranking:
        folder.stage(RANKING, Ranking, lambda: ranking)
    return similarity


def deciding_held(work: Workspace) -> By | None:
    """The score by which windows can be ranked in the pass of stage 1, as the weights are held."""
    return work.world.led(lambda: None if work.offloads else deciding(work, work.recipe))


def measured(work: Workspace, recipe: Recipe, by: By | None) -> tuple[Similarity, Ranking | None]:
    """The similarity and, where a score is named, the ranking by it, in one pass where the weights are held."""
    if by is None or work.world.led(lambda: work.offloads):
        return measure(work), by and ranked(work, recipe, by)
    work.share()
    warn_of_few(work)
    return surveyed(work, recipe, by)


def measure(work: Workspace) -> Similarity:
    """Stage 1: the similarity of every window on the calibration part."""
    work.share()  # before the model is read, so that unusable text is refused first
    model, scratch = work.world.attempt(lambda: (work.model, work.scratch if work.offloads else None))
    calibration, batch = work.parts.calibration, work.batch(memory.FORWARD_TOKENS)
    warn_of_few(work)
    return analyze(model, calibration, batch, quiet=work.runtime.quiet, scratch=scratch, world=work.world)


def warn_of_few(work: Workspace) -> None:
    if (count := len(work.parts.calibration)) < FEWEST:
        say(
            f"warning: the calibration part is {counted(count, 'sequence')}, of which standard errors and halves say "
            "little; give more --calibration-tokens, or a shorter --block",
            work.runtime.quiet,
        )


def draw_choice(similarity: Similarity, plan: LayerPlan, folder: RunFolder) -> None:
    if not folder.has("similarity.png"):
        ranking = ranking_in(folder.path)
        by_cosine = ranking.winners["cosine"].window if ranking else None
        figures.draw_similarity(similarity, folder.file("similarity.png"), runs_of(plan.gone), by_cosine)
    if not folder.has("heat-map.png"):
        figures.draw_heat_map(similarity, folder.file("heat-map.png"), runs_of(plan.gone))


def assemble_model(work: Workspace, trained: Trained, similarity: Similarity, folder: RunFolder) -> Verification:
    """Stage 5: `model/`, which appears only when verified."""
    target, plan = folder.file("model"), trained.plan
    if folder.has("model"):
        verification = Manifest.read(target / MANIFEST).verification
        assert verification is not None  # written before the folder got its name
        return verification
    say("assembling and verifying in a fresh process", work.runtime.quiet)
    source = work.model_as_saved()
    replacement = load_replacement(work, source, plan, folder)
    healed = load_healed(work, source, plan, replacement, folder)
    files = source_files(work.source.path)
    licences = [file for file in files if is_licence(file)]
    room = work.ram - memory.held()
    parts = ModelParts(source, plan, replacement.requires_grad_(False), work.tokenizer, licences, room, healed)
    manifest = Manifest(
        command=work.runtime.command,
        recipe=as_values(work.recipe),
        plan=plan,
        layer_map=plan.layer_map(),
        tensors={},
        fit=trained.fit,
        earlier=earlier_fits(work, folder),
        healing=trained.healing,
        data=work.parts.summary(),
        layer_similarities=similarity.of_layers(),
        versions=versions(),
        origin=origin(work.source.path, files),
    )
    return assemble(parts, work.dtype, work.parts.validation, manifest, target)


def score(work: Workspace, plan: LayerPlan, folder: RunFolder) -> Scores:
    """Stage 6: validation loss of the source, of the source cut to the same depth, and of the saved, cast model."""
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
    work: Workspace, plan: LayerPlan, tasks: list[Task], folder: RunFolder, lighter: list[Lighter]
) -> tuple[Evaluation | None, bool]:
    """Stage 7: the models' answers, writing and speed, and whether there is any news in them.

    None where nothing was to be asked; what an earlier run has asked is not asked again.
    """
    if NO_TASKS in tasks_given(work):
        return None, False
    if folder.has(EVALUATION):
        kept = Evaluation.read(folder.path / EVALUATION)
        missing = {one.kind for one in lighter} - {model.label for model in kept.models}
        if not missing and were_asked(tasks, kept.models[0]):
            return kept, False
    folder.check_inputs(work.inputs, finished=True)  # else what is asked may be of text that was trained on
    blocks = work.parts.validation
    own = own_questions(blocks, work.tokenizer, work.recipe.seed, folder.path)
    models = standings(work, plan, folder)
    for one in lighter:
        models[one.kind] = standing(work, one, models[SAVED], folder.path)
    found = evaluate_run(models, [*own, *tasks], blocks, folder.path, work.runtime)
    for told in (PAGE, f"model/{CARD}"):  # of what was found before: a run that ends here writes them when it goes on
        (folder.path / told).unlink(missing_ok=True)
    found.write(folder.path / EVALUATION)
    return found, True


def were_asked(tasks: list[Task], model: ModelScore) -> bool:
    """Whether a model's scores are of these very tasks; of what older evaluations have, the name has to do."""
    kept = {one.task: one.digest for one in model.tasks}
    return all(task.name in kept and kept[task.name] in (None, task.digest) for task in tasks)


def standings(work: Workspace, plan: LayerPlan, folder: RunFolder) -> dict[str, Standing]:
    """The dense model, the same with its window left out unless that is what was saved, and the saved one."""
    target = folder.path / "model"
    dense = fingerprints.fingerprint(work.source)
    saved = sha256(json.dumps(Manifest.read(target / MANIFEST).weights).encode())
    common = (work.compute, checkpoint.context_length(work.config), work.tokenizer)
    found = {DENSE: Standing(work.recipe.model, dense, *common, lambda: work.model)}
    if not plan.merely_cut:
        cut = sha256(dense.encode(), str(plan.plain_window).encode())
        without = lambda: substituted(work.model, plan.plain_window)  # noqa: E731
        name = f"{work.recipe.model} without {plan.plain_window}"
        found[CUT] = Standing(name, cut, *common, lambda: work.model, without, only_asked=True)
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
