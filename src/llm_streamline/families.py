"""What is asked of a model's architecture: its row in the table, its layers, and the configuration of fewer of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from llm_streamline.architectures import (
    FAMILIES,
    FURTHER_TOKENS_KEYS,
    INNER_WIDTH_KEYS,
    LAST_KEYS,
    LAYER_NUMBER_KEYS,
    NORM_AFTER_MLP,
    NOT_PROVEN,
    PER_LAYER_KEYS,
    PERIOD_KEYS,
    REASONS,
    SUM_NORMALISED,
    THRESHOLD_KEYS,
)
from llm_streamline.errors import UserError
from llm_streamline.family import Changes, Family

TRIED: dict[str, Family] = {}  # kinds that --family-from names, in this process
NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "layer_norm")
LISTED = "'llm-streamline families' lists what is proven"


def family_of(config: PretrainedConfig) -> Family:
    """The family's row. Errors: UserError for what is no causal LM, or not proven, with the reason."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model type {kind!r} is an encoder-decoder; give a decoder-only causal LM: {LISTED}.")
    text = getattr(config, "text_config", None)
    if isinstance(text, PretrainedConfig) and has_row(text):
        raise UserError(
            f"model type {kind!r} does not only read; take its text model ({text.model_type!r}) out of it with "
            "'llm-streamline text-model MODEL -o FOLDER', and give that folder."
        )
    names = getattr(config, "architectures", None) or []
    if names and not any("CausalLM" in name or "LMHead" in name for name in names):
        raise UserError(f"the checkpoint holds {names[0]}, which is no causal LM; give a decoder-only one: {LISTED}.")
    if not type(config).__module__.startswith("transformers."):
        raise UserError(
            f"model type {kind!r} runs its own code, which is {NOT_PROVEN}; give a model that transformers knows, "
            "or this one without --trust-remote-code if it does."
        )
    family = FAMILIES.get(kind) or TRIED.get(kind)
    if family is None:
        raise UserError(f"model type {kind!r} is {_why_not(config)}; give another: {LISTED}.")
    _refuse_options(family, config)
    return family


def has_row(config: PretrainedConfig) -> bool:
    """Whether the kind is proven, whatever its options."""
    return config.model_type in FAMILIES


def try_family(config: PretrainedConfig, layers: str) -> None:
    """Let a kind of model that has no row be worked on, with its decoder layers at a path, from now on.

    Errors: UserError for a kind that has a row, or a reason against it, and for a path where no layers are.
    """
    kind = config.model_type
    if kind in TRIED and TRIED[kind].layers == layers:
        return
    if kind in FAMILIES or kind in REASONS:
        why = "is proven, and needs no path" if kind in FAMILIES else f"is {REASONS[kind]}"
        raise UserError(f"--family-from {layers} was given, but model type {kind!r} {why}; leave it out.")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UserError(f"model type {kind!r} is no causal language model of transformers; give one.") from error
    modules = dict(model.named_modules())
    found = modules.get(layers)
    if not isinstance(found, nn.ModuleList) or len(found) != config.num_hidden_layers:
        raise UserError(
            f"--family-from {layers} is no list of {config.num_hidden_layers} layers in model type {kind!r}; they seem "
            f"to be at {find_stack(model)}."
        )
    beside = dict(modules[layers.rpartition(".")[0]].named_children())
    norm = next((name for name in NORM_NAMES if name in beside), None)
    if norm is None:
        raise UserError(
            f"beside {layers} none of {', '.join(NORM_NAMES)} is found in model type {kind!r}; it needs a row."
        )
    TRIED[kind] = Family(kind, layers, (), (), down=(), norm=norm, unfoldable="nobody knows its MLP", tried=True)


def _refuse_options(family: Family, config: PretrainedConfig) -> None:
    for key in PERIOD_KEYS:
        if (getattr(config, key, None) or 1) > 1:
            raise UserError(
                f"model type {config.model_type!r} with {key} {getattr(config, key)} is {NOT_PROVEN}, as no list says "
                "which layers are meant; give a model where it is 1."
            )
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
    if path is None:
        return NOT_PROVEN
    return (
        f"{NOT_PROVEN} (its layers seem to be at {path}: try --family-from {path}, or add a row, see CONTRIBUTING.md)"
    )


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


