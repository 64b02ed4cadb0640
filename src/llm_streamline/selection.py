"""Which windows go: candidates are ranked where more than similarity is to decide; the plan is made of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from llm_streamline.analyze import analyze
from llm_streamline.choose import (
    Pick,
    choose,
    choose_layers,
    choose_windows,
    least_influence,
    pick,
)
from llm_streamline.errors import UserError
from llm_streamline.forward import shortened, substituted
from llm_streamline.memory import FORWARD_TOKENS
from llm_streamline.progress import say
from llm_streamline.rank import rank, survey
from llm_streamline.ranking import NAMES, RANKING, SCORES, By, Ranking, ranking_in
from llm_streamline.recipe import Recipe
from llm_streamline.records import LayerPlan, Similarity, Window, runs_of
from llm_streamline.removal import candidates, net_layers, single_layers
from llm_streamline.windows import split_evenly
from llm_streamline.workspace import RunFolder, Workspace

FEWEST_ROWS = 4  # tokens in a half of the calibration part, for each row of a linear map


def decide(
    work: Workspace, similarity: Similarity, folder: RunFolder | None = None, ranking: Ranking | None = None
) -> LayerPlan:
    """Stage 2: the windows, of the first round. All processes take part; the first one's ranking is kept in `folder`.

    A `ranking` that has come with the similarity is given, or lies in `folder`. Errors: UserError where a window's
    first layers cannot give what is to stand in.
    """
    recipe = work.recipe
    if recipe.scattered:
        layers = single(work, similarity)
        return work.world.led(lambda: choose_layers(similarity, work.shape, recipe, layers))
    if ranking is None and folder:
        ranking = work.world.led(lambda: ranking_in(folder.path))
    if ranking is None and (by := work.world.led(lambda: deciding(work, recipe))):
        make = partial(ranked, work, recipe, by)
        ranking = folder.stage(RANKING, Ranking, make) if folder else make()
    if recipe.given or recipe.count == 1:
        return work.world.led(lambda: planned(work, choose(similarity, work.shape, recipe, ranking), [ranking]))
    return several(work, similarity, ranking)


def several(work: Workspace, similarity: Similarity, first: Ranking | None) -> LayerPlan:
    """Windows one after the other, each by the same score on the model without those before."""
    recipe = work.recipe

    def ranking_of(taken: Sequence[Window]) -> Ranking | None:
        return ranked(work, recipe, first.by, taken) if taken and first else first

    count = split_evenly(recipe.count, recipe.rounds)[0]
    picks, rankings = picked(work, similarity, count, ranking_of)
    return work.world.led(lambda: planned(work, choose_windows(similarity, work.shape, recipe, picks), rankings))


def more(
    work: Workspace, similarity: Similarity, count: int, before: LayerPlan, replacement: Sequence[nn.Module]
) -> LayerPlan:
    """`before` with so many windows more, each chosen on the model as the plan before and its replacement make it."""
    recipe, earlier = work.recipe, [before.window, *before.others]
    by = work.world.led(lambda: score(work, recipe)) or "cosine"  # which the dense model's similarity does not tell

    def ranking_of(taken: Sequence[Window]) -> Ranking | None:
        with shortened(work.model, before, replacement):
            return ranked(work, recipe, by, taken, skipped=taken[len(earlier) :])

    picks, rankings = picked(work, similarity, count, ranking_of, earlier)
    make = partial(choose_windows, similarity, work.shape, recipe, picks, before)
    return work.world.led(lambda: planned(work, make(), rankings))


def picked(
    work: Workspace,
    similarity: Similarity,
    count: int,
    ranking_of: Callable[[Sequence[Window]], Ranking | None],
    earlier: Sequence[Window] = (),
) -> tuple[list[Pick], list[Ranking | None]]:
    """So many windows, after some earlier ones, and the ranking of each on what those before have left."""
    picks: list[Pick] = []
    rankings: list[Ranking | None] = []
    while len(picks) < count:
        taken = [*earlier, *(one.window for one in picks)]
        alone = len(candidates(work.shape, work.recipe, taken)) == 1
        rankings.append(None if alone else ranking_of(taken))
        seen = similarity if alone or rankings[-1] or not taken else similarity_without(work, taken)
        picks.append(work.world.led(partial(pick, seen, work.shape, work.recipe, rankings[-1], taken)))
    return picks, rankings


def similarity_without(work: Workspace, taken: Sequence[Window]) -> Similarity:
    """Eq. 1 on the calibration part, of the model with some windows left out."""
    work.share()
    model, scratch = work.world.attempt(lambda: (work.model, work.scratch if work.offloads else None))
    blocks, batch = work.parts.calibration, work.batch(FORWARD_TOKENS)
    with without(model, taken):
        return analyze(model, blocks, batch, quiet=work.runtime.quiet, scratch=scratch, world=work.world)


def single(work: Workspace, similarity: Similarity) -> list[int]:
    """Single layers that go, in the order in which they were chosen. Errors: UserError."""
    recipe, count = work.recipe, net_layers(work.recipe, work.shape)
    if recipe.select == "influence":
        return least_influence(similarity, work.shape, recipe, count)
    if work.world.led(lambda: work.offloads):
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
        left = single_layers(work.shape, work.recipe, gone)
        windows = [Window(start=layer, stop=layer + 1) for layer in left]
        with without(model, runs_of(gone)):
            found = rank(model, work.parts.calibration, batch, windows, "loss", work.runtime.quiet, work.world)
        gone.append(found.winner.window.start)
    return gone


@contextmanager
def without(model: PreTrainedModel, windows: Iterable[Window]) -> Iterator[None]:
    """The model with some windows skipped, through hooks."""
    with ExitStack() as hooks:
        for window in windows:
            hooks.enter_context(substituted(model, window))
        yield


def planned(work: Workspace, plan: LayerPlan, rankings: Iterable[Ranking | None]) -> LayerPlan:
    """The plan, once its windows are known to have what is to stand in. Errors: UserError."""
    for window in plan.windows:
        work.check_replacement([window.start])
    for ranking in rankings:
        if ranking and (warning := cosine_differs(ranking)):
            say(warning, work.runtime.quiet)
    return plan


def deciding(work: Workspace, recipe: Recipe) -> By | None:
    """The score that is to decide; None where that is cosine, as analysis has measured it, or there is one window."""
    return None if nothing_to_rank(work, recipe) else score(work, recipe)


def nothing_to_rank(work: Workspace, recipe: Recipe) -> str | None:
    """Why there are no windows to tell apart; None where there are."""
    if recipe.given:
        return f"--window {recipe.window} names what goes"
    if recipe.scattered:
        return f"--select {recipe.select} takes single layers, which compress --dry-run names"
    found = candidates(work.shape, recipe)
    return f"{found[0]} is the only one that may go" if len(found) == 1 else None


def score(work: Workspace, recipe: Recipe) -> By | None:
    """What a recipe judges windows by; None where that is cosine, as analysis has measured it."""
    if recipe.select == "cosine":
        return None
    if recipe.select is None and work.offloads:
        _say(work, "the window is chosen by cosine, as the model does not fit in memory; --select auto ranks it anyway")
        return None
    if recipe.select in SCORES:
        return next(by for by in SCORES if by == recipe.select)
    if not recipe.occupied:  # a map that is folded does not mend what one of the whole state would
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


def ranked(
    work: Workspace,
    recipe: Recipe,
    by: By,
    taken: Sequence[Window] = (),
    skipped: Sequence[Window] | None = None,
) -> Ranking:
    """The scores of every window that a recipe leaves once some are taken, on the calibration part alone.

    Those taken are left out of the model, or of them those in `skipped`.
    """
    work.share()
    model = work.world.attempt(lambda: work.model)
    windows, batch = candidates(work.shape, recipe, taken), work.batch(FORWARD_TOKENS // 2)
    with without(model, taken if skipped is None else skipped):
        return rank(model, work.parts.calibration, batch, windows, by, work.runtime.quiet, work.world)


def surveyed(work: Workspace, recipe: Recipe, by: By) -> tuple[Similarity, Ranking]:
    """The similarity of all windows and the scores of those that the recipe leaves, on the calibration part alone."""
    model = work.world.attempt(lambda: work.model)
    windows, batch = candidates(work.shape, recipe), work.batch(FORWARD_TOKENS // 2)
    return survey(model, work.parts.calibration, batch, windows, by, work.runtime.quiet, work.world)


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
