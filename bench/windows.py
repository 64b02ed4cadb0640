"""Which score finds the best window: every score of every window of one length, and what each window costs in the end.

`python -m bench.windows MODEL TEXT --length 4` prints a table: the scores, from the calibration part; the loss on the
validation part after deletion and after a linear map fitted on training tokens. Below it are the scores' rank
correlations with the map's loss, and what the default takes, of its own few, beside the best window of all.
"""

from __future__ import annotations

import argparse

import torch
from scipy.stats import kendalltau, spearmanr
from transformers import PreTrainedModel

from llm_streamline import rank as ranking_stage
from llm_streamline.crossing import Bridge, Part, crossed, judged
from llm_streamline.families import layers_of
from llm_streamline.layerwise import Layerwise
from llm_streamline.moments import Moments
from llm_streamline.ranking import SCORES, Candidate, Ranking
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import Window
from llm_streamline.workspace import Workspace

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.windows", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--fit", type=int, default=131_072, help="training tokens that the map is fitted on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    recipe = Recipe(model=options.model, data=(options.text,), tokens=options.fit, seed=options.seed)
    work = Workspace(recipe, Runtime(compute="float32", quiet=True))
    starts = range(1, work.shape.num_layers - options.length)
    windows = [Window(start=start, stop=start + options.length) for start in starts]
    taken = ranking_stage.rank(work.model, work.parts.calibration, BATCH, windows, "patched", quiet=True)
    ranking_stage.SHORTLIST = len(windows)
    ranking = ranking_stage.rank(work.model, work.parts.calibration, BATCH, windows, "patched", quiet=True)
    dense, ends = outcomes(work.model, work.parts.training, work.parts.validation, windows)
    show(ranking, ends)
    print(beside_best(taken.winner.window, dense, {window: patched for window, (_, patched) in ends.items()}))


def beside_best(taken: Window, dense: float, losses: dict[Window, float]) -> str:
    """What the default's window loses over the dense model, as so many times what the best one loses."""
    best = min(losses, key=lambda window: losses[window])
    over, least = losses[taken] - dense, losses[best] - dense
    told = f"the default takes {taken}: {over:.4f} nats over the dense model's {dense:.4f}"
    return f"{told}; the best is {best}: {least:.4f}; {over / least:.3f} times"


def outcomes(
    model: PreTrainedModel, training: torch.Tensor, validation: torch.Tensor, windows: list[Window]
) -> tuple[float, dict[Window, tuple[float, float]]]:
    """The dense loss on `validation` (N, T); per window that after deletion, and after a map fitted on `training`."""
    layers, width = Layerwise(model), model.config.hidden_size
    moments = {window: Moments.of_widths(width, width) for window in windows}

    def fit(part: Part, window: Window, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        moments[window].add(entering, leaving - entering, leaving.square().sum(dim=-1).reciprocal())

    with torch.no_grad():
        for _ in crossed(layers, parts(training), windows, fit, max(window.stop for window in windows)):
            pass
        maps = {window: one.solve().float() for window, one in moments.items()}
        dense, cut = losses(layers, validation, windows, lambda _, __, entering, ___: entering)
        _, patched = losses(layers, validation, windows, lambda _, window, x, __: x + x @ maps[window])
    return dense, {window: (cut[window], patched[window]) for window in windows}


def losses(
    layers: Layerwise, blocks: torch.Tensor, windows: list[Window], bridge: Bridge
) -> tuple[float, dict[Window, float]]:
    dense, sums = 0.0, dict.fromkeys(windows, 0.0)
    for one in crossed(layers, parts(blocks), windows, bridge, len(layers_of(layers.model))):
        seen = judged(layers, one)
        dense += float(seen.dense.sum())
        for window, loss in seen.loss.items():
            sums[window] += float(loss.sum())
    return dense / len(blocks), {window: total / len(blocks) for window, total in sums.items()}


def parts(blocks: torch.Tensor) -> list[Part]:
    return [Part(blocks[first : first + BATCH], first, 0) for first in range(0, len(blocks), BATCH)]


def cost(candidate: Candidate, by: str) -> float:
    value = getattr(candidate, by).value
    return -value if by == "cosine" else value


def show(ranking: Ranking, ends: dict[Window, tuple[float, float]]) -> None:
    print(f"dense {ranking.dense.value:.4f} on {ranking.sequences} sequences, {ranking.tokens:,} tokens")
    print("| window | " + " | ".join(SCORES) + " | deleted | map |")
    print("|---" * (len(SCORES) + 3) + "|")
    for one in ranking.candidates:
        values = [f"{getattr(one, by).value:.4f} ± {getattr(one, by).se:.4f}" for by in SCORES]
        deleted, patched = ends[one.window]
        print(f"| {one.window} | {' | '.join(values)} | {deleted:.4f} | {patched:.4f} |")
    for by in SCORES:
        winner = ranking.winners[by]
        how = correlated(ranking, by, ends)
        print(f"{by}: takes {winner.window} ({winner.confidence:.2f} of halves); with the map {how}")


def correlated(ranking: Ranking, by: str, ends: dict[Window, tuple[float, float]]) -> str:
    costs = [cost(one, by) for one in ranking.candidates]
    after = [ends[one.window][1] for one in ranking.candidates]
    return f"spearman {spearmanr(costs, after).statistic:.2f}, kendall {kendalltau(costs, after).statistic:.2f}"


if __name__ == "__main__":
    main()
