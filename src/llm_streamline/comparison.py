"""Models of an Evaluation side by side, task by task, and which of their figures rank anything.

A figure that ranks nothing is shown and decides nothing: an accuracy at chance, a stability that a few items decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from llm_streamline.answers import FEWEST_EFFECTIVE, SIGNIFICANCE, Stability
from llm_streamline.evaluation import EXACT, Evaluation, Interval, ModelScore, TaskScore

DEVIATIONS = 1.96  # standard errors on either side that make a 95 % interval
CHOSEN = "accuracy"  # the metric of multiple choice
CUT, SAVED = "cut", "saved"  # what a run calls its models, besides the dense one
AT_CHANCE, FEW_ITEMS = "at chance", "a few items decide"

Scored = Sequence[TaskScore]


@dataclass(frozen=True)
class Unit:
    """A task, or a group in which every task weighs the same, as the dense and as another model answered it.

    `stability` is empty where answers are not chosen but written, or where only a figure is known.
    """

    name: str
    dense: tuple[TaskScore, ...]
    other: tuple[TaskScore, ...]
    stability: tuple[Stability, ...]

    @property
    def before(self) -> float:
        return mean(self.dense)

    @property
    def after(self) -> float:
        return mean(self.other)

    @property
    def chance(self) -> float | None:
        return chance(self.dense, self.stability)

    @property
    def ranks(self) -> bool:
        """Whether the dense model's accuracy says anything: it is known to be above chance."""
        return self.chance is not None and above_chance(self.dense, self.chance)

    @property
    def doubt(self) -> str:
        """Why the stability ranks nothing; empty where it does."""
        count = sum(one.items for one in self.stability)
        if len(self.stability) == 1:
            guessed = self.stability[0].above_chance_p >= SIGNIFICANCE
        else:
            low = fmean(one.accuracy_before for one in self.stability) - DEVIATIONS * _error(
                [(one.accuracy_before * (1 - one.accuracy_before), one.items) for one in self.stability]
            )
            guessed = low <= fmean(one.chance for one in self.stability)
        few = sum(one.effective_items for one in self.stability) < FEWEST_EFFECTIVE * count
        return AT_CHANCE if guessed else FEW_ITEMS if few else ""

    @property
    def stable(self) -> float:
        return fmean(one.stability for one in self.stability)

    @property
    def flipped(self) -> int:
        """Answers that went from right to wrong or back."""
        return sum(one.FN + one.FP for one in self.stability)

    @property
    def items(self) -> int:
        return sum(one.items for one in self.stability)

    @property
    def moved(self) -> float:
        """By how much the accuracy that stability counts went up."""
        return fmean(one.accuracy_after - one.accuracy_before for one in self.stability)

    @property
    def within_chance(self) -> bool:
        """Whether the interval of that difference includes 0, or what is better."""
        if len(self.stability) == 1:
            return self.stability[0].difference_interval[1] >= 0
        spread = [
            ((one.FN + one.FP) / one.items - ((one.FP - one.FN) / one.items) ** 2, one.items) for one in self.stability
        ]
        return self.moved + DEVIATIONS * _error(spread) >= 0


def mean(scores: Scored) -> float:
    return fmean(one.value for one in scores)


def interval(scores: Scored) -> Interval | None:
    """Of one task its own; of several, the normal one of their mean."""
    if len(scores) == 1:
        return scores[0].interval
    around = DEVIATIONS * _error([(max(0.0, one.value * (1 - one.value)), one.items) for one in scores])
    return mean(scores) - around, mean(scores) + around


def _error(variances: Sequence[tuple[float, int]]) -> float:
    """The standard error of the mean over tasks, of each the variance of one item and how many there are."""
    return math.sqrt(sum(variance / items for variance, items in variances)) / len(variances)


def chance(scores: Scored, stability: Sequence[Stability]) -> float | None:
    """What guessing gives; nobody guesses what is written word by word. None where it is not known."""
    if stability:
        return fmean(one.chance for one in stability)
    return 0.0 if all(one.metric == EXACT for one in scores) else None


