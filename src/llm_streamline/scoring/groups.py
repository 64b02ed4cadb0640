"""Scores of tasks that belong together -> one score per group, in which every task weighs the same."""

from __future__ import annotations

from statistics import fmean

from llm_streamline.answers import Stability
from llm_streamline.evaluation import GroupScore, ModelScore, TaskScore
from llm_streamline.scoring.stability import macro


def grouped(score: ModelScore) -> tuple[GroupScore, ...]:
    """A model's groups in the order of their tasks; a group whose tasks have several metrics gives one for each."""
    members: dict[tuple[str, str], list[TaskScore]] = {}
    for task in score.tasks:
        if task.group:
            members.setdefault((task.group, task.metric), []).append(task)
    stable = {one.task: one for one in score.stability or ()}
    return tuple(
        GroupScore(
            group=group,
            metric=metric,
            tasks=len(tasks),
            items=sum(task.items for task in tasks),
            value=fmean(task.value for task in tasks),
            stability=_stability([stable[task.task] for task in tasks if task.task in stable]),
        )
        for (group, metric), tasks in members.items()
    )


def _stability(found: list[Stability]) -> float | None:
    return macro(found)["stability"] if found else None
