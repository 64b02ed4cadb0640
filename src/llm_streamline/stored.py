"""A local checkpoint as a model whose decoder layers stay in its files: nothing of them is read on loading.

transformers' own loading touches every tensor, also those that are to stay on the disk: a whole reading of the model.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate import dispatch_model, init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from llm_streamline.families import layers_prefix
from llm_streamline.offload import device_map


def open_stored(config: PretrainedConfig, files: list[Path], dtype: torch.dtype, device: str) -> PreTrainedModel | None:
    """The model in `dtype`, its layers' weights in `files`; None where those store them under other names or shapes.

    Then transformers has to convert them, as it does for experts.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    places = _places(files)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    needed = {name for name in shapes if name not in tied or name in places}
    if model._keep_in_fp32_modules or any(places.get(name, (None, ()))[1] != shapes[name] for name in needed):
        return None
    index = {}
    for name in needed:
        file, shape = places[name]
        if name.startswith(layers_prefix(config)) and math.prod(shape):
            index[name] = {"safetensors_file": str(file), "weight_name": name, "dtype": str(dtype).partition(".")[2]}
        elif name not in tied:
            with safe_open(file, framework="pt") as tensors:
                set_module_tensor_to_device(model, name, device, value=tensors.get_tensor(name).to(dtype).clone())
    model.tie_weights()
    if (files[0].parent / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(files[0].parent)
    return dispatch_model(model, device_map(model, device), offload_index=index)


def _places(files: list[Path]) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every stored tensor, from the files' headers."""
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found |= {name: (file, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118
    return found
