"""The only file that knows architectures: where the layers are, and which config keys depend on layer numbers.

Adding a family is one row here and one tiny configuration in `tests/tiny.py`; the checklist in
`tests/test_families.py` then has to pass for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from llm_streamline.errors import UserError

Changes = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One architecture whose checklist passes."""

    model_type: str
    layers: str  # path of the list of decoder layers inside the causal LM
    attention_output: str  # within a layer: the projection whose zero weight and bias silence attention
    mlp: tuple[str, ...]  # within a layer: what can still act then; names that an option leaves out are ignored
    down: tuple[str, ...] = ("mlp.down_proj",)  # within a layer: the MLP's last projections; none if a norm follows
    added: str = "mlp"  # within a layer: the module whose output is what the MLP adds to the stream
    refused: tuple[tuple[str, str], ...] = ()  # options that must be off, and why
    changes: Callable[[Changes], Changes] | None = None  # from the sliced config keys to more of them
    norm: str = "norm"  # beside the layers: what follows the last of them


def _attention_types(sliced: Changes) -> Changes:
    """The compact spelling, from which the list per layer is made anew whenever a config is loaded."""
    return {"attention_types": [[[kind], 1] for kind in sliced["attention_layers"]]}


_PLAIN = ("model.layers", "self_attn.o_proj", ("post_attention_layernorm", "mlp"))
_SANDWICH = ("model.layers", "self_attn.o_proj", ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"))
_DENSE_4H = ("mlp.dense_4h_to_h",)
_BOTH_WAYS = (("use_bidirectional_attention", "its tokens see later ones"),)
_GPT2_OPTIONS = (
    ("scale_attn_by_inverse_layer_idx", "its attention is scaled by the layer's number"),
    ("add_cross_attention", "it attends to the output of an encoder"),
)

FAMILIES = {
    family.model_type: family
    for family in (
        # norms that act only with some option (parallel or not, before or after) are named all the same
        Family("llama", *_PLAIN),
        Family("mistral", *_PLAIN),
        Family("qwen2", *_PLAIN),
        Family("qwen3", *_PLAIN),
        Family("gemma2", *_SANDWICH, down=(), refused=_BOTH_WAYS),
        Family("gemma3_text", *_SANDWICH, down=(), refused=_BOTH_WAYS),
        Family("phi3", *_PLAIN),
        Family(
            "phi",
            "model.layers",
            "self_attn.dense",
            ("input_layernorm", "mlp"),
            down=("mlp.fc2",),
            norm="final_layernorm",
        ),
        Family(
            "opt",
            "model.decoder.layers",
            "self_attn.out_proj",
            ("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"),
            down=("fc2",),
            added="fc2",
            norm="final_layer_norm",
        ),
        Family(
            "gpt2", "transformer.h", "attn.c_proj", ("ln_2", "mlp"), ("mlp.c_proj",), refused=_GPT2_OPTIONS, norm="ln_f"
        ),
        Family(
            "gpt_neox",
            "gpt_neox.layers",
            "attention.dense",
            ("post_attention_layernorm", "mlp"),
            _DENSE_4H,
            norm="final_layer_norm",
        ),
        Family(
            "gpt_neo",
            "transformer.h",
            "attn.attention.out_proj",
            ("ln_2", "mlp"),
            ("mlp.c_proj",),
            changes=_attention_types,
            norm="ln_f",
        ),
        Family(
            "bloom",
            "transformer.h",
            "self_attention.dense",
            ("input_layernorm", "post_attention_layernorm", "mlp"),
            _DENSE_4H,
            added=_DENSE_4H[0],  # its mlp module returns the sum with the stream
            norm="ln_f",
        ),
        Family(
            "falcon",
            "transformer.h",
            "self_attention.dense",
            ("input_layernorm", "ln_mlp", "post_attention_layernorm", "mlp"),
            _DENSE_4H,
            norm="ln_f",
        ),
        Family("olmo2", "model.layers", "self_attn.o_proj", ("mlp", "post_feedforward_layernorm"), down=()),
        Family("granite", *_PLAIN),
        Family("starcoder2", *_PLAIN, down=("mlp.c_proj",)),
        Family("smollm3", *_PLAIN),
        Family("cohere2", "model.layers", "self_attn.o_proj", ("input_layernorm", "mlp")),
        Family("mixtral", *_PLAIN, down=("mlp.experts.down_proj",)),
        Family("qwen3_moe", *_PLAIN, down=("mlp.down_proj", "mlp.experts.down_proj")),
    )
}

# Kinds that are known not to fit, for a better reason than "not proven". Where none is given, that is the reason.
_UNFIT = {
    "an encoder-decoder": "bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody "
    "mvp pegasus plbart prophetnet trocr whisper",
    "an encoder": "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer rembert "
    "roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod",
    "a state-space or hybrid model": "bailing_hybrid bamba falcon_h1 falcon_mamba "
    "granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3 mamba mamba2 nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe "
    "qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm zamba zamba2",
    "computed with the number of each layer": "beam diffllama inkling2_text minimax",
    "one whose layers share keys and values with earlier ones": "gemma3n gemma3n_text gemma4 gemma4_text",
}
REASONS = {name: reason for reason, names in _UNFIT.items() for name in names.split()}
_LISTED = "'llm-streamline families' lists what is proven"
NOT_PROVEN = "not proven to survive the removal of layers"

# Config keys that bite when layers go. Forgetting one fails silently: the model loads and computes something else.
# Periods that transformers spells out in a list per layer (sliding_window_pattern, no_rope_layer_interval) stay as
# they are: the list wins.
PER_LAYER_KEYS = ("layer_types", "no_rope_layers", "mlp_layer_types", "attention_layers")  # one entry per layer
LAYER_NUMBER_KEYS = ("mlp_only_layers",)  # lists of layer numbers
THRESHOLD_KEYS = ("first_k_dense_replace", "max_window_layers")  # layers below the number differ from those above
# config keys and values with which layers normalise the sum they return: none of them can be the identity
SUM_NORMALISED = {"do_layer_norm_before": False, "apply_residual_connection_post_layernorm": True}
NORM_AFTER_MLP = {"do_layer_norm_before": False}  # as above, and the sum's norm comes after the MLP
INNER_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")


def family_of(config: PretrainedConfig) -> Family:
    """The family's row. Errors: UserError for what is no causal LM, or not proven, with the reason."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model type {kind!r} is an encoder-decoder; give a decoder-only causal LM: {_LISTED}.")
    names = getattr(config, "architectures", None) or []
    if names and not any("CausalLM" in name or "LMHead" in name for name in names):
        raise UserError(f"the checkpoint holds {names[0]}, which is no causal LM; give a decoder-only one: {_LISTED}.")
    if not type(config).__module__.startswith("transformers."):
        raise UserError(
            f"model type {kind!r} runs its own code, which is {NOT_PROVEN}; give a model that transformers knows, "
            "or this one without --trust-remote-code if it does."
        )
    if kind not in FAMILIES:
        raise UserError(f"model type {kind!r} is {_why_not(config)}; give another: {_LISTED}.")
    _refuse_options(FAMILIES[kind], config)
    return FAMILIES[kind]


def _refuse_options(family: Family, config: PretrainedConfig) -> None:
    own = ("is_heterogeneous", "single layers have settings of their own (per_layer_config)")
    for option, why in (*family.refused, own):
        if getattr(config, option, False):
            raise UserError(
                f"model type {config.model_type!r} with {option} is {NOT_PROVEN}, as {why}; give a model without it."
            )


def _why_not(config: PretrainedConfig) -> str:
    """The reason; where there is none but that nobody tried, what would be needed to try."""
    if config.model_type in REASONS:
        return f"{REASONS[config.model_type]}, and {NOT_PROVEN}"
    try:
        with torch.device("meta"):
            path = find_stack(AutoModelForCausalLM.from_config(config))
    except Exception:  # a model that cannot be built has no layers to point at; the refusal stands all the same
        path = None
    found = f" (its layers seem to be at {path}: it can be added as a row, see CONTRIBUTING.md)" if path else ""
    return NOT_PROVEN + found


def find_stack(model: PreTrainedModel) -> str | None:
    """Path of what looks like the decoder layers: of the lists as long as the config says, the heaviest."""
    length = getattr(model.config, "num_hidden_layers", None)
    stacks = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == length
    }
    return max(stacks, key=lambda path: stacks[path]) if stacks else None


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's own list of decoder layers, in order."""
    layers = model.get_submodule(family_of(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """What follows the last layer; None where the model is put together without."""
    family = family_of(model.config)
    norm = getattr(model.get_submodule(family.layers.rpartition(".")[0]), family.norm)
    assert norm is None or isinstance(norm, nn.Module)
    return norm


def layers_prefix(config: PretrainedConfig) -> str:
    """What the state-dict keys of the decoder layers begin with, e.g. 'model.layers.'."""
    return family_of(config).layers + "."


def parameter_counts(model: PreTrainedModel) -> tuple[int, list[int]]:
    """Parameters of the whole model (tied ones once) and of each decoder layer."""
    return model.num_parameters(), [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]


def sliced_config(config: PretrainedConfig, sources: Sequence[int]) -> PretrainedConfig:
    """A new config for the model whose layer i is the source's layer `sources[i]`; `config` is left as it is."""
    changes = {"num_hidden_layers": len(sources), **_sliced_keys(config, sources)}
    more = family_of(config).changes
    if more:
        changes |= more(changes)
    new = copy.deepcopy(config)
    if hasattr(new, "auto_map"):  # names files of code that came with the source and are not carried along
        del new.auto_map
    for key, value in changes.items():
        setattr(new, key, value)
    return new


def _sliced_keys(config: PretrainedConfig, sources: Sequence[int]) -> Changes:
    """Every key that depends on layer numbers, for the layers that stay."""
    changes: Changes = {}
    for key in PER_LAYER_KEYS:
        if getattr(config, key, None):
            changes[key] = [getattr(config, key)[source] for source in sources]
    for key in LAYER_NUMBER_KEYS:
        if getattr(config, key, None):
            changes[key] = [new for new, source in enumerate(sources) if source in getattr(config, key)]
    for key in THRESHOLD_KEYS:
        if getattr(config, key, None) is not None:
            changes[key] = sum(source < getattr(config, key) for source in sources)
    return changes | _unrolled_period(config, sources)


def _unrolled_period(config: PretrainedConfig, sources: Sequence[int]) -> Changes:
    """Every n-th layer has experts: after a removal no period says which, so the others are listed."""
    step = getattr(config, "decoder_sparse_step", None) or 1
    if step == 1:
        return {}
    listed = getattr(config, "mlp_only_layers", None) or []
    dense = [new for new, source in enumerate(sources) if source in listed or (source + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def sliding_window(config: PretrainedConfig) -> int | None:
    """How far back the narrowest attention sees, where it is limited."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is not None and not {"sliding_attention", "local"} & set(kinds):
        return None
    if kinds is None and not getattr(config, "use_sliding_window", True):
        return None
    windows = [getattr(config, key, None) for key in ("sliding_window", "window_size")]
    return min((window for window in windows if window), default=None)


def known_families() -> list[dict[str, str]]:
    """Every causal LM that the installed transformers knows: model_type, status (proven or refused) and the reason."""
    proven = [{"model_type": kind, "status": "proven", "reason": _proof(row)} for kind, row in FAMILIES.items()]
    others = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(FAMILIES))
    return proven + [
        {"model_type": kind, "status": "refused", "reason": REASONS.get(kind, NOT_PROVEN)} for kind in others
    ]


def _proof(family: Family) -> str:
    refused = "; ".join(f"not with {option}, as {why}" for option, why in family.refused)
    folding = "" if family.down else "no --replace linear, as a norm follows the MLP's output"
    return "; ".join(filter(None, ("passes the checklist", refused, folding)))


def never_identity(config: PretrainedConfig) -> bool:
    """Whether the layers normalise what they return, so that none can pass its input through."""
    return any(getattr(config, key, None) is value for key, value in SUM_NORMALISED.items())


def inner_width(config: PretrainedConfig) -> int:
    """The width inside the model's own MLP; four times its width where the configuration does not say."""
    given = (getattr(config, key, None) for key in INNER_WIDTH_KEYS)
    return next((width for width in given if isinstance(width, int)), 4 * config.hidden_size)


def mlp_output(config: PretrainedConfig) -> tuple[str, float]:
    """Within a layer, the module whose output, times the number, is what the MLP adds to the stream.

    Errors: UserError where the MLP's last projection does not decide that, so that no map can be folded into it.
    """
    family, why = family_of(config), None
    if not family.down or any(getattr(config, key, None) is value for key, value in NORM_AFTER_MLP.items()):
        why = "a norm follows the MLP's output"
    elif getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        why = "its projections are computed in slices (slow_but_exact)"
    if why:
        raise UserError(
            f"--replace linear folds a map into an MLP's output projection, and in this {config.model_type!r} {why}; "
            "use --replace layer, none, or linear:free."
        )
    return family.added, float(getattr(config, "residual_multiplier", 1.0))


def output_weights(layer: nn.Module, config: PretrainedConfig) -> dict[str, int]:
    """The layer's state-dict keys of its MLP's output projections, each with the axis that counts the outputs.

    A mixture has one weight (E, outputs, inputs) for its E experts.
    """
    modules, parameters = dict(layer.named_modules()), dict(layer.named_parameters())
    found: dict[str, int] = {}
    for name in family_of(config).down:
        if name in parameters:
            found[name] = 1
        for own, _ in modules[name].named_parameters() if name in modules else ():
            found[f"{name}.{own}"] = int(own == "weight" and isinstance(modules[name], Conv1D))
    return found
