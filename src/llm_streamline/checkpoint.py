"""A folder or Hub name -> configuration, tokenizer and model; what cannot be used is refused in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm_streamline.errors import UserError, reason
from llm_streamline.families import NOT_PROVEN, family_of, layers_prefix, try_family
from llm_streamline.inventory import SAFETENSORS, headers, stored_tensor, try_loading, weight_files
from llm_streamline.offload import device_map, watch_stored
from llm_streamline.stored import open_stored

BUNDLED = "bundled"
M = TypeVar("M", bound=torch.nn.Module)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # those of models that can be trained and cut
QUANTISED = ("quantization_config", "compression_config")
_REMOTE = "trust_remote_code"
_BUNDLED_MODEL = Path(__file__).parent / "demo" / "model"


@dataclass(frozen=True)
class Source:
    """Where a model comes from and what may be done to load it."""

    name: str
    allow_pickle: bool = False
    trust_remote_code: bool = False
    family_from: str | None = None  # where a kind that is not proven has its layers

    @property
    def path(self) -> str:
        return str(_BUNDLED_MODEL) if self.name == BUNDLED else self.name


def load_config(source: Source) -> PretrainedConfig:
    """The configuration of a supported causal LM. Errors: UserError."""
    _refuse_other_folders(source)
    config = read_config(source)
    if source.family_from:
        try_family(config, source.family_from)
    family_of(config)
    if source.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        raise UserError(
            f"{source.name} would run model code of its own, which is {NOT_PROVEN}; "
            "leave out --trust-remote-code to use the code in transformers."
        )
    if any(getattr(config, key, None) for key in QUANTISED):
        raise UserError(_quantised(source, _method(config)))
    if getattr(config, "dtype", None) not in (None, *DTYPES):
        raise UserError(
            f"{source.name}/config.json says that the weights are {_named(config.dtype)}; "
            f"give a model in {' or '.join(map(_named, DTYPES))}."
        )
    return config


def read_config(source: Source) -> PretrainedConfig:
    """The configuration of any model. Errors: UserError for none."""
    try:
        return AutoConfig.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # configurations are validated by several libraries, each with its own exceptions
        raise UserError(_no_config(source, error)) from error


def _refuse_other_folders(source: Source) -> None:
    """Errors: UserError for a file, or a local folder that is not a model's."""
    path = Path(source.path)
    if path.is_file():
        raise UserError(
            f"{source.name} is a file; give the folder of a HuggingFace causal LM, with config.json and safetensors."
        )
    if (path / "adapter_config.json").is_file():  # which transformers would load as well
        raise UserError(
            f"{source.name} holds an adapter (adapter_config.json); "
            "merge it into the model it was trained on, and give that without the adapter's files."
        )
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(f"{source.name} holds no config.json; give the folder of a HuggingFace causal LM.")


def _quantised(source: Source, how: str) -> str:
    return f"{source.name} is quantised ({how}), which cannot be trained or cut; give the model it was made from."


def _method(config: PretrainedConfig) -> str:
    given = next(value for key in QUANTISED if (value := getattr(config, key, None)))
    given = given if isinstance(given, dict) else vars(given)
    return str(getattr(given.get("quant_method"), "value", given.get("quant_method")) or "of unknown method")


