"""What of a checkpoint a run cannot keep: tensors without a place, and formats that hold more than the saved one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from llm_streamline.checkpoint import Source, check_fit, files_of
from llm_streamline.families import layers_prefix
from llm_streamline.inventory import headers
from llm_streamline.offload import is_offloaded, stored_weights


def losses_of(source: Source, config: PretrainedConfig, dtype: torch.dtype | None) -> list[str]:
    """What is not kept of a local checkpoint that is saved in its own `dtype`, or one asked for (None), in sentences.

    Errors: as `check_fit`.
    """
    left_out, wider = check_fit(source, config), rounded(source, dtype) if dtype else []
    further = further_tokens(source, config)
    left_out = [name for name in left_out if name not in further]
    notes = [further_said(further)] if further else []
    if left_out:
        notes.append(
            f"{len(left_out)} stored tensors have no place in the model and are left out, such as {left_out[0]}"
        )
    if wider:
        notes.append(
            f"{len(wider)} tensors are stored in a wider format than {str(dtype).removeprefix('torch.')} and are "
            f"rounded to that, such as {wider[0]}; --dtype float32 keeps them as they are"
        )
    return notes


def further_tokens(source: Source, config: PretrainedConfig) -> list[str]:
    """Names of a local checkpoint's tensors for multi-token prediction, which transformers passes over.

    They are called so, or are layers after the last that the configuration counts.
    """
    prefix, after = layers_prefix(config), config.num_hidden_layers

    def beyond(name: str) -> bool:
        number = name.removeprefix(prefix).partition(".")[0]
        return name.startswith(prefix) and number.isdigit() and int(number) >= after

    return sorted(name for name in headers(files_of(source)) if "mtp" in name.split(".") or beyond(name))


def further_said(names: list[str]) -> str:
    return f"{len(names)} stored tensors predict tokens after the next one and are left out, such as {names[0]}"


def rounded(source: Source, dtype: torch.dtype) -> list[str]:
    """Names of a local checkpoint's tensors that are stored in a format which holds more than `dtype`."""
    stored = headers(files_of(source)).items()
    floats = {name: value.dtype for name, value in stored if value.is_floating_point()}
    return sorted(name for name, own in floats.items() if torch.promote_types(own, dtype) != dtype)


def holds(dtype: torch.dtype, model: PreTrainedModel) -> bool:
    """Whether a format holds every weight as it is."""
    if dtype == torch.float32:
        return True
    return all(torch.equal(value, value.to(dtype).to(value.dtype)) for value in _weights(model))


def overflows(dtype: torch.dtype, model: PreTrainedModel) -> bool:
    """Whether some weight is larger than a format's largest number."""
    largest = torch.finfo(dtype).max
    return any(bool((value.abs() > largest).any()) for value in _weights(model))


def _weights(model: PreTrainedModel) -> Iterator[Tensor]:
    """Every weight, one at a time, wherever it is."""
    yield from (value for value in model.parameters() if not value.is_meta)
    if is_offloaded(model):
        yield from (value for _, value in stored_weights(model))
