"""Many micro-batches through a model layer by layer, so that each layer's weights are read once for all of them.

The model's own forward is taken apart without guessing at it: it is run with its layers standing aside, once to see
what it gives them, and once more to let it make logits of what they returned. Shapes: B sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from llm_streamline.families import layers_of
from llm_streamline.forward import LayerCall, captured_call, entering_state, returned_values
from llm_streamline.offload import is_offloaded, onloaded

GROUP_TOKENS = 2**15  # that share one reading of the weights: 16 blocks of 2048


@dataclass
class Flow:
    """One micro-batch on its way: its state (B, T, D) at some boundary, and what each layer is given besides."""

    ids: Tensor
    state: Tensor
    calls: list[LayerCall]


class _Aside(nn.Module):
    """Stands in a layer's place, notes what it is given and returns the state, or another one."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that it is no part of this module
        self._outputs = outputs
        self.state: Tensor | None = None
        self.call: LayerCall | None = None
        self.entering: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.entering, self.call = entering_state(args, kwargs), captured_call(args, kwargs)
        state = self.entering if self.state is None else self.state
        return (state, *[None] * (self._outputs - 1)) if self._outputs else state

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)  # models read a layer's kind of attention, for instance


@dataclass
class Layerwise:
    """Runs a model's layers on several micro-batches at once. Making it runs the first one, on a token."""

    model: PreTrainedModel
    _outputs: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._outputs = returned_values(self.model)

    @contextmanager
    def _aside(self) -> Iterator[list[_Aside]]:
        layers = layers_of(self.model)
        own = list(layers)
        stand_ins = [_Aside(layer, self._outputs) for layer in own]
        try:
            for place, one in enumerate(stand_ins):
                layers[place] = one
            yield stand_ins
        finally:
            for place, layer in enumerate(own):
                layers[place] = layer

    @torch.no_grad()
    def enter(self, batches: Sequence[Tensor]) -> list[Flow]:
        """Each micro-batch of token ids (B, T) at boundary 0. Equal calls are held once."""
        flows: list[Flow] = []
        with self._aside() as layers:
            for ids in batches:
                ids = ids.to(self.model.device, torch.long)
                self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
                state = layers[0].entering
                calls = [layer.call for layer in layers if layer.call is not None]
                assert state is not None
                if flows and _same(flows[-1].calls, calls):
                    calls = flows[-1].calls
                flows.append(Flow(ids, state, calls))
        return flows

    @torch.no_grad()
    def advance(self, flows: Sequence[Flow], layers: Sequence[int]) -> None:
        """Move every flow through some layers in a row, beginning at the first one's lower boundary."""
        for layer in layers:
            module = layers_of(self.model)[layer]
            with onloaded(module):
                for flow in flows:
                    flow.state = flow.calls[layer].replay(module, flow.state)

    @torch.no_grad()
    def logits(self, flow: Flow) -> Tensor:
        """(B, T, V) of a flow at the last boundary, by the model's own norm and head."""
        return self.head(flow.ids, flow.state)

    def head(self, ids: Tensor, state: Tensor, own: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (B, T, V) of a state (B, T, D) at the last boundary; gradients reach the state, and `own`.

        Norm and head act on each token alone, so that any positions of longer sequences may be given. `own` are, by
        the model's names, weights of theirs to take instead; a head that is tied to the embeddings is not then.
        """
        given = {"input_ids": ids, "use_cache": False}
        with self._aside() as layers:
            layers[-1].state = state
            if not own:
                return self.model(**given).logits
            return functional_call(self.model, dict(own), kwargs=given, tie_weights=False).logits


def grouped(batches: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Micro-batches of token ids (B, T), as many at a time as go through the model together."""
    group: list[Tensor] = []
    for ids in batches:
        if group and sum(one.numel() for one in group) + ids.numel() > GROUP_TOKENS:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group


@torch.no_grad()
def logits_of(model: PreTrainedModel, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """(B, T, V) for each micro-batch of token ids (B, T), with each layer's weights read once for many of them."""
    if not is_offloaded(model):
        for ids in batches:
            yield model(input_ids=ids.to(model.device, torch.long), use_cache=False).logits
        return
    layers = Layerwise(model)
    for group in grouped(batches):
        flows = layers.enter(group)
        layers.advance(flows, range(len(layers_of(model))))
        while flows:
            yield layers.logits(flows.pop(0))  # so that nothing of one group is left when the next begins


def _same(one: Any, other: Any) -> bool:
    """Whether two nests of calls hold the same values."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, LayerCall):
        return isinstance(other, LayerCall) and _same((one.args, one.kwargs), (other.args, other.kwargs))
    if isinstance(one, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    return one is other or bool(one == other)
