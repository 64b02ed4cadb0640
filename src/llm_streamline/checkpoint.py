"""A folder or Hub name -> configuration, tokenizer and model; what cannot be used is refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm_streamline.errors import UserError, reason
from llm_streamline.families import NOT_PROVEN, family_of, layers_prefix, try_family
from llm_streamline.files import sha256
from llm_streamline.offload import device_map, watch_stored
from llm_streamline.stored import open_stored

BUNDLED = "bundled"
_LOOK = 4096  # bytes in the middle of each tensor
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
    folder = Path(source.path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"{source.name} holds no config.json; give the folder of a HuggingFace causal LM.")
    try:
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # configurations are validated by several libraries, each with its own exceptions
        raise UserError(_no_config(source, error)) from error
    if source.family_from:
        try_family(config, source.family_from)
    family_of(config)
    if source.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        raise UserError(
            f"{source.name} would run model code of its own, which is {NOT_PROVEN}; "
            "leave out --trust-remote-code to use the code in transformers."
        )
    if getattr(config, "quantization_config", None):
        raise UserError(f"{source.name} is quantised, which cannot be trained or cut; give the model it was made from.")
    return config


def _no_config(source: Source, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return f"{source.name} brings its own model code; read that code, then allow it with --trust-remote-code."
    if Path(source.path).exists():
        return f"{source.name}/config.json cannot be used ({reason(error)}); give a HuggingFace causal LM."
    return (
        f"{source.name} is neither a folder here nor a model that the Hub gives now; "
        "give the path of a HuggingFace model folder, or a Hub name when online."
    )


def load_tokenizer(source: Source, vocabulary: int) -> PreTrainedTokenizerBase:
    """The tokenizer. Errors: UserError where there is none, or it makes ids the model has no embedding for."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # every tokenizer backend has its own exceptions
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
    check_weights(source)
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
            **places,
        )
    except Exception as error:  # files, pickles and formats fail in many ways
        raise UserError(
            f"the weights of {source.name} do not load ({reason(error)}); fetch them again, "
            "or allow weights in pickle form with --allow-pickle if it has no others."
        ) from error
    _refuse_other_weights(source, config, loading)
    if offload is None:
        model = model.to(device)
    else:
        watch_stored(model)
    return model.eval().requires_grad_(False)


def _stored(source: Source, config: PretrainedConfig, dtype: torch.dtype | str, device: str) -> PreTrainedModel | None:
    files = [Path(source.path) / shard for shard in (_shards(Path(source.path)) if Path(source.path).is_dir() else [])]
    wanted = checkpoint_dtype(source, config) if isinstance(dtype, str) else dtype
    return open_stored(config, files, wanted, device) if files else None


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The model that a configuration describes, on the device that holds nothing."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _refuse_other_weights(source: Source, config: PretrainedConfig, loading: dict[str, Any]) -> None:
    """Errors: UserError where transformers would fill a weight at random, or ignore one of a layer."""
    wrong = {str(key): "is missing from" for key in loading["missing_keys"]}
    wrong |= {str(key[0]): "has another shape in" for key in loading["mismatched_keys"]}
    prefix = layers_prefix(config)
    extra = (str(key) for key in loading["unexpected_keys"])
    wrong |= {key: "is unknown to the configuration of" for key in extra if prefix in key and key.endswith("weight")}
    if wrong:
        key = min(wrong)
        raise UserError(
            f"{key} {wrong[key]} {source.name} ({len(wrong)} such weights); "
            "fetch the weights that belong to its config.json."
        )


@torch.no_grad()
def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
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
    shards = _shards(folder)
    if not shards and any(folder.glob("pytorch_model*.bin")):
        if not source.allow_pickle:
            raise UserError(
                f"{source.name} has weights in pickle form only, which can run code; "
                "convert them to safetensors, or allow them with --allow-pickle."
            )
    elif not shards:
        raise UserError(f"{source.name} holds no model.safetensors; put the model's weights there.")
    for shard in shards:
        try:
            with safe_open(folder / shard, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"shard {shard} of {source.name} is missing or damaged ({reason(error)}); fetch it again."
            ) from error


def _shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({type(error).__name__}); fetch it again.") from error
    return ["model.safetensors"] if (folder / "model.safetensors").is_file() else []


def weight_bytes(folder: Path) -> int | None:
    """Bytes of a folder's weights on the disk; None for what is no folder here."""
    if not folder.is_dir():
        return None
    names = _shards(folder) or [path.name for path in folder.glob("pytorch_model*.bin")]
    return sum((folder / name).stat().st_size for name in names)


def checkpoint_dtype(source: Source, config: PretrainedConfig) -> torch.dtype:
    """The number format the checkpoint's weights are in: the configuration's word, else the first stored tensor's."""
    dtype = getattr(config, "dtype", None)
    shards = _shards(Path(source.path)) if Path(source.path).is_dir() else []
    if dtype is None and shards:
        with safe_open(Path(source.path) / shards[0], framework="pt") as tensors:
            return tensors.get_tensor(min(tensors.keys())).dtype
    dtype = dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def fingerprint(source: Source) -> str:
    """What tells one local checkpoint from another without reading all of it; the name for one on the Hub.

    Errors: as `check_weights`.
    """
    check_weights(source)
    folder = Path(source.path)
    if not folder.is_dir():
        return source.name
    parts = [(folder / "config.json").read_bytes()]
    for shard in _shards(folder):
        with (folder / shard).open("rb") as stream:
            parts += [str((folder / shard).stat().st_size).encode(), stream.read(2**20)]
            stream.seek(-min(2**20, (folder / shard).stat().st_size), 2)
            parts.append(stream.read())
    return sha256(*parts)


def whole_fingerprint(source: Source, config: PretrainedConfig) -> str:
    """As `fingerprint`, but for a look into every tensor, for end tokens, and for the commit of one on the Hub."""
    folder = Path(source.path)
    if not folder.is_dir():
        return sha256(fingerprint(source).encode(), str(getattr(config, "_commit_hash", None)).encode())
    generation = folder / "generation_config.json"
    parts = [fingerprint(source).encode(), generation.read_bytes() if generation.is_file() else b""]
    for shard in _shards(folder):
        with (folder / shard).open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
            for name in sorted(header.keys() - {"__metadata__"}):
                start, stop = header[name]["data_offsets"]
                stream.seek(8 + size + start + (stop - start) // 2)
                parts.append(stream.read(min(_LOOK, (stop - start + 1) // 2)))
    return sha256(*parts)


def context_length(config: PretrainedConfig) -> int:
    """The longest sequence the model takes, in tokens."""
    return int(getattr(config, "max_position_embeddings", None) or 2048)
