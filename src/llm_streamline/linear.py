"""LayerPlan + tokens -> the linear map that stands in for a window, in closed form: one pass, nothing is trained.

Two forms have the least squared error against what the window adds, x_leaving - x_entering (tokens, D):

    folded  M S, with M what the MLP below the window adds: T = I + S is folded into that MLP (ReplaceMe,
            arXiv 2505.02819, which solves M T + Y ~ x_leaving, Y the stream before the MLP)
    free    x_entering S: the state is mapped by I + S (Ghosted Layers, arXiv 2605.15491)

A third, the patch, only gives the state the magnitudes of the one that leaves (LinearPatch; see `patch.py`).

The first two papers' problems are this one, as Y + M = x_entering. Solving for S, not for I + S, lets the ridge pull
the map towards the identity: in directions that the text does not span, the model stays as merely cut.

ReplaceMe's other objective, the cosine of p = x_entering + M S and x_leaving, has no closed form, but for the best
length of every token it has: 1 - cos^2 = min_a |a p - x_leaving|^2 / |x_leaving|^2. Solving for S and for a in turns
lowers it with every pass; where ReplaceMe takes many steps of Adam, a few passes do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from llm_streamline.files import atomic
from llm_streamline.folding import FoldedLayer
from llm_streamline.forward import mlp_outputs
from llm_streamline.memory import FORWARD_TOKENS
from llm_streamline.moments import Moments
from llm_streamline.objective import STATES_ONLY, passes_to_solve
from llm_streamline.parallel import ALONE, World
from llm_streamline.passages import passages_of
from llm_streamline.patch import Magnitudes, patch_map
from llm_streamline.progress import progress, say
from llm_streamline.records import PATCH, LayerPlan, LinearFit, Window
from llm_streamline.replacement import ReplacementLayers

if TYPE_CHECKING:
    from llm_streamline.workspace import RunFolder, Workspace

SHORTEST = 1e-2  # the least length that a token's state is scaled to, as a share of its own
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


class Rows(NamedTuple):
    """Of one micro-batch (B, T, D) float64: what the map is given, and the states at the window's boundaries."""

    given: Tensor
    entering: Tensor
    leaving: Tensor

    def mapped(self, mapping: Tensor) -> Tensor:
        return self.entering + self.given @ mapping.to(self.given)


def window_rows(
    model: PreTrainedModel, window: Window, blocks: Tensor, reading: Reading, world: World = ALONE
) -> Iterator[Rows]:
    """This process's share of (N, T) token ids, read once. Errors: UserError where no map can be folded below."""
    own = world.share(blocks)
    batches = own.split(reading.batch) if len(own) else ()
    passages = passages_of(model, window, reading.autocast)  # before the hook: this may run a layer
    with ExitStack() as held:
        added = held.enter_context(mlp_outputs(model, window.start - 1)) if reading.folded else []
        advance = held.enter_context(progress("solving", own.numel(), reading.quiet))
        for passage in passages(batches):
            entering, leaving = passage.entering.double(), passage.leaving.double()
            given = added.pop(0).double().view_as(entering) if reading.folded else entering  # some flatten tokens
            yield Rows(given, entering, leaving)
            advance(entering.shape[:-1].numel())


def window_moments(
    model: PreTrainedModel,
    window: Window,
    blocks: Tensor,
    reading: Reading,
    world: World = ALONE,
    mapping: Tensor | None = None,
) -> Moments:
    """Second moments of what the map is given and what the window adds, over (N, T) token ids shared by all processes.

    For `nmse` each token counts 1 / ||x_leaving||^2, so that the least squared error is the least distillation loss.
    For `cosine` it counts a^2 times that and should become x_leaving / a, a the best length once `mapping` is used.
    Errors: as `window_rows`.
    """
    width = int(model.config.hidden_size)
    moments = Moments.of_widths(width, width)
    mapping = torch.zeros(width, width) if mapping is None else mapping
    for rows in window_rows(model, window, blocks, reading, world):
        weight = 1 / rows.leaving.square().sum(dim=-1).clamp_min(1e-12)
        leaving = rows.leaving
        if reading.loss == "cosine":
            length = best_length(rows.mapped(mapping), leaving)
            leaving, weight = leaving / length[..., None], weight * length.square()
        moments.add(rows.given, leaving - rows.entering, None if reading.loss == "mse" else weight)
    moments.add_up(world)
    return moments


