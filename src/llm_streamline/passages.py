"""Micro-batches of token ids -> what crosses the window's boundaries on each: what a replacement learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_streamline.forward import Passage, run_window
from llm_streamline.layerwise import Layerwise, grouped
from llm_streamline.offload import is_offloaded
from llm_streamline.records import Window

# From token ids (B, T) of each micro-batch, in the order of training, to its passage, made when it is asked for.
Passages = Callable[[Sequence[Tensor]], Iterator[Passage]]


def passages_of(model: PreTrainedModel, window: Window, autocast: bool) -> Passages:
    """Streamed, or layer by layer where the model's weights are not held."""
    return (layer_by_layer if is_offloaded(model) else streamed)(model, window, autocast)


def streamed(model: PreTrainedModel, window: Window, autocast: bool) -> Passages:
    """The frozen layers below the window's end are run once per micro-batch, and nothing is kept past it."""

    def passages(batches: Sequence[Tensor]) -> Iterator[Passage]:
        for ids in batches:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                passage = run_window(model, window, ids.to(model.device, torch.long))
            yield passage

    return passages


def layer_by_layer(model: PreTrainedModel, window: Window, autocast: bool) -> Passages:
    """As `streamed`, to the bit; but each layer's weights are read once for many micro-batches."""
    layers = Layerwise(model)

    def passages(batches: Sequence[Tensor]) -> Iterator[Passage]:
        for group in grouped(batches):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                flows = layers.enter(group)
                layers.advance(flows, range(window.start))
                entering = [flow.state for flow in flows]
                layers.advance(flows, window.layers())
            while flows:
                flow = flows.pop(0)  # so that what has been learned from is let go
                yield Passage(entering.pop(0), flow.state, flow.calls[window.start : window.stop], flow.ids)

    return passages
