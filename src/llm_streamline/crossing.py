"""Micro-batches through a model once, with branches past windows: what deletion or a patch makes of the layers above.

A branch leaves at its window's lower boundary and goes on above it; the layers below run once for all branches, and the
whole model once. Layers are replayed with the calls that the model's own forward made. Shapes: B sequences, T tokens,
D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, linalg

from llm_streamline.layerwise import GROUP_TOKENS, Flow, Layerwise
from llm_streamline.losses import next_token
from llm_streamline.offload import is_offloaded
from llm_streamline.records import Window
from llm_streamline.upper import chunk_positions

HALVES = range(2)  # of the sequences: what is fitted on one is judged on the other
CACHED_TOKENS = 1024  # whose logits are made at once: those of more have left the cache when they are summed
MATRICES = 2**30  # bytes of second moments at once; where those of one window are more, one window's


@dataclass(frozen=True)
class Part:
    """A micro-batch (B, T) of token ids; `first` is the number of its first sequence, `half` the half it lies in."""

    ids: Tensor
    first: int
    half: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.ids))


def matrix_bytes(width: int) -> int:
    """Of one window: the second moments x'x and x'y of either half, in float64."""
    return len(HALVES) * 2 * width * width * 8


def maps_at_once(width: int) -> int:
    """Windows whose maps are fitted in one pass."""
    return max(1, MATRICES // matrix_bytes(width))


# what a branch goes on with above its window, of the states that enter and leave it; None for no branch
Bridge = Callable[[Part, Window, Tensor, Tensor], Tensor | None]


@dataclass
class Branched:
    """A micro-batch after its last layer: the whole model's state, and that of each branch.

    `states` are the whole model's at all boundaries so far, where they are kept.
    """

    part: Part
    whole: Flow
    states: list[Tensor] = field(default_factory=list)
    branches: dict[Window, Flow] = field(default_factory=dict)


def crossed(
    layers: Layerwise, parts: Sequence[Part], windows: Sequence[Window], bridge: Bridge, top: int, keep: bool = False
) -> Iterator[Branched]:
    """Every micro-batch at boundary `top`. Where weights are not held, several share a reading of them."""
    for group in _grouped(layers, parts, len(windows)):
        yield from _advanced(layers, group, windows, bridge, top, keep)


def _grouped(layers: Layerwise, parts: Sequence[Part], windows: int) -> Iterator[Sequence[Part]]:
    """As many micro-batches as have no more states with their branches than analysis has without."""
    size = 1
    if parts and is_offloaded(layers.model):
        size = max(1, GROUP_TOKENS // ((2 * windows + 1) * parts[0].ids.numel()))
    for first in range(0, len(parts), size):
        yield parts[first : first + size]


def _advanced(
    layers: Layerwise, group: Sequence[Part], windows: Sequence[Window], bridge: Bridge, top: int, keep: bool
) -> list[Branched]:
    flows = layers.enter([part.ids for part in group])
    found = [Branched(part, flow) for part, flow in zip(group, flows, strict=True)]
    entering: dict[Window, list[Tensor]] = {}
    for boundary in range(top + 1):
        if boundary:
            layers.advance([flow for one in found for flow in (one.whole, *one.branches.values())], [boundary - 1])
        for one in found if keep else ():
            one.states.append(one.whole.state)
        for window in windows:
            if window.start == boundary:
                entering[window] = [flow.state for flow in flows]
            if window.stop == boundary:
                for one, state in zip(found, entering.pop(window), strict=True):
                    if (left := bridge(one.part, window, state, one.whole.state)) is not None:
                        one.branches[window] = Flow(one.whole.ids, left, one.whole.calls)
    return found


@dataclass(frozen=True)
class Judged:
    """Per sequence (B,): the dense model's loss, and each branch's loss and KL from the dense model, nats per token."""

    dense: Tensor
    loss: dict[Window, Tensor]
    kl: dict[Window, Tensor]


@torch.no_grad()
def judged(layers: Layerwise, one: Branched) -> Judged:
    """Means over the tokens that have a next one. Logits are made of some tokens at a time, by the model itself."""
    sequences, length = one.whole.ids.shape
    device = one.whole.state.device
    dense = torch.zeros(sequences, dtype=torch.float64, device=device)
    loss, kl = ({window: torch.zeros_like(dense) for window in one.branches} for _ in range(2))
    step = min(chunk_positions(sequences, layers.model.config.vocab_size), max(1, CACHED_TOKENS // sequences))
    for first in range(0, length - 1, step):
        part = slice(first, min(first + step, length - 1))
        targets = one.whole.ids[:, part.start + 1 : part.stop + 1]
        logits = _logits(layers, one.whole, part)
        lost = next_token(logits, targets)
        dense += lost.double().sum(dim=1)
        shares = logits.softmax(dim=-1)
        # sum_v p_v (log p_v - log q_v), each log-probability a logit less the log-sum-exp of all
        own = linalg.vecdot(shares, logits) - _level(logits, lost, targets)
        for window, branch in one.branches.items():
            logits = _logits(layers, branch, part)
            lost = next_token(logits, targets)
            loss[window] += lost.double().sum(dim=1)
            other = linalg.vecdot(shares, logits) - _level(logits, lost, targets)
            kl[window] += (own - other).double().sum(dim=1)
    count = length - 1
    return Judged(dense / count, {w: v / count for w, v in loss.items()}, {w: v / count for w, v in kl.items()})


def _logits(layers: Layerwise, flow: Flow, part: slice) -> Tensor:
    """(B, t, V) in float32 of some places. Norm and head treat each token by itself, so that others may be missing."""
    return layers.logits(Flow(flow.ids[:, part], flow.state[:, part], flow.calls)).float()


def _level(logits: Tensor, loss: Tensor, targets: Tensor) -> Tensor:
    """(B, t): the log-sum-exp over the vocabulary, of which the loss is what the target's logit lacks."""
    return loss + logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