def kinds_of_layers(config: PretrainedConfig) -> list[str] | None:
    """Of each layer what it mixes tokens by, where the configuration tells."""
    found = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return list(found) if found else None


def mixing(layer: nn.Module, family: Family) -> list[nn.Module]:
    """The last projections of what mixes tokens in this layer: of its attention, or of what stands there."""
    modules = dict(layer.named_modules())
    return [modules[name] for name in family.mixers() if name in modules]


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
        changes |= more(config, changes, sources)
    new = copy.deepcopy(config)
    if hasattr(new, "auto_map"):  # names files of code that came with the source and are not carried along
        del new.auto_map
    for key, value in changes.items():
        setattr(new, key, value)
    return new


def _sliced_keys(config: PretrainedConfig, sources: Sequence[int]) -> Changes:
    """Every key that depends on layer numbers, for the layers that stay."""
    changes: Changes = {}
    own = _lists_as_long(config) if family_of(config).tried else []
    for key in (*PER_LAYER_KEYS, *own):
        if _stored(config, key) and isinstance(getattr(config, key, None), list) and getattr(config, key):
            changes[key] = [getattr(config, key)[source] for source in sources]
    for key in LAYER_NUMBER_KEYS:
        if getattr(config, key, None):
            changes[key] = [new for new, source in enumerate(sources) if source in getattr(config, key)]
    for key in THRESHOLD_KEYS:
        if getattr(config, key, None) is not None:
            changes[key] = sum(source < getattr(config, key) for source in sources)
    for key in LAST_KEYS:
        if getattr(config, key, None) is not None:
            changes[key] = sum(source <= getattr(config, key) for source in sources) - 1
    changes |= {key: 0 for key in FURTHER_TOKENS_KEYS if getattr(config, key, None)}
    return changes | _unrolled_period(config, sources)


def _stored(config: PretrainedConfig, key: str) -> bool:
    """Whether a key is kept, and not made of others whenever it is asked for."""
    return not isinstance(getattr(type(config), config.attribute_map.get(key, key), None), property)


def _lists_as_long(config: PretrainedConfig) -> list[str]:
    """Keys that seem to have an entry per layer, where no row says which have."""
    listed = {key: value for key, value in config.to_dict().items() if isinstance(value, list)}
    return [key for key, value in listed.items() if len(value) == config.num_hidden_layers]


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
    own = {CONFIG_MAPPING_NAMES[kind] for kind in FAMILIES if kind in CONFIG_MAPPING_NAMES}  # some have several names
    others = sorted(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if CONFIG_MAPPING_NAMES.get(kind) not in own)
    return proven + [
        {"model_type": kind, "status": "refused", "reason": REASONS.get(kind, NOT_PROVEN)} for kind in others
    ]


def _proof(family: Family) -> str:
    refused = "; ".join(f"not with {option}, as {why}" for option, why in family.refused)
    folding = "" if family.down else f"no --replace linear, as {family.unfoldable}"
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
        why = family.unfoldable
    elif getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        why = "its projections are computed in slices (slow_but_exact)"
    if why:
        raise UserError(
            f"--replace linear folds a map into an MLP's output projection, and in this {config.model_type!r} {why}; "
            "use --replace layer, none, or linear:free."
        )
    return family.added, _added_times(config)


def _added_times(config: PretrainedConfig) -> float:
    """What is multiplied with before the stream takes it in."""
    if hasattr(config, "scale_depth"):
        return float(config.scale_depth / config.num_hidden_layers**0.5)
    return float(getattr(config, "residual_multiplier", 1.0))


def output_weights(layer: nn.Module, config: PretrainedConfig) -> dict[str, int]:
    """The layer's state-dict keys of its MLP's output projections, each with the axis that counts the outputs.

    A mixture has one weight (E, outputs, inputs) for its E experts.
    """
    modules, parameters = dict(layer.named_modules()), dict(layer.named_parameters())
    found: dict[str, int] = {}
    for listed in family_of(config).down:
        name, _, axis = listed.partition(":")
        if name in parameters:
            found[name] = int(axis or min(1, parameters[name].ndim - 1))
        for own, value in modules[name].named_parameters() if name in modules else ():
            outputs_last = isinstance(modules[name], Conv1D) or value.ndim == 3
            found[f"{name}.{own}"] = int(own == "weight" and outputs_last)
    return found
