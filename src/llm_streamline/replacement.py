"""What can stand in for a window: layers and MLPs of the model's own kind, the paper's networks, linear maps.

They are run with the inputs that the model's own forward passed to the layers whose places they take, so that masks
and positions are right in training as they are later.

    none            nothing                                                       0 layers occupied
    layer, layer:k  one or k decoder layers of the model's own class              1 or k
    mlp             the family's MLP with its norm and residual: a decoder layer
                    whose attention output is zero and of which only the rest
                    is trained                                                    1
    merged          one layer made of the window's own, untrained                 1
    ffn, swiglu     the paper's networks, without norm and residual; with
                    ':residual' x + f(norm(x)); saved with code of their own      1
    linear          a map in closed form, folded into the MLP below the window    0
    linear:free     x + x M in closed form; saved with code of its own            1
    linear:patch    the same, its channels only scaled in a rotated space         1
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llm_streamline.architectures import RECURRING
from llm_streamline.errors import UserError
from llm_streamline.families import (
    family_of,
    inner_width,
    kinds_of_layers,
    layers_of,
    mixing,
    never_identity,
)
from llm_streamline.forward import LayerCall
from llm_streamline.networks import NETWORKS, NetworkLayer, start
from llm_streamline.offload import onloaded
from llm_streamline.optimizers import Pace
from llm_streamline.records import FOLDED


class ReplacementLayers(nn.ModuleList):
    """k stand-ins in the place of a window's first k layers; none of them is the identity."""

    def run(self, hidden: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        """Hidden states (B, T, D) leaving the replacement; `calls` are the window's, of which the first k are used."""
        for layer, call in zip(self, calls, strict=False):
            hidden = call.replay(layer, hidden)
        return hidden

    def count(self) -> int:
        """How many parameters there are."""
        return sum(parameter.numel() for parameter in self.parameters())

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def paces(self) -> list[Pace]:
        """What trains, beside how many times the learning rate it trains with."""
        return [Pace(1.0, self.trained())]

    def above(self) -> dict[str, nn.Parameter]:
        """What trains of the norm and the head above the last layer, by the source's names."""
        return {}


def build_replacement(
    model: PreTrainedModel,
    places: Sequence[int],
    init: str,
    seed: int,
    replace: str = "layer",
    starts: Sequence[int] | None = None,
) -> ReplacementLayers:
    """Float32 stand-ins for the given places of `model`, on the CPU, ready to be trained. Dropout stays off.

    Args: places: the source layers whose places are taken. init: 'random', or else the weights of the layers there.
    starts: the layers whose weights are taken instead, one per place.
    Errors: UserError where the family's layers cannot give what is asked.
    """
    if network_spec(replace, model.config):
        layers = _networks(model, places, init, seed, replace)
    else:
        layers = ReplacementLayers(copied(layers_of(model)[place]) for place in places).float()
        for layer, start in zip(layers, starts or (), strict=bool(starts)):
            layer.load_state_dict(copied(layers_of(model)[start]).state_dict())
        if init == "random":
            _randomize(layers, model, seed)
    layers.eval().requires_grad_(True)
    if replace == "mlp":
        _silence_attention(layers, model.config)
    return layers


def fits(model: PreTrainedModel, layer: int, place: int) -> bool:
    """Whether the weights of one layer have the names and shapes of another's, in whose place they could be."""
    shapes = ({key: value.shape for key, value in layers_of(model)[one].state_dict().items()} for one in (layer, place))
    return next(shapes) == next(shapes)


def copied(layer: nn.Module) -> nn.Module:
    """A layer of its own with the same weights, wherever those are stored."""
    with onloaded(layer) as bare:
        return copy.deepcopy(bare)


def network_spec(replace: str, config: PretrainedConfig) -> dict[str, Any] | None:
    """What `networks.NetworkLayer` is made from; None for replacements of the model's own layers. Errors: UserError."""
    kind, _, form = replace.partition(":")
    if kind not in NETWORKS or replace == FOLDED:
        return None
    if {*RECURRING, "hybrid"} & {*(kinds_of_layers(config) or ())}:
        raise UserError(
            f"--replace {replace} puts a network in a layer's place, which the cache of a model whose layers recur "
            f"cannot hold ({config.model_type!r}); use --replace layer or none."
        )
    width = config.hidden_size
    inner = 4 * width if kind == "ffn" else inner_width(config)
    eps = getattr(config, "rms_norm_eps", 1e-6)
    return {"kind": kind, "residual": form == "residual", "width": width, "inner": inner, "eps": eps}


def _networks(model: PreTrainedModel, places: Sequence[int], init: str, seed: int, replace: str) -> ReplacementLayers:
    spec = network_spec(replace, model.config)
    assert spec is not None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [NetworkLayer(spec) for _ in places]
        for layer in layers:
            start(layer)
    if init == "inherited":
        for layer, place in zip(layers, places, strict=True):
            with onloaded(layers_of(model)[place]) as source:
                _inherit(layer, source, model.config, replace)
    return ReplacementLayers(layers)


def _inherit(layer: NetworkLayer, source: nn.Module, config: PretrainedConfig, replace: str) -> None:
    """Take the source layer's MLP, and its norm in the residual form, where they are the same. Errors: UserError."""
    weights, norm = _same_network(layer.network, source, config, replace), None
    if layer.norm is not None:
        norm = _norm_before_mlp(source, config)
    if weights is None or (layer.norm is not None and norm is None):
        raise UserError(
            f"--replace {replace} cannot inherit: the model's own MLP is another network (another form, width, norm or "
            "activation); use --init random, or --replace mlp."
        )
    layer.network.load_state_dict(weights)
    if layer.norm is not None and norm is not None:
        layer.norm.weight.data.copy_(norm)


def _same_network(
    network: nn.Module, source: nn.Module, config: PretrainedConfig, replace: str
) -> dict[str, Tensor] | None:
    """The weights of the source layer's MLP, where it has just those of `network`, in the same shapes."""
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    parts = {key.partition(".")[0] for key in shapes}
    own = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    if own != {"ffn": "relu", "swiglu": "silu"}[replace.partition(":")[0]]:
        return None
    for module in filter(None, (source, getattr(source, "mlp", None))):
        weights = {key: value for key, value in module.state_dict().items() if key.partition(".")[0] in parts}
        if {key: value.shape for key, value in weights.items()} == shapes:
            return {key: value.float() for key, value in weights.items()}
    return None


def _norm_before_mlp(source: nn.Module, config: PretrainedConfig) -> Tensor | None:
    """The weight of the one norm that feeds the MLP, where it is one without a bias and none follows the MLP."""
    *norms, last = family_of(config).mlp
    if len(norms) != 1 or last != "mlp":
        return None
    weights = source.get_submodule(norms[0]).state_dict()
    return weights["weight"].float() if set(weights) == {"weight"} else None


def _silence_attention(layers: nn.ModuleList, config: PretrainedConfig) -> None:
    """Zero what attention adds, for good, and train only the parts that still act. Errors: UserError."""
    if never_identity(config):
        raise UserError(
            "--replace mlp needs layers that add to the state they are given; this model normalises the sum, so that "
            "a layer without attention can never be the identity: use --replace layer."
        )
    family = family_of(config)
    if not family.mixers():
        raise UserError(
            f"--replace mlp needs layers with an MLP beside what mixes tokens, which are not known in this "
            f"{config.model_type!r}; use --replace layer."
        )
    layers.requires_grad_(False)
    for layer in layers:
        for module in mixing(layer, family):
            for parameter in module.parameters():
                parameter.data.zero_()
        for name in family.mlp:
            for module in [module for path, module in layer.named_modules() if path == name]:
                module.requires_grad_(True)


def _randomize(layers: nn.Module, model: PreTrainedModel, seed: int) -> None:
    """Fresh weights by the model's own initialisation; the caller's random state is left as it was."""
    for module in layers.modules():
        for thing in (module, *module.parameters(recurse=False)):
            if hasattr(thing, "_is_hf_initialized"):  # transformers leaves alone what it has marked so
                del thing._is_hf_initialized
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        layers.apply(model._init_weights)
