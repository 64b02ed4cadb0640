"""What a local checkpoint's files hold, by name, from their headers: nothing of the weights themselves is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.utils import logging

from llm_streamline.errors import UserError, reason

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The files that transformers would read, by its order; none where there are none.

    Errors: UserError for an index that names no files.
    """
    for name in (SAFETENSORS, PICKLE) if allow_pickle else (SAFETENSORS,):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return [folder / shard for shard in _shards(index)]
    return []


def _shards(index: Path) -> list[str]:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if shards and all(isinstance(shard, str) for shard in shards):
            return shards
        why = "it names no files"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = type(error).__name__
    raise UserError(f"{index} is damaged ({why}); fetch it again.")


def headers(files: list[Path]) -> dict[str, Tensor]:
    """Every stored tensor by its name, without its values; what is in no known float format is in uint8.

    Errors: UserError naming the file that is missing, cut short or corrupt.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= _unpickled(file) if file.suffix == ".bin" else _safe(file)
        except Exception as error:  # a broken pickle can fail in any way
            raise UserError(
                f"shard {file.name} of {file.parent} is missing or damaged ({reason(error)}); fetch it again."
            ) from error
    return found


def _safe(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as tensors:
        parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {
            name: torch.empty(part.get_shape(), dtype=FORMATS.get(part.get_dtype(), torch.uint8), device="meta")
            for name, part in parts.items()
        }


def _unpickled(file: Path) -> dict[str, Tensor]:
    stored = torch.load(file, map_location="meta", weights_only=True)
    return {name: value for name, value in stored.items() if isinstance(value, Tensor)}


def stored_tensor(files: list[Path], name: str) -> Tensor:
    """One tensor's values."""
    for file in files:
        if file.suffix == ".bin":
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if name in found:
                return found[name]
            continue
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor(name)
    raise KeyError(name)


def try_loading(config: PretrainedConfig, stored: dict[str, Tensor]) -> dict[str, Any]:
    """What transformers says of loading such tensors: keys that are missing, unexpected or of another shape.

    It alone knows what older names and single experts become; without values, that costs nothing.
    """
    with _silent():
        _, loading = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=dict(stored),
            dtype=torch.float32,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return dict(loading)


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' report, which one sentence of ours replaces."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
