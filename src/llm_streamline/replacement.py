"""The networks that can stand in for a window.

Here: none, and k layers of the model's own class. They are run with the inputs that the model's own forward passed
to the layers whose places they take, so that masks and positions are right in training as they are later.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_streamline.families import layers_of
from llm_streamline.forward import LayerCall


class ReplacementLayers(nn.ModuleList):
    """k decoder layers in the place of a window's first k; none of them is the identity."""

    def run(self, hidden: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        """Hidden states (B, T, D) leaving the replacement; `calls` are the window's, of which the first k are used."""
        for layer, call in zip(self, calls, strict=False):
            hidden = call.replay(layer, hidden)
        return hidden

    def count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def build_replacement(model: PreTrainedModel, places: Sequence[int], init: str, seed: int) -> ReplacementLayers:
    """Float32 layers for the given places of `model`: copies of its layers there, or the same with random weights.

    Args: places: the source layers whose places are taken. init: 'inherited' or 'random'. Dropout stays off.
    """
    layers = ReplacementLayers(copy.deepcopy(layers_of(model)[place]) for place in places).float()
    if init == "random":
        _randomize(layers, model, seed)
    return layers.eval().requires_grad_(True)


def _randomize(layers: nn.Module, model: PreTrainedModel, seed: int) -> None:
    """Fresh weights by the model's own initialisation; the caller's random state is left as it was."""
    for module in layers.modules():
        for thing in (module, *module.parameters(recurse=False)):
            if hasattr(thing, "_is_hf_initialized"):  # transformers leaves alone what it has marked so
                del thing._is_hf_initialized
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        layers.apply(model._init_weights)
