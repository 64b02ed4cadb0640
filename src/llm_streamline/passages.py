"""Micro-batches of token ids -> what crosses the window's boundaries on each: what a replacement learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_streamline.forward import Passage, run_window
from llm_streamline.records import Window

# From token ids (B, T) of each micro-batch, in the order of training, to its passage, made when it is asked for.
Passages = Callable[[Sequence[Tensor]], Iterator[Passage]]


def streamed(model: PreTrainedModel, window: Window, autocast: bool) -> Passages:
    """The frozen layers below the window's end are run once per micro-batch, and nothing is kept past it."""

    def passages(batches: Sequence[Tensor]) -> Iterator[Passage]:
        for ids in batches:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                passage = run_window(model, window, ids.to(model.device, torch.long))
            yield passage

    return passages
