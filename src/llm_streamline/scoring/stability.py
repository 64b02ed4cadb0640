"""Two models' items -> how far the second still answers as the first did: stability (Eq. 5-6) and its neighbours.

Pure functions of per-item files: nothing here needs a model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from llm_streamline.answers import FEWEST_EFFECTIVE, SIGNIFICANCE, Item, Stability
from llm_streamline.errors import UserError
from llm_streamline.scoring.items import Tasks

RESAMPLES = 2000
Values = NDArray[np.float64]


def weights(items: Sequence[Item]) -> Values:
    """exp(std_i) / sum_j exp(std_j): Eq. 5 with k - 1, and the weights of Eq. 6; shifted, so that none overflows."""
    spread = np.array([np.std(item.ppl, ddof=1) for item in items])
    raw = np.exp(spread - spread.max())
    return raw / raw.sum()


def compare(before: Sequence[Item], after: Sequence[Item]) -> Stability:
    """The two models' answers to the same questions, in the same order; weights are the first model's.

    Errors: UserError where the items are not of one task and kind.
    """
    _check(before, after)
    first = np.array([item.right for item in before])
    then = np.array([item.right for item in after])
    weight, agree = weights(before), first == then
    count = len(before)
    fn, fp = int((first & ~then).sum()), int((~first & then).sum())
    chance = float(np.mean([1 / len(item.ppl) for item in before]))
    above = float(stats.binomtest(int(first.sum()), count, chance, alternative="greater").pvalue)
    effective = float(1 / np.square(weight).sum())
    kept = [one.prediction == other.prediction for one, other in zip(before, after, strict=True)]
    return Stability(
        task=before[0].task,
        measure=before[0].measure,
        items=count,
        TP=int((first & then).sum()),
        FN=fn,
        FP=fp,
        TN=int((~first & ~then).sum()),
        stability=float(weight[agree].sum()),
        stability_interval=_interval(weight, agree.astype(float)),
        effective_items=effective,
        agreement=float(agree.mean()),
        same_answer=float(np.mean(kept)),
        flips=(fn + fp) / count,
        mcnemar_p=float(stats.binomtest(fn, fn + fp).pvalue) if fn + fp else 1.0,
        accuracy_before=float(first.mean()),
        accuracy_after=float(then.mean()),
        difference_interval=paired_interval(then.astype(float) - first.astype(float)),
        chance=chance,
        above_chance_p=above,
        retained=float(then.mean() / first.mean()) if first.any() else None,
        retained_above_chance=float((then.mean() - chance) / (first.mean() - chance)) if above < SIGNIFICANCE else None,
        ranks=above < SIGNIFICANCE and effective >= FEWEST_EFFECTIVE * count,
    )


def compare_tasks(before: Tasks, after: Tasks) -> list[Stability]:
    """Every task that both have. Errors: UserError where their items differ or no task is common."""
    common = [task for task in before if task in after]
    if not common:
        raise UserError(
            f"the two have no task in common (one has {_some(before)}, the other {_some(after)}); "
            "give two models' answers to the same tasks."
        )
    found = []
    for task in common:
        one, other = before[task], after[task]
        if one.keys() != other.keys():
            odd = min(one.keys() ^ other.keys())
            raise UserError(
                f"task {task} has {len(one)} items before and {len(other)} after (item {odd!r} is in one only); "
                "give answers to the same questions."
            )
        found.append(compare(list(one.values()), [other[name] for name in one]))
    return found


def _some(tasks: Tasks) -> str:
    names = sorted(tasks)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def macro(found: Sequence[Stability]) -> dict[str, float]:
    """Means over tasks, each weighing the same whatever its size: the paper's way with subjects."""
    keys = ("stability", "agreement", "same_answer", "flips", "accuracy_before", "accuracy_after")
    return {key: float(np.mean([getattr(one, key) for one in found])) for key in keys}


def _check(before: Sequence[Item], after: Sequence[Item]) -> None:
    kinds = {item.measure for item in (*before, *after)}
    if len(kinds) > 1:
        raise UserError(
            f"task {before[0].task} mixes PPL of query and choice with PPL of the choice alone; "
            "give two files of one kind, from the same tool."
        )
    for one, other in zip(before, after, strict=True):
        if one.gold != other.gold or len(one.ppl) != len(other.ppl):
            raise UserError(
                f"item {one.id!r} of task {one.task} is another question before and after (its choices or right answer "
                "differ); give answers to the same questions."
            )


def paired_interval(differences: Sequence[float] | Values) -> tuple[float, float]:
    """The 95 % interval of the mean of two models' differences, item by item."""
    return _interval(np.ones(len(differences)), np.asarray(differences, dtype=float))


def _interval(weight: Values, value: Values) -> tuple[float, float]:
    """The 95 % interval of the weighted mean, by resampling items with their weights."""
    if np.ptp(value) == 0:
        return (float(value[0]), float(value[0]))

    # a resample in which every weight is 0 to the computer's precision says nothing: tiny weights keep it a number
    weight = np.maximum(weight, np.finfo(float).tiny * 1e20)

    def mean(weight: Values, value: Values, axis: int = -1) -> Values:
        return (weight * value).sum(axis=axis) / weight.sum(axis=axis)

    found = stats.bootstrap(
        (weight, value),
        mean,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=100,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    return (float(found.confidence_interval.low), float(found.confidence_interval.high))
