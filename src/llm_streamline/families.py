"""The only file that knows architectures: where the layers are, and which config keys depend on layer numbers.

Adding a family is one row here and one tiny configuration in `tests/tiny.py`; the checklist in
`tests/test_families.py` then has to pass for it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llm_streamline.errors import UserError


@dataclass(frozen=True)
class Family:
    """One architecture whose checklist passes."""

    model_type: str
    layers: str  # path of the list of decoder layers inside the causal LM
    attention_output: str  # within a layer: the projection whose zero silences attention
    mlp: tuple[str, ...]  # within a layer: what still acts then, the MLP and the norms around it


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "model.layers", "self_attn.o_proj", ("post_attention_layernorm", "mlp")),
        Family("opt", "model.decoder.layers", "self_attn.out_proj", ("final_layer_norm", "fc1", "fc2")),
    )
}

# Config keys that bite when layers go. Forgetting one fails silently: the model loads and computes something else.
PER_LAYER_KEYS = ("layer_types", "no_rope_layers", "mlp_layer_types")  # one entry per layer
LAYER_NUMBER_KEYS = ("mlp_only_layers",)  # lists of layer numbers
THRESHOLD_KEYS = (
    "first_k_dense_replace",
    "max_window_layers",
)  # layers below the number differ from those above
# config keys and values with which layers normalise the sum they return: none of them can be the identity
SUM_NORMALISED = {"do_layer_norm_before": False, "apply_residual_connection_post_layernorm": True}
INNER_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")


def family_of(config: PretrainedConfig) -> Family:
    """The family's row. Errors: UserError for what is no causal LM or not proven."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model type {kind!r} is an encoder-decoder; give a decoder-only causal LM ({_known()}).")
    names = getattr(config, "architectures", None) or []
    if names and not any("CausalLM" in name or "LMHead" in name for name in names):
        raise UserError(
            f"the checkpoint holds {names[0]}, which is no causal LM; give a decoder-only one ({_known()})."
        )
    if kind not in FAMILIES:
        raise UserError(f"model type {kind!r} is not proven to survive the removal of layers; proven are {_known()}.")
    return FAMILIES[kind]


def _known() -> str:
    return ", ".join(FAMILIES)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's own list of decoder layers, in order."""
    layers = model.get_submodule(family_of(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def layers_prefix(config: PretrainedConfig) -> str:
    """What the state-dict keys of the decoder layers begin with, e.g. 'model.layers.'."""
    return family_of(config).layers + "."


def parameter_counts(model: PreTrainedModel) -> tuple[int, list[int]]:
    """Parameters of the whole model (tied ones once) and of each decoder layer."""
    return model.num_parameters(), [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]


def sliced_config(config: PretrainedConfig, sources: Sequence[int]) -> PretrainedConfig:
    """A new config for the model whose layer i is the source's layer `sources[i]`; `config` is left as it is."""
    changes: dict[str, Any] = {"num_hidden_layers": len(sources)}
    for key in PER_LAYER_KEYS:
        if getattr(config, key, None):
            changes[key] = [getattr(config, key)[source] for source in sources]
    for key in LAYER_NUMBER_KEYS:
        if getattr(config, key, None):
            changes[key] = [new for new, source in enumerate(sources) if source in getattr(config, key)]
    for key in THRESHOLD_KEYS:
        if getattr(config, key, None) is not None:
            changes[key] = sum(source < getattr(config, key) for source in sources)
    new = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(new, key, value)
    return new


def sliding_window(config: PretrainedConfig) -> int | None:
    """How far back the narrowest attention sees, where it is limited."""
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def never_identity(config: PretrainedConfig) -> bool:
    """Whether the layers normalise what they return, so that none can pass its input through."""
    return any(getattr(config, key, None) is value for key, value in SUM_NORMALISED.items())


def inner_width(config: PretrainedConfig) -> int:
    """The width inside the model's own MLP; four times its width where the configuration does not say."""
    given = (getattr(config, key, None) for key in INNER_WIDTH_KEYS)
    return next((width for width in given if isinstance(width, int)), 4 * config.hidden_size)