def _named(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _no_config(source: Source, error: Exception) -> str:
    if _REMOTE in str(error):
        return _own_code(source)
    if Path(source.path).exists():
        return f"{source.name}/config.json cannot be used ({reason(error)}); give a HuggingFace causal LM."
    return (
        f"{source.name} is neither a folder here nor a model that the Hub gives now; "
        "give the path of a HuggingFace model folder, or a Hub name when online."
    )


def _own_code(source: Source) -> str:
    return f"{source.name} brings its own model code; read that code, then allow it with --trust-remote-code."


def load_tokenizer(source: Source, vocabulary: int) -> PreTrainedTokenizerBase:
    """The tokenizer. Errors: UserError where there is none, or it makes ids the model has no embedding for."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # every tokenizer backend has its own exceptions
        if _REMOTE in str(error):
            raise UserError(_own_code(source)) from error
        raise UserError(
            f"{source.name} has no tokenizer that loads ({type(error).__name__}); "
            "put the model's tokenizer files beside it."
        ) from error
    if tokenizer.vocab_size > vocabulary:  # added tokens are left to `check_ids`: many are never used
        raise UserError(_mismatch(tokenizer.vocab_size - 1, vocabulary))
    return tokenizer


def check_ids(ids: torch.Tensor, vocabulary: int) -> None:
    """Errors: UserError where token ids reach past the model's embeddings."""
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise UserError(_mismatch(int(ids.max()), vocabulary))


def _mismatch(highest: int, vocabulary: int) -> str:
    return (
        f"the tokenizer makes ids up to {highest} but the model embeds {vocabulary} tokens; "
        "put the tokenizer that belongs to the model into its folder."
    )


def load_model(
    source: Source, dtype: torch.dtype | str = "auto", device: str = "cpu", offload: Path | None = None
) -> PreTrainedModel:
    """The frozen model in evaluation mode. `dtype` 'auto' is the checkpoint's. Errors: UserError.

    With `offload`, its decoder layers stay on the disk until they are needed; what has to be rewritten for that, as
    for mixtures of experts, goes into that folder.
    """
    config = load_config(source)
    check_fit(source, config)
    places: dict[str, Any] = {}
    if offload is not None and (found := _stored(source, config, dtype, device)) is not None:
        watch_stored(found)
        return found.eval().requires_grad_(False)
    if offload is not None:
        places = {"device_map": device_map(without_weights(config), device), "offload_folder": offload}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            source.path,
            config=config,
            dtype=dtype,
            use_safetensors=None if source.allow_pickle else True,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are refused below, by name
            **places,
        )
    except Exception as error:  # files, pickles and formats fail in many ways
        raise UserError(
            f"the weights of {source.name} do not load ({reason(error)}); fetch them again, "
            "or allow weights in pickle form with --allow-pickle if it has no others."
        ) from error
    _refuse_other_weights(source, config, loading)
    _refuse_untied(source, config, model)
    if offload is None:
        model = model.to(device)
    else:
        watch_stored(model)
    return model.eval().requires_grad_(False)


def _stored(source: Source, config: PretrainedConfig, dtype: torch.dtype | str, device: str) -> PreTrainedModel | None:
    files = files_of(source)
    wanted = checkpoint_dtype(source, config) if isinstance(dtype, str) else dtype
    return open_stored(config, files, wanted, device) if files and files[0].suffix != ".bin" else None


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The model that a configuration describes, on the device that holds nothing. Errors: UserError for none."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # every value can be a wrong one
        raise UserError(
            f"no model can be built from {config.name_or_path}/config.json ({type(error).__name__}: {reason(error)}); "
            "fetch it again."
        ) from error


def check_fit(source: Source, config: PretrainedConfig) -> list[str]:
    """Refuse, from headers alone, a local checkpoint whose files and config.json do not belong together.

    Returns the names that are stored and have no place in the model. Errors: UserError.
    """
    check_weights(source)
    if not (files := files_of(source)):
        return []
    skeleton, stored = without_weights(config), headers(files)
    for name in sorted(stored):
        if name.endswith("weight") and not stored[name].is_floating_point():
            raise UserError(_quantised(source, f"{name} is in no float format"))
    try:
        loading = try_loading(config, stored)
    except Exception as error:  # what an older name or an expert becomes can fail in many ways
        raise UserError(
            f"the weights of {source.name} do not fit its config.json ({reason(error)}); "
            "fetch the weights that belong to it."
        ) from error
    _refuse_other_weights(source, config, loading)
    if config.tie_word_embeddings:
        _refuse_stored_head(source, skeleton, stored)
    _check_generation(source)
    return sorted(loading["unexpected_keys"])


def _refuse_other_weights(source: Source, config: PretrainedConfig, loading: dict[str, Any]) -> None:
    """Errors: UserError where transformers would fill a weight at random, or ignore one of a layer."""
    wrong = {str(key): "is missing from" for key in loading["missing_keys"]}
    for key, found, wanted in loading["mismatched_keys"]:
        wrong[str(key)] = f"has the shape {tuple(found)}, not {tuple(wanted)}, in"
    extra = (str(key) for key in loading["unexpected_keys"])
    wrong |= {key: "is unknown to the configuration of" for key in extra if _of_a_layer(key, config)}
    if wrong:
        key = min(wrong)
        raise UserError(
            f"{key} {wrong[key]} {source.name} ({len(wrong)} such weights); "
            "fetch the weights that belong to its config.json."
        )


