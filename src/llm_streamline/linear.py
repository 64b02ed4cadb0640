"""LayerPlan + tokens -> the linear map that stands in for a window, in closed form: one pass, nothing is trained.

Two forms have the least squared error against what the window adds, x_leaving - x_entering (tokens, D):

    folded  M S, with M what the MLP below the window adds: T = I + S is folded into that MLP (ReplaceMe,
            arXiv 2505.02819, which solves M T + Y ~ x_leaving, Y the stream before the MLP)
    free    x_entering S: the state is mapped by I + S (Ghosted Layers, arXiv 2605.15491)

A third, the patch, only gives the state the magnitudes of the one that leaves (LinearPatch; see `patch.py`).

The first two papers' problems are this one, as Y + M = x_entering. Solving for S, not for I + S, lets the ridge pull
the map towards the identity: in directions that the text does not span, the model stays as merely cut.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from llm_streamline.files import atomic
from llm_streamline.folding import FoldedLayer
from llm_streamline.forward import mlp_outputs
from llm_streamline.memory import FORWARD_TOKENS
from llm_streamline.moments import Moments
from llm_streamline.parallel import ALONE, World
from llm_streamline.passages import passages_of
from llm_streamline.patch import Magnitudes, patch_map
from llm_streamline.progress import progress, say
from llm_streamline.records import PATCH, LayerPlan, LinearFit, Window
from llm_streamline.replacement import ReplacementLayers

if TYPE_CHECKING:
    from llm_streamline.workspace import RunFolder, Workspace

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean square of a coordinate
MAP = "map"  # the name of I + S in the file
_FILE, _FIT = "replacement/replacement.safetensors", "replacement/fit.json"


@dataclass(frozen=True)
class Reading:
    """How a window's states are read: `folded` or free, for which loss, in micro-batches of how many sequences."""

    folded: bool
    loss: str
    batch: int
    autocast: bool = False
    quiet: bool = True
    patch: bool = False


def window_moments(
    model: PreTrainedModel, window: Window, blocks: Tensor, reading: Reading, world: World = ALONE
) -> Moments:
    """Second moments of what the map is given and what the window adds, over (N, T) token ids shared by all processes.

    For `nmse` each token counts 1 / ||x_leaving||^2, so that the least squared error is the least distillation loss.
    Errors: UserError where no map can be folded below the window.
    """
    width = int(model.config.hidden_size)
    moments = Moments.of_widths(width, width)
    own = world.share(blocks)
    batches = own.split(reading.batch) if len(own) else ()
    passages = passages_of(model, window, reading.autocast)  # before the hook: this may run a layer
    with ExitStack() as held:
        added = held.enter_context(mlp_outputs(model, window.start - 1)) if reading.folded else []
        advance = held.enter_context(progress("solving", own.numel(), reading.quiet))
        for passage in passages(batches):
            entering, leaving = passage.entering.double(), passage.leaving.double()
            weight = 1 / leaving.square().sum(dim=-1).clamp_min(1e-12) if reading.loss == "nmse" else None
            moments.add(added.pop(0) if reading.folded else entering, leaving - entering, weight)
            advance(entering.shape[:-1].numel())
    moments.add_up(world)
    return moments


def best_map(training: Moments, validation: Moments) -> tuple[Tensor, float | None]:
    """S (D, D) float64 of the ridge whose map leaves least on the validation part, and that ridge.

    Where none leaves less than no map does, S is zero, for the identity, and the ridge is None.
    """
    best, ridge = torch.zeros_like(training.xy), None
    least = validation.unexplained(best)
    for one, mapping in training.solutions(RIDGES):
        left = validation.unexplained(mapping)
        if left < least:
            best, ridge, least = mapping, one, left
    return best, ridge


