"""Which window goes: candidates are ranked where more than similarity is to decide; the plan is made of that."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from llm_streamline.choose import candidates, choose, choose_layers, least_influence, net_layers, single_layers
from llm_streamline.errors import UserError
from llm_streamline.forward import substituted
from llm_streamline.memory import FORWARD_TOKENS
from llm_streamline.progress import say
from llm_streamline.rank import rank
from llm_streamline.ranking import NAMES, RANKING, SCORES, By, Ranking
from llm_streamline.recipe import Recipe
from llm_streamline.records import LayerPlan, Similarity, Window, runs_of
from llm_streamline.workspace import RunFolder, Workspace

FEWEST_ROWS = 4  # tokens in a half of the calibration part, for each row of a linear map


def decide(work: Workspace, similarity: Similarity, folder: RunFolder | None = None) -> LayerPlan:
    """Stage 2: the window. All processes take part; a ranking is kept in `folder`.

    Errors: UserError where the window's first layers cannot give what is to stand in.
    """
    recipe, ranking = work.recipe, None
    if recipe.scattered:
        layers = single(work, similarity)
        return work.world.led(lambda: choose_layers(similarity, work.shape, recipe, layers))
    if by := work.world.led(lambda: deciding(work, recipe)):
        make = partial(ranked, work, recipe, by)
        ranking = folder.stage(RANKING, Ranking, make) if folder else make()
    return work.world.led(lambda: planned(work, similarity, ranking))


def single(work: Workspace, similarity: Similarity) -> list[int]:
    """Single layers that go, in the order in which they were chosen. Errors: UserError."""
    recipe, count = work.recipe, net_layers(work.recipe, work.shape)
    if recipe.select == "influence":
        return least_influence(similarity, recipe, count)
    if work.offloads:
        raise UserError(
            f"--select greedy reads the model {count} times over, and it does not fit in memory; "
            "use --select influence, or a machine with more."
        )
    return one_by_one(work, count)


def one_by_one(work: Workspace, count: int) -> list[int]:
    """SLEB (arXiv 2402.09025): of the layers that are left, the one by whose deletion the loss rises least, again."""
    work.share()
    model, batch, gone = work.world.attempt(lambda: work.model), work.batch(FORWARD_TOKENS // 2), list[int]()
    for _ in range(count):
        left = [layer for layer in single_layers(work.shape.num_layers, work.recipe) if layer not in gone]
        windows = [Window(start=layer, stop=layer + 1) for layer in left]
        with ExitStack() as hooks:
            for window in runs_of(gone):
                hooks.enter_context(substituted(model, window))
            found = rank(model, work.parts.calibration, batch, windows, "loss", work.runtime.quiet, work.world)
        gone.append(found.winner.window.start)
    return gone


def planned(work: Workspace, similarity: Similarity, ranking: Ranking | None) -> LayerPlan:
    plan = choose(similarity, work.shape, work.recipe, ranking)
    work.check_replacement([plan.window.start])
    if ranking and (warning := cosine_differs(ranking)):
        say(warning, work.runtime.quiet)
    return plan


def deciding(work: Workspace, recipe: Recipe) -> By | None:
    """The score that is to decide; None where that is cosine, as analysis has measured it, or there is one window."""
    if recipe.select == "cosine" or recipe.scattered or len(candidates(work.shape, recipe)) == 1:
        return None
    if recipe.select is None and work.offloads:
        _say(work, "the window is chosen by cosine, as the model does not fit in memory; --select auto ranks it anyway")
        return None
    if recipe.select in SCORES:
        return next(by for by in SCORES if by == recipe.select)
    if not recipe.occupied:
        return "loss"
    if work.parts.calibration.numel() < 2 * FEWEST_ROWS * work.config.hidden_size:
        _say(
            work,
            f"the calibration part has fewer than {2 * FEWEST_ROWS} tokens for each of the width's "
            f"{work.config.hidden_size} rows of a linear map: windows are ranked by loss after deletion",
        )
        return "loss"
    return "patched"


def _say(work: Workspace, message: str) -> None:
    say(message, work.runtime.quiet)


def ranked(work: Workspace, recipe: Recipe, by: By) -> Ranking:
    """The scores of every window that a recipe leaves, on the calibration part alone."""
    work.share()
    model = work.world.attempt(lambda: work.model)
    windows, batch = candidates(work.shape, recipe), work.batch(FORWARD_TOKENS // 2)
    return rank(model, work.parts.calibration, batch, windows, by, work.runtime.quiet, work.world)


def cosine_differs(ranking: Ranking) -> str | None:
    """A warning where cosine, which chose until now and in the paper, would have taken another window."""
    other, chosen = ranking.winners["cosine"].window, ranking.winner.window
    if other == chosen:
        return None
    scores = [ranking.of(window).of(ranking.by) for window in (other, chosen)]
    values = [f"{score.value:.4f}" if score else "not measured" for score in scores]
    return (
        f"warning: cosine would have taken {other} and not {chosen}; {NAMES[ranking.by]}: {values[0]} and {values[1]}"
    )