def _of_a_layer(key: str, config: PretrainedConfig) -> bool:
    """Whether a layer would compute with it: older checkpoints also store masks, as attention.bias."""
    prefix = layers_prefix(config)
    first = prefix.partition(".")[0]  # which checkpoints of the model without its head leave out
    mask = key.endswith(("attn.bias", "attention.bias"))
    return (
        f"{first}.{key.removeprefix(f'{first}.')}".startswith(prefix) and key.endswith(("weight", ".bias")) and not mask
    )


def _refuse_stored_head(source: Source, skeleton: PreTrainedModel, stored: dict[str, torch.Tensor]) -> None:
    """Errors: UserError where the head is said to be the embeddings and is stored with other values."""
    for pair in getattr(skeleton, "all_tied_weights_keys", {}).items():
        names = [next((own for own in (name, name.partition(".")[2]) if own in stored), None) for name in pair]
        if None in names:
            continue
        head, embeddings = (stored_tensor(files_of(source), str(name)) for name in names)
        if not torch.equal(head.to(embeddings.dtype), embeddings):
            raise UserError(_untied(source, pair[0]))


def _refuse_untied(source: Source, config: PretrainedConfig, model: PreTrainedModel) -> None:
    """The same of a loaded model, as those from the Hub are. Errors: UserError."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if config.tie_word_embeddings and head is not None and not torch.equal(head.weight, embeddings.weight):
        raise UserError(_untied(source, "the head's weight"))


def _untied(source: Source, name: str) -> str:
    return (
        f"config.json of {source.name} ties the head to the embeddings, but {name} is stored with other values; "
        "set tie_word_embeddings to false there, or fetch the weights that belong to it."
    )


def _check_generation(source: Source) -> None:
    """Errors: UserError for a damaged generation_config.json, which transformers would leave out without a word."""
    if (Path(source.path) / "generation_config.json").is_file():
        try:
            GenerationConfig.from_pretrained(source.path)
        except Exception as error:
            raise UserError(
                f"{source.name}/generation_config.json cannot be used ({reason(error)}); fetch it again, or delete it."
            ) from error


@torch.no_grad()
def round_weights(model: M, dtype: torch.dtype) -> M:
    """Round, in place, what a save writes to what `dtype` holds.

    Only that: `model.to(dtype)` would also round buffers that are computed and never saved, such as rotary frequencies.
    """
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    return model


def check_weights(source: Source) -> None:
    """Refuse a local folder without safetensors, or with a shard that is missing, cut short or corrupt, by name."""
    folder = Path(source.path)
    if not folder.is_dir():
        return
    files = files_of(source)
    if not files and any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{source.name} has weights in pickle form only, which can run code; "
            "convert them to safetensors, or allow them with --allow-pickle."
        )
    if not files:
        raise UserError(f"{source.name} holds no {SAFETENSORS}; put the model's weights there.")
    if not headers(files):
        raise UserError(f"{source.name} holds weights files without a tensor; fetch them again.")


def files_of(source: Source) -> list[Path]:
    """A local checkpoint's weights; none for one on the Hub."""
    return weight_files(Path(source.path), source.allow_pickle) if Path(source.path).is_dir() else []


def weight_bytes(folder: Path) -> int | None:
    """Bytes of a folder's weights on the disk; None for what is no folder here."""
    if not folder.is_dir():
        return None
    return sum(file.stat().st_size for file in weight_files(folder, allow_pickle=True))


def checkpoint_dtype(source: Source, config: PretrainedConfig) -> torch.dtype:
    """The number format the checkpoint's weights are in: the configuration's word, else the first stored tensor's."""
    if (dtype := getattr(config, "dtype", None)) is not None:
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    stored = headers(files_of(source))
    floats = (stored[name].dtype for name in sorted(stored) if stored[name].dtype in DTYPES)
    return next(floats, torch.float32)


def context_length(config: PretrainedConfig) -> int:
    """The longest sequence the model takes, in tokens."""
    return int(getattr(config, "max_position_embeddings", None) or 2048)
