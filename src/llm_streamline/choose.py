"""Similarity -> LayerPlan, and why: which windows go, from what the recipe asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llm_streamline.errors import UserError
from llm_streamline.quantities import counted
from llm_streamline.ranking import NAMES, Ranking, disagreement
from llm_streamline.recipe import Recipe
from llm_streamline.records import LayerPlan, ModelShape, Similarity, Window, runs_of
from llm_streamline.removal import (
    candidates,
    given_windows,
    parameters_after,
    parameters_saved,
    single_layers,
    too_long,
)


def choose(similarity: Similarity, shape: ModelShape, recipe: Recipe, ranking: Ranking | None = None) -> LayerPlan:
    """The plan that the recipe asks for: by `ranking`, or by cosine. Errors: UserError where no window can give it."""
    if recipe.window is not None:
        windows = given_windows(recipe, shape)
        why = f"the window{'s were' if recipe.count > 1 else ' was'} given with --window"
        return _plan(similarity, shape, recipe, Choice(windows, _plain(similarity, recipe, windows), why))
    return choose_windows(similarity, shape, recipe, [pick(similarity, shape, recipe, ranking)])


class Choice(NamedTuple):
    """What goes: windows, and layers besides them; what goes from the model that is merely cut; and why."""

    windows: Sequence[Window]
    plain: Window
    why: str
    dropped: Sequence[int] = ()


class Pick(NamedTuple):
    """A window, and why it and no other."""

    window: Window
    why: str


def pick(
    similarity: Similarity,
    shape: ModelShape,
    recipe: Recipe,
    ranking: Ranking | None = None,
    taken: Sequence[Window] = (),
) -> Pick:
    """The next window once some are taken, by `ranking`, or Eq. 2-3: the one whose boundaries are most alike."""
    if ranking:
        return Pick(ranking.winner.window, why_ranked(ranking))
    left = sorted(candidates(shape, recipe, taken), key=similarity.of, reverse=True)
    return Pick(left[0], _why(similarity, left, recipe))


def choose_windows(
    similarity: Similarity, shape: ModelShape, recipe: Recipe, picks: Sequence[Pick], before: LayerPlan | None = None
) -> LayerPlan:
    """The plan to remove windows, in the order in which they were picked, after those of the round `before`."""
    earlier = [before.window, *before.others] if before else []
    whys = [before.why] if before else []
    for number, one in enumerate(picks):
        left = [other.window for other in picks[:number]]
        states = filter(None, [_told(earlier, "replaced"), _told(left, "left out")])
        prefix = f"then, with {' and '.join(states)}, " if earlier or left else ""
        whys.append(prefix + (f"{one.window}: {one.why}" if recipe.count > 1 else one.why))
    windows = [*earlier, *(one.window for one in picks)]
    return _plan(similarity, shape, recipe, Choice(windows, _plain(similarity, recipe, windows), "; ".join(whys)))


def _told(windows: Sequence[Window], what: str) -> str:
    return f"{' and '.join(map(str, windows))} {what}" if windows else ""


def _plain(similarity: Similarity, recipe: Recipe, windows: Sequence[Window]) -> Window:
    """What goes from the model that is merely cut: one window of the same net length, within the one that is given."""
    net = sum(map(len, windows)) - len(windows) * recipe.each
    if len(windows) > 1:
        return most_similar(similarity, net, recipe)
    if not recipe.occupied:
        return windows[0]
    if recipe.window is None:
        return most_similar(similarity, net, recipe)
    (given,) = windows
    return next(one for one in similarity.windows(net) if given.start <= one.start and one.stop <= given.stop)


def choose_layers(similarity: Similarity, shape: ModelShape, recipe: Recipe, layers: Sequence[int]) -> LayerPlan:
    """The plan to remove single layers, in the order given, wherever they lie, with nothing in their place."""
    window = max(runs_of(layers), key=len)
    plain = most_similar(similarity, len(layers), recipe)
    how = {
        "influence": "each of them changes the state less than any other that may go",
        "greedy": "one after the other, that by whose deletion the loss rises least",
    }
    why = f"{how[recipe.select or '']}: {', '.join(map(str, layers))}"
    dropped = sorted(set(layers) - set(window.layers()))
    return _plan(similarity, shape, recipe, Choice([window], plain, why, dropped))


def least_influence(similarity: Similarity, shape: ModelShape, recipe: Recipe, count: int) -> list[int]:
    """The layers of the least Block Influence, 1 - cosine of input and output (ShortGPT, arXiv 2403.03853)."""
    cosines, found = similarity.of_layers(), list[int]()
    for _ in range(count):
        found.append(max(single_layers(shape, recipe, found), key=lambda layer: cosines[layer]))
    return found


def _plan(similarity: Similarity, shape: ModelShape, recipe: Recipe, choice: Choice) -> LayerPlan:
    """Errors: UserError where what stands in is larger than what goes."""
    (window, *others), plain = choice.windows, choice.plain
    after = shape.total - sum(parameters_saved(shape, one, recipe.each) for one in choice.windows)
    after -= sum(shape.layers[layer] for layer in choice.dropped)
    after += shape.untied
    if after >= shape.total:
        named = ", ".join(map(str, choice.windows))
        what = f"--replace {recipe.replace}" + (f" with --heal {recipe.heal}" if shape.untied else "")
        raise UserError(
            f"{what} has more parameters than layers {named} it stands for "
            f"({shape.total:,} -> {after:,}); remove more layers, or use another replacement."
        )
    return LayerPlan(
        model=shape.name,
        model_type=shape.model_type,
        num_layers=shape.num_layers,
        window=window,
        replace=recipe.replace,
        custom_code=recipe.network,
        occupied=len(choice.windows) * recipe.each,
        parameters_before=shape.total,
        parameters_after=after,
        similarity=similarity.of(window),
        similarity_se=similarity.error_of(window),
        plain_window=plain,
        plain_parameters=parameters_after(shape, plain, 0),
        why=choice.why,
        heal=recipe.heal,
        dropped=list(choice.dropped),
        others=others,
    )


def most_similar(similarity: Similarity, length: int, recipe: Recipe) -> Window:
    """Eq. 2-3: the window of `length` layers whose boundaries are most alike, away from the protected ends."""
    windows = similarity.windows(length, recipe.protect_first, recipe.protect_last)
    if not windows:
        raise UserError(too_long(length, similarity.num_layers, recipe))
    return windows[0]


def _why(similarity: Similarity, ranked: Sequence[Window], recipe: Recipe) -> str:
    """The reason for the first of some windows, with its runner-up and whether the two can be told apart."""
    window = ranked[0]
    best = f"cosine {similarity.of(window):.4f} ± {similarity.error_of(window):.4f}"
    length = counted(len(window), "layer")
    if recipe.select == "last":
        return f"the highest window of {length} below the protected end, as --select last asks ({best})"
    if len(ranked) == 1:
        return f"the only window of {length} between the protected ends ({best})"
    second = ranked[1]
    return (
        f"the most similar of {len(ranked)} windows of {length} ({best}; next {second} with "
        f"{similarity.of(second):.4f} ± {similarity.error_of(second):.4f}{_of_halves(similarity, ranked)})"
    )


def _of_halves(similarity: Similarity, ranked: Sequence[Window]) -> str:
    """Whether either half of the sequences would have had the same window first."""
    firsts = [max(ranked, key=lambda window: half[window.start][window.stop]) for half in similarity.halves]
    if not firsts:
        return ""
    if set(firsts) == {ranked[0]}:
        return f"; either half of the {similarity.sequences} sequences alone has it first"
    return f"; halves of the {similarity.sequences} sequences alone have {' and '.join(map(str, firsts))} first"


def why_ranked(ranking: Ranking) -> str:
    """The reason for a ranked window: what decided, by how much, how surely, and what other scores would have taken."""
    found, judged, every = ranking.winner, ranking.judged(), len(ranking.candidates)
    score = ranking.of(found.window).of(ranking.by)
    assert score is not None
    most = "highest" if ranking.by == "cosine" else "least"
    among = f"{every}" if len(judged) == every else f"{len(judged)}, the best by other scores of {every},"
    details = [f"{score.value:.4f} ± {score.se:.4f}"]
    if found.margin:
        details.append(f"next {found.runner_up}, worse by {found.margin.value:.4f} ± {found.margin.se:.4f}")
    details.append(f"the same in {found.confidence:.0%} of random halves of {ranking.sequences} sequences")
    return (
        f"the {most} {NAMES[ranking.by]} among {among} windows of {counted(len(found.window), 'layer')} "
        f"({'; '.join(details)}); {disagreement(ranking)}"
    )