def window_magnitudes(
    model: PreTrainedModel, window: Window, blocks: Tensor, reading: Reading, world: World = ALONE
) -> Magnitudes:
    """What the two boundaries' states have in each rotated channel, over (N, T) token ids shared by all processes."""
    found, own = Magnitudes.of_width(int(model.config.hidden_size)), world.share(blocks)
    with progress("measuring", own.numel(), reading.quiet) as advance:
        for passage in passages_of(model, window, reading.autocast)(own.split(reading.batch) if len(own) else ()):
            found.add(passage.entering, passage.leaving)
            advance(passage.entering.shape[:-1].numel())
    found.add_up(world)
    return found


def solve_window(
    model: PreTrainedModel, window: Window, training: Tensor, validation: Tensor, reading: Reading, world: World = ALONE
) -> tuple[Tensor, LinearFit]:
    """The map S (D, D) of a window, float64, and what it leaves unexplained; `training` and `validation` are token ids.

    Every process gets both. Errors: as `window_moments`.
    """
    started = time.perf_counter()
    learned, held_out = (window_moments(model, window, blocks, reading, world) for blocks in (training, validation))
    mapping: Tensor
    ridge: float | None
    if reading.patch:
        mapping, ridge = patch_map(window_magnitudes(model, window, training, reading, world)), 0.0
    else:
        mapping, ridge = best_map(learned, held_out)
    # the mean of the loss over tokens, and for mse over the width
    per = held_out.yy / held_out.tokens / (1 if reading.loss == "nmse" else len(mapping))
    fit = LinearFit(
        loss=reading.loss,
        tokens=learned.tokens,
        ridge=ridge,
        unexplained=learned.unexplained(mapping),
        validation_unexplained=held_out.unexplained(mapping),
        validation_before=per,
        validation_after=per * held_out.unexplained(mapping),
        seconds=time.perf_counter() - started,
        device=str(model.device),
        compute="bfloat16 autocast" if reading.autocast else str(model.dtype).removeprefix("torch."),
    )
    return mapping, fit


def fit_linear(work: Workspace, plan: LayerPlan, folder: RunFolder) -> LinearFit:
    """Stage 3 where nothing is trained: `replacement/` with the map and its fit, unless an earlier run has made it."""
    kept = work.world.led(lambda: LinearFit.read(folder.path / _FIT) if folder.has("replacement") else None)
    if kept:
        return kept
    work.share()
    parts, quiet = work.parts, work.runtime.quiet
    how = "measuring a patch" if plan.replace == PATCH else "solving for a linear map"
    say(f"{how} on {parts.training.numel():,} tokens", quiet)
    folded, patch, batch = plan.folded is not None, plan.replace == PATCH, work.batch(FORWARD_TOKENS)
    reading = Reading(folded, work.recipe.loss_used, batch, work.bfloat16, quiet, patch)
    model = work.world.attempt(lambda: work.model)
    mapping, fit = solve_window(model, plan.window, parts.training, parts.validation, reading, work.world)
    if fit.ridge is None:
        say("no linear map lowers the validation loss; the model stays as merely cut.", quiet)
    if work.world.first:
        _keep(_weights(plan, mapping), fit, folder)
    return fit


def _weights(plan: LayerPlan, mapping: Tensor) -> dict[str, Tensor]:
    """What is kept of S: I + S to be folded, or the network's weight, by its name in the replacement."""
    if plan.folded is None:
        return {"0.network.weight": mapping.T.float().contiguous()}
    return {MAP: (torch.eye(len(mapping), dtype=mapping.dtype) + mapping).float()}


def _keep(weights: dict[str, Tensor], fit: LinearFit, folder: RunFolder) -> None:
    with atomic(folder.file("replacement")) as temporary:
        temporary.mkdir()
        save_file(weights, temporary / Path(_FILE).name)
        fit.write(temporary / Path(_FIT).name)


def load_folded(source: PreTrainedModel, plan: LayerPlan, folder: RunFolder) -> ReplacementLayers:
    """The layer below the window of `source` with the kept map folded into it."""
    assert plan.folded is not None
    return FoldedLayer(source, plan.folded, load_file(folder.path / _FILE)[MAP])