def best_length(state: Tensor, wanted: Tensor) -> Tensor:
    """(B, T): what states (B, T, D) are multiplied by to be as near to those wanted as their directions allow."""
    return ((state * wanted).sum(dim=-1) / state.square().sum(dim=-1).clamp_min(1e-12)).clamp_min(SHORTEST)


def cosine_losses(
    model: PreTrainedModel, window: Window, blocks: Tensor, reading: Reading, mapping: Tensor, world: World = ALONE
) -> tuple[float, float]:
    """The mean of 1 - cosine over tokens, without the map and with it."""
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in window_rows(model, window, blocks, reading, world):
        for place, state in enumerate((rows.entering, rows.mapped(mapping))):
            sums[place] += (1 - torch.cosine_similarity(state, rows.leaving, dim=-1)).sum().cpu()
        sums[2] += rows.leaving.shape[:-1].numel()
    world.sum_(sums)
    return float(sums[0] / sums[2]), float(sums[1] / sums[2])


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
    parts = (training, validation)
    ridge: float | None = 0.0
    learned, held_out = (window_moments(model, window, blocks, reading, world) for blocks in parts)
    if reading.patch:
        mapping = patch_map(window_magnitudes(model, window, training, reading, world))
    else:
        mapping, ridge = best_map(learned, held_out)
    for _ in range(1, passes_to_solve(reading.loss)):
        learned, held_out = (window_moments(model, window, blocks, reading, world, mapping) for blocks in parts)
        mapping, ridge = best_map(learned, held_out)
    # the mean of the loss over tokens, and for mse over the width
    before = held_out.yy / held_out.tokens / (len(mapping) if reading.loss == "mse" else 1)
    after = before * held_out.unexplained(mapping)
    if reading.loss == "cosine":
        before, after = cosine_losses(model, window, validation, reading, mapping, world)
    fit = LinearFit(
        loss=reading.loss,
        tokens=learned.tokens,
        ridge=ridge,
        unexplained=learned.unexplained(mapping),
        validation_unexplained=held_out.unexplained(mapping),
        validation_before=before,
        validation_after=after,
        seconds=time.perf_counter() - started,
        device=str(model.device),
        compute="bfloat16 autocast" if reading.autocast else str(model.dtype).removeprefix("torch."),
    )
    return mapping, fit


def solved_start(work: Workspace, plan: LayerPlan) -> dict[str, Tensor]:
    """What a map that is to be trained begins as: its closed form on the calibration part. All processes take part."""
    work.share()
    blocks, begun = work.parts.calibration, "its closed form"
    model, reading = work.world.attempt(lambda: work.model), _reading(work, plan, STATES_ONLY)
    if reading.patch:
        mapping = patch_map(window_magnitudes(model, plan.window, blocks, reading, work.world))
    else:
        mapping, fit = solve_window(model, plan.window, blocks, work.parts.validation, reading, work.world)
        begun = begun if fit.ridge is not None else "the identity, which no linear map is better than,"
    say(f"the map begins as {begun} on {blocks.numel():,} tokens", work.runtime.quiet)
    return _weights(plan, mapping)


def _reading(work: Workspace, plan: LayerPlan, loss: str) -> Reading:
    folded, patch, batch = plan.folded is not None, plan.replace == PATCH, work.batch(FORWARD_TOKENS)
    return Reading(folded, loss, batch, work.bfloat16, work.runtime.quiet, patch)


def fit_linear(work: Workspace, plan: LayerPlan, folder: RunFolder, text: Callable[[], Tensor]) -> LinearFit:
    """Stage 3 where nothing is trained: `replacement/` with the map and its fit, unless an earlier run has made it.

    `text` gives the token ids (N, T) that it is solved on.
    """
    kept = work.world.led(lambda: LinearFit.read(folder.path / _FIT) if folder.has("replacement") else None)
    if kept:
        return kept
    training, quiet = text(), work.runtime.quiet
    how = "measuring a patch" if plan.replace == PATCH else "solving for a linear map"
    say(f"{how} on {training.numel():,} tokens", quiet)
    model, reading = work.world.attempt(lambda: work.model), _reading(work, plan, work.recipe.loss_used)
    mapping, fit = solve_window(model, plan.window, training, work.parts.validation, reading, work.world)
    if fit.ridge is None:
        say("no linear map lowers the validation loss; the model is as merely cut.", quiet)
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
