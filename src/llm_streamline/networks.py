"""The paper's FFN and SwiGLU networks, or a linear map, in the place of a decoder layer, and how a model gets one.

This file needs torch alone: a copy of it travels in every model folder that uses one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FeedForward(nn.Module):
    """down(relu(up(x))) with biases: the paper's FFN, four times as wide inside as outside."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(nn.functional.relu(self.fc1(hidden)))


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases: the paper's SwiGLU, as wide inside as the model's own MLP."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class LinearMap(nn.Linear):
    """x + x M without a bias, for M of the weight's transpose: the identity until it is given one."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(width, width, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + super().forward(hidden)


NETWORKS: dict[str, type[nn.Module]] = {"ffn": FeedForward, "swiglu": GatedFeedForward, "linear": LinearMap}


class NetworkLayer(nn.Module):
    """f(x), which predicts the whole state as in the paper; or, in the residual form, x + f(rmsnorm(x)).

    Takes a decoder layer's arguments and returns the hidden state (B, T, D). `spec` has `kind`, `residual`, `width`,
    `inner` and `eps`, the norm's; in a model also `place`, the layer's number, and `outputs`, how many values its
    layers return in a tuple, 0 for none.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        nn.Module.__init__(self)  # not super(): in a model, the class after this one is the family's own layer
        self.spec = spec
        self.network = NETWORKS[spec["kind"]](spec["width"], spec["inner"])
        self.norm = nn.RMSNorm(spec["width"], eps=spec["eps"]) if spec["residual"] else None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if "place" in self.spec:
            for value in (*args, *kwargs.values()):
                if hasattr(value, "get_seq_length"):
                    _hold_place(value, hidden_states, self.spec["place"])
        if self.norm is None:
            hidden_states = self.network(hidden_states)
        else:
            hidden_states = hidden_states + self.network(self.norm(hidden_states))
        count = self.spec.get("outputs", 0)
        return (hidden_states, *[None] * (count - 1)) if count else hidden_states


def _hold_place(cache: Any, hidden: Tensor, place: int) -> None:
    """One number per token in the cache: masks and positions may be sized by this layer's length."""
    nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
    cache.update(nothing, nothing, place)


def install(layers: nn.ModuleList, spec: dict[str, Any]) -> None:
    """Put the network that `spec` describes in the place of `layers[spec["place"]]`.

    Its class derives from the family's layer class, which is how transformers finds hidden states to hand out, and
    it keeps the plain attributes of the layer it replaces (such as its attention's type).
    """
    old = layers[spec["place"]]
    kind = type("StreamlinedLayer", (NetworkLayer, type(old)), {})
    new = kind(spec)
    for name, value in vars(old).items():
        if not name.startswith("_") and name not in vars(new) and isinstance(value, (bool, int, float, str)):
            setattr(new, name, value)
    layers[spec["place"]] = new.to(next(old.parameters()).dtype)


@torch.no_grad()
def start(layer: NetworkLayer) -> None:
    """Random weights; the residual form starts as the identity, the other as torch's own initialisation has it."""
    for module in layer.modules():
        if isinstance(module, (nn.Linear, nn.RMSNorm)):
            module.reset_parameters()
    if layer.norm is not None:
        for parameter in list(layer.network.children())[-1].parameters():
            parameter.zero_()
