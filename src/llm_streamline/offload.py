"""Models larger than memory: decoder layers stay in their safetensors files and are loaded one at a time.

Everything is accelerate's: its hooks load a module's weights before its forward and let go of them after it, so that
such a model computes in any way a model does. `onloaded` keeps a whole layer's while several batches need them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_streamline.errors import UserError, reason
from llm_streamline.families import family_of, layers_of
from llm_streamline.memory import trim

SMALLEST_SHARD, LARGEST_SHARD = 10**8, 5 * 10**9  # bytes written at once of a model that does not fit


def device_map(model: PreTrainedModel, device: str) -> dict[str, str]:
    """Where each part of a model without weights is to be: its decoder layers on the disk, the rest on `device`."""
    return _placed(model, family_of(model.config).layers, device, "")


def _placed(module: nn.Module, layers: str, device: str, prefix: str) -> dict[str, str]:
    places = {f"{prefix}{name}": device for name, _ in module.named_parameters(recurse=False)}
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if path == layers:
            assert isinstance(child, nn.ModuleList)
            places |= {f"{path}.{number}": "disk" for number in range(len(child))}
        elif layers.startswith(f"{path}."):
            places |= _placed(child, layers, device, f"{path}.")
        else:
            places[path] = device
    return places


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether some weights are not held; those are the decoder layers'."""
    return any(parameter.is_meta for parameter in model.parameters())


def _hooks(module: nn.Module) -> list[tuple[nn.Module, Any]]:
    return [(part, part._hf_hook) for part in module.modules() if hasattr(part, "_hf_hook")]


def _stored(hooks: list[tuple[nn.Module, Any]]) -> Iterator[tuple[nn.Module, str, Mapping[str, Tensor], Any]]:
    for part, hook in hooks:
        if isinstance(hook, AlignDevicesHook) and hook.offload:
            for name, _ in part.named_parameters(recurse=False):
                yield part, name, hook.weights_map, hook.execution_device


@contextmanager
def onloaded(layer: nn.Module) -> Iterator[nn.Module]:
    """The layer with its weights in memory and without accelerate's hooks, until the block ends."""
    hooks = _hooks(layer)
    if not any(True for _ in _stored(hooks)):
        yield layer
        return
    remove_hook_from_module(layer, recurse=True)
    try:
        for part, name, stored, device in _stored(hooks):
            set_module_tensor_to_device(part, name, device, value=stored[name])
        yield layer
    finally:
        for part, hook in hooks:
            add_hook_to_module(part, hook)  # which sends the weights away again
        trim()


def stored_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each decoder layer's weights, one at a time, wherever they are."""
    prefix = family_of(model.config).layers
    for number, layer in enumerate(layers_of(model)):
        with onloaded(layer):
            for name, value in layer.state_dict().items():
                yield f"{prefix}.{number}.{name}", value


class Watched(Mapping[str, Tensor]):
    """Stored weights. Errors: UserError where their file is gone or damaged since the model was opened."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._stored[name]
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the model's weights can no longer be read ({reason(error)}); "
                "put them back and repeat the command to continue."
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class Rounded(Watched):
    """Stored weights as a number format holds them, in the one they are asked for in."""

    def __init__(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(stored)
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        return value.to(self._dtype).to(value.dtype) if value.is_floating_point() else value


def watch_stored(model: PreTrainedModel) -> None:
    """From now on, decoder layers that cannot be read are missed in one sentence."""
    _through(model, Watched)


def round_stored(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """From now on, decoder layers are loaded as `dtype` would hold them."""
    _through(model, lambda stored: Rounded(stored, dtype))


def _through(model: PreTrainedModel, wrap: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> None:
    for layer in layers_of(model):
        for _, hook in _hooks(layer):
            if isinstance(hook, AlignDevicesHook) and hook.offload:
                hook.weights_map = wrap(hook.weights_map)


class _Lent(Mapping[str, Tensor]):
    """A layer's stored weights by their names in it, in another number format."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._places = {
            f"{path}.{name}" if path else name: (part._hf_hook.weights_map, name)
            for path, part in layer.named_modules()
            if hasattr(part, "_hf_hook") and getattr(part._hf_hook, "offload", False)
            for name, _ in part.named_parameters(recurse=False)
        }

    def __getitem__(self, name: str) -> Tensor:
        stored, own = self._places[name]
        return stored[own].to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def lend(source: nn.Module, layer: nn.Module, dtype: torch.dtype) -> None:
    """Let a layer without weights have those of a stored one, where it is saved."""
    add_hook_to_module(layer, AlignDevicesHook(offload=True, weights_map=_Lent(source, dtype), place_submodules=True))


def shard_bytes(memory: int) -> int:
    """What of a model is written at once where so many bytes of memory are there: a sixteenth of them."""
    return max(SMALLEST_SHARD, min(memory // 16, LARGEST_SHARD))


def save_lent(model: PreTrainedModel, folder: Path, shard: int, **options: bool) -> None:
    """Save a model whose layers are lent, `shard` bytes at a time; `options` are those of transformers' own save."""
    model.hf_device_map = {"": "disk"}  # by which transformers knows to look for what is on no device
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        model.save_pretrained(folder, max_shard_size=shard, **options)