def above_chance(scores: Scored, chance: float) -> bool:
    found = interval(scores)
    return found is not None and found[0] > chance


def is_chosen(scores: Scored) -> bool:
    return all(one.metric == CHOSEN for one in scores)


def is_share(scores: Scored) -> bool:
    """Whether a figure is the share of right answers, of which more is better."""
    return all(one.metric in (CHOSEN, EXACT) for one in scores)


def dense_of(found: Evaluation) -> ModelScore | None:
    return next((one for one in found.models if one.label == found.against), None)


def compared(found: Evaluation) -> list[ModelScore]:
    """The models that are held against the dense one."""
    return [one for one in found.models if one.label != found.against] if dense_of(found) else []


def saved_of(found: Evaluation) -> ModelScore | None:
    """What a run's evaluation has of the model that the run wrote."""
    return next((one for one in compared(found) if one.label == SAVED), None)


def gathered(tasks: Scored) -> dict[str, list[TaskScore]]:
    """Tasks by the name of their group, or by their own, in their order; of one metric each."""
    metrics = {one.group: {other.metric for other in tasks if other.group == one.group} for one in tasks if one.group}
    groups: dict[str, list[TaskScore]] = {}
    for one in tasks:
        name = one.group or one.task
        several = len(metrics.get(one.group or "", ())) > 1
        groups.setdefault(f"{name} ({one.metric})" if several else name, []).append(one)
    return groups


def units(found: Evaluation, model: ModelScore) -> list[Unit]:
    """What both models were asked. Empty without a dense model, and for it."""
    dense = dense_of(found)
    if dense is None or dense is model:
        return []
    return [pair(name, tasks, model) for name, tasks in gathered(_common(dense, model)).items()]


def pair(name: str, tasks: Scored, model: ModelScore) -> Unit:
    """The dense model's tasks beside the same ones of another."""
    names = [one.task for one in tasks]
    other = tuple(one for task in names for one in model.tasks if one.task == task)
    return Unit(name, tuple(tasks), other, stabilities(model, names))


def stabilities(model: ModelScore, tasks: Sequence[str]) -> tuple[Stability, ...]:
    return tuple(one for one in model.stability or () if one.task in tasks)


def _common(dense: ModelScore, model: ModelScore) -> list[TaskScore]:
    kinds = {(one.task, one.metric) for one in model.tasks}
    return [one for one in dense.tasks if (one.task, one.metric) in kinds]


def mean_accuracy(one: ModelScore) -> tuple[float | None, Interval | None]:
    """Of right answers, over tasks and groups of them, each weighing the same, with its 95 % interval over items.

    None where nothing was asked that has right answers, which no perplexity or ROUGE counts.
    """
    return _of_tasks([(mean(some), interval(some)) for some in _shares(one).values()])


def mean_stability(one: ModelScore) -> tuple[float | None, Interval | None]:
    """The same of stability against the dense model."""
    groups = [stabilities(one, [task.task for task in some]) for some in _shares(one).values()]
    found = [_of_tasks([(task.stability, task.stability_interval) for task in some]) for some in groups if some]
    return _of_tasks([(value, around) for value, around in found if value is not None])


def _shares(one: ModelScore) -> dict[str, list[TaskScore]]:
    return gathered([task for task in one.tasks if is_share([task])])


def _of_tasks(found: Sequence[tuple[float, Interval | None]]) -> tuple[float | None, Interval | None]:
    """Of tasks, in which items are independent: half the width of its interval is that of their errors' sum."""
    if not found:
        return None, None
    value = fmean(one for one, _ in found)
    halves = [(interval[1] - interval[0]) / 2 for _, interval in found if interval]
    if len(halves) < len(found):
        return value, None
    half = math.hypot(*halves) / len(found)
    return value, (value - half, value + half)
