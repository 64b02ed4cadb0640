"""Which of a window's layers its replacement begins as: the one that, alone in the window's place, costs least."""

from __future__ import annotations

import torch

from llm_streamline.forward import substituted
from llm_streamline.memory import FORWARD_TOKENS
from llm_streamline.progress import say
from llm_streamline.records import LayerPlan, Window
from llm_streamline.replace import BEST
from llm_streamline.replacement import fits
from llm_streamline.scoring.perplexity import next_token_loss
from llm_streamline.workspace import Workspace


def with_starts(work: Workspace, plan: LayerPlan, before: LayerPlan | None = None) -> LayerPlan:
    """The plan, with the layer that each stand-in takes its first weights from. All processes take part.

    Those of windows that an earlier plan has, which are trained by now, stay what they were.
    """
    if work.recipe.start != BEST:
        return plan
    if work.recipe.init is None and work.world.led(lambda: work.offloads):  # machines may differ in memory
        why = "as the model does not fit in memory; --init best looks for the best one anyway"
        say(f"the replacement begins as its window's first layer, {why}", work.runtime.quiet)
        return plan
    known = dict(zip(before.windows, before.starts, strict=False)) if before else {}
    starts = [known[one] if one in known else best_start(work, one) for one in plan.windows]
    for window, layer in zip(plan.windows, starts, strict=True):
        if window not in known:
            least = "with which alone in its place the loss is least"
            say(f"what stands in for {window} begins as layer {layer}, {least}", work.runtime.quiet)
    return plan.model_copy(update={"starts": starts})


def best_start(work: Workspace, window: Window) -> int:
    """The layer of `window` with which alone in its first place the loss on the calibration text is least.

    Only layers whose weights have the shapes of the first one's can begin there.
    """
    work.share()  # which a run that goes on from here has not done yet
    model = work.world.attempt(lambda: work.model)
    able = [layer for layer in window.layers() if fits(model, layer, window.start)]
    losses = [_loss(work, window, layer) for layer in able]
    return work.world.led(lambda: min(zip(losses, able, strict=True))[1])


def _loss(work: Workspace, window: Window, layer: int) -> float:
    """With the window begun as `layer`, summed over the calibration text; of all processes, each with its own share."""
    stand_in = work.replacement(work.model, [window.start], [layer]).to(work.device, work.compute_dtype)
    blocks, batch = work.world.share(work.parts.calibration), work.batch(FORWARD_TOKENS // 2)
    total = torch.zeros((), dtype=torch.float64)
    if len(blocks):
        with substituted(work.model, window, list(stand_in)):
            title = f"layer {layer} in place of {window}"
            found = next_token_loss(work.model, blocks, batch, title, work.runtime.quiet)
        total += found.nats * found.tokens
    return float(work.world.sum_(total))
