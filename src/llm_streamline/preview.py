"""What can be known of a run before it is begun: its plan, what it takes, and the similarity it would choose by."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from llm_streamline import figures
from llm_streamline.errors import Dismissed, UserError
from llm_streamline.estimate import Estimate
from llm_streamline.files import remove, remove_leftovers
from llm_streamline.healing import check_heals, check_size
from llm_streamline.lock import run_lock
from llm_streamline.parallel import World
from llm_streamline.probe import probe, timed
from llm_streamline.progress import say
from llm_streamline.ranking import RANKING, By, Ranking
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import LayerPlan, Similarity
from llm_streamline.removal import check_protected, check_request
from llm_streamline.run import check_all, deciding_held, measured
from llm_streamline.selection import decide, nothing_to_rank, score
from llm_streamline.sizes import sizes_of
from llm_streamline.training import check_lessons
from llm_streamline.workspace import RunFolder, Workspace, output_folder, own_contents

ANALYSIS_FILES = {"similarity.json", "similarity.png", "heat-map.png", RANKING}


def plan_only(recipe: Recipe, runtime: Runtime) -> LayerPlan:
    """The plan that `compress` would follow; nothing is written."""
    with World.opened(runtime.worker_timeout) as world:
        work = Workspace(recipe, runtime, world)
        world.alone(lambda: runtime.output and RunFolder.open(runtime.output, recipe, runtime.fresh))
        world.alone(lambda: check_all(work))
        similarity, ranking = measured(work, recipe, deciding_held(work))
        plan = decide(work, similarity, ranking=ranking)
        check_heals(recipe.heal, plan)
        if recipe.rounds > 1:
            say(
                f"the plan is of round 1 of {recipe.rounds}; the next windows are chosen once it is trained",
                runtime.quiet,
            )
    if not world.first:
        raise Dismissed
    return plan


def estimate_only(recipe: Recipe, runtime: Runtime) -> Estimate:
    """What the run would take, with its seconds; nothing is written, and no weights or text are read."""
    work = Workspace(recipe, runtime)
    check_request(work.shape, work.recipe)
    check_lessons(work)
    check_size(recipe.heal, work.shape.num_layers - 1)
    sizes = sizes_of(work, work.estimate.offloaded)
    rates = probe(work.config, sizes, work.compute_dtype, work.device, recipe)
    return timed(work.estimate, sizes, rates)


def analyze_model(recipe: Recipe, runtime: Runtime) -> tuple[Similarity, Ranking | None, Path]:
    """`similarity.json` and its figures in a folder of their own, and where a removal is asked for, `ranking.json`.

    Errors: UserError for a folder that is not ours, or what no window can give.
    """
    untrained = recipe.model_copy(update={"replace": "none", "heal": "none"})  # which needs no text to train on
    with ExitStack() as held:
        with World.opened(runtime.worker_timeout) as world:
            work = Workspace(untrained, runtime, world)
            folder = world.alone(lambda: begin_analysis(work, recipe, held))
            similarity, ranking = measured(work, recipe, world.led(lambda: ranks_by(work, recipe)))
        if not world.first:
            raise Dismissed
        remove_leftovers(folder)
        similarity.write(folder / "similarity.json")
        remove(folder / RANKING)  # of an earlier analysis, perhaps of another length
        if ranking:
            ranking.write(folder / RANKING)
        figures.draw_similarity(similarity, folder / "similarity.png")
        figures.draw_heat_map(similarity, folder / "heat-map.png")
    return similarity, ranking, folder


def ranks_by(work: Workspace, recipe: Recipe) -> By | None:
    """What the windows that the recipe's removal leaves are ranked by; None where it asks for none, or for one."""
    if not asks_for_windows(recipe):
        return None
    if why := nothing_to_rank(work, recipe):
        say(f"no windows are ranked: {why}", work.runtime.quiet)
        return None
    return "cosine" if recipe.select == "cosine" else score(work, recipe)


def asks_for_windows(recipe: Recipe) -> bool:
    return recipe.remove is not None or recipe.max_params is not None or recipe.select is not None


def begin_analysis(work: Workspace, recipe: Recipe, held: ExitStack) -> Path:
    """The folder, locked until `held` ends. Errors: UserError where it is not ours, or nothing can be measured."""
    folder = output_folder(work.runtime.output or Path(f"{Path(work.recipe.model).name}-analysis"))
    held.enter_context(run_lock(folder))
    held.callback(work.let_go)
    if own_contents(folder) - ANALYSIS_FILES:
        raise UserError(f"-o {folder} holds other things than an analysis; give a folder that is new or empty.")
    work.check_checkpoint()
    check_protected(work.shape, work.recipe)
    if asks_for_windows(recipe):
        check_request(work.shape, recipe)
    return folder
