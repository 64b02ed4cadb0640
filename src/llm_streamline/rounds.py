"""Windows in rounds: some go and what stands in for them is trained, then the next are chosen on the model as it is."""

from __future__ import annotations

from functools import partial

from llm_streamline.progress import say
from llm_streamline.records import LayerPlan, Similarity
from llm_streamline.selection import decide, more
from llm_streamline.starts import with_starts
from llm_streamline.training import plan_of, shared_replacement, train_replacement
from llm_streamline.windows import split_evenly
from llm_streamline.workspace import RunFolder, Workspace


def settle(work: Workspace, similarity: Similarity, folder: RunFolder) -> LayerPlan:
    """Stage 2, and of several rounds all but the last one's training: its plan, of all windows.

    Errors: as those of choosing and of training. What a stopped run has done of it is not repeated.
    """
    recipe = work.recipe
    first = lambda: with_starts(work, decide(work, similarity, folder))  # noqa: E731
    if recipe.rounds == 1:
        return first()
    plan = folder.stage(plan_of(1), LayerPlan, first)
    for turn, count in enumerate(split_evenly(recipe.count, recipe.rounds)[1:], start=1):
        say(f"round {turn} of {recipe.rounds}: {plan}", work.runtime.quiet)
        train_replacement(work, plan, folder, turn)
        plan = folder.stage(plan_of(turn + 1), LayerPlan, partial(_next, work, similarity, folder, plan, turn, count))
    return plan


def _next(
    work: Workspace, similarity: Similarity, folder: RunFolder, plan: LayerPlan, turn: int, count: int
) -> LayerPlan:
    """The plan with so many windows more, chosen on the model with what the round has trained in place."""
    replacement = shared_replacement(work, plan, folder, turn)
    replacement.to(work.device, work.compute_dtype)  # as the saved model would be computed with
    return with_starts(work, more(work, similarity, count, plan, list(replacement.requires_grad_(False))), plan)
