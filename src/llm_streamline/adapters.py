"""A LoRA adapter of the dense model -> the same adapter for its shortened one, by the manifest's layer map.

What adapts a layer that stays goes under its new number; what adapts one that is gone, or that a replacement stands in
for, is left out. Weights are not touched, so that a kept layer computes with the adapter what it did before.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_streamline.errors import UserError
from llm_streamline.files import atomic
from llm_streamline.oracle import MANIFEST, model_folder
from llm_streamline.record import Record
from llm_streamline.records import Manifest

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
LISTS = ("target_modules", "exclude_modules", "target_parameters")  # of module names, or a regular expression of them
_ADAPTED = re.compile(r"^base_model\.model\.(.+?)\.lora_")  # in a tensor's name, the module's
PATTERNS = ("rank_pattern", "alpha_pattern")  # of module names, to a rank or a scale


class Remapped(Record):
    """What became of an adapter: tensors by what they adapt, and the old numbers of the layers whose were left out."""

    kept: int
    outside: int  # not of a layer, kept as they are
    left_out: int
    layers_left_out: list[int]
    folder: str


def remap_adapter(adapter: Path, model: Path, output: Path) -> Remapped:
    """Write to `output`, which must not be there, an adapter for the shortened model in `model`.

    Errors: UserError, with nothing written, for what is no adapter of the model that was shortened.
    """
    from safetensors.torch import save_file

    folder = model_folder(model)
    manifest = Manifest.read(folder / MANIFEST)
    if manifest.plan.custom_code:
        raise UserError(f"{folder} brings its own model code, which no adapter is remapped for; use a stock --replace.")
    config = read_adapter(adapter)
    if output.exists():
        raise UserError(f"-o {output} is there already; give a folder that is new.")
    numbers = Numbers(folder, manifest)
    weights = numbers.weights(read_weights(adapter), adapter)
    if not weights.kept:
        gone = ", ".join(map(str, sorted(weights.gone)))
        raise UserError(
            f"{adapter} adapts only layers {gone}, none of which is in {folder} any more; there is nothing to remap."
        )
    with atomic(output) as temporary:
        temporary.mkdir()
        save_file(weights.kept, temporary / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(numbers.config(config, weights, folder), indent=2, ensure_ascii=False)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")
    return Remapped(
        kept=len(weights.kept) - weights.outside,
        outside=weights.outside,
        left_out=weights.left_out,
        layers_left_out=sorted(weights.gone),
        folder=str(output),
    )


def read_adapter(adapter: Path) -> dict[str, Any]:
    """Its configuration. Errors: UserError for what is no adapter of peft's in safetensors."""
    if not (adapter / CONFIG).is_file():
        raise UserError(f"{adapter} is no adapter, as it has no {CONFIG}; give a folder that peft has written.")
    if not (adapter / WEIGHTS).is_file():
        raise UserError(f"{adapter} has no {WEIGHTS}; save the adapter again with safe_serialization=True.")
    try:
        config = dict(json.loads((adapter / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{adapter / CONFIG} is no JSON object ({error}); save the adapter again.") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{adapter} is an adapter of type {kind}, and only LORA can be remapped; give one of these.")
    return config


def read_weights(adapter: Path) -> dict[str, Tensor]:
    """Errors: UserError for a damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(adapter / WEIGHTS))
    except SafetensorError as error:
        raise UserError(f"{adapter / WEIGHTS} cannot be read ({error}); save the adapter again.") from error


@dataclass
class Found:
    """Tensors under their new names, and what became of the rest."""

    kept: dict[str, Tensor] = field(default_factory=dict)
    outside: int = 0
    left_out: int = 0
    gone: set[int] = field(default_factory=set)  # old numbers
    layers: set[int] = field(default_factory=set)  # new numbers


class Numbers:
    """Old layer numbers -> new ones, in the names of a model's modules."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        from transformers import AutoConfig

        from llm_streamline.families import layers_prefix

        self.path = layers_prefix(AutoConfig.from_pretrained(folder)).removesuffix(".")
        self.depth = manifest.plan.num_layers
        self.new = {old: new for new, old in enumerate(manifest.layer_map) if isinstance(old, int)}
        self._numbered = re.compile(rf"((?:^|\.){re.escape(self.path.rpartition('.')[2])}\.)(\d+)(?=\.|$)")

    def weights(self, weights: dict[str, Tensor], adapter: Path) -> Found:
        """Errors: UserError for a layer that the model which was shortened does not have."""
        found = Found()
        for key, value in weights.items():
            match = self._numbered.search(key)
            old = int(match[2]) if match else None
            if old is None:
                found.outside += 1
                found.kept[key] = value
            elif old >= self.depth:
                raise UserError(
                    f"{adapter} adapts layer {old}, and the model that was shortened had {self.depth}; give an adapter "
                    "of that model."
                )
            elif old in self.new:
                found.layers.add(self.new[old])
                found.kept[self._renamed(key)] = value
            else:
                found.gone.add(old)
                found.left_out += 1
        return found

    def config(self, config: dict[str, Any], found: Found, folder: Path) -> dict[str, Any]:
        """The adapter's configuration for the shortened model.

        Modules are named one by one where peft cannot be told them by layers: it knows none outside them then.
        """
        new = {**config, "base_model_name_or_path": str(folder)}
        for key in PATTERNS:
            new[key] = {
                self._renamed(name): value for name, value in (config.get(key) or {}).items() if self._stays(name)
            }
        for key in LISTS:
            if isinstance(names := config.get(key), list):
                new[key] = sorted({self._renamed(name) for name in names if self._stays(name)})
        modules = {match[1] for key in found.kept if (match := _ADAPTED.search(key))}
        written = any(isinstance(config.get(key), str) for key in LISTS)
        if written or not all(map(self._numbered.search, modules)):
            new["target_modules"] = "|".join(map(re.escape, sorted(modules)))
            new |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        elif isinstance(config.get("target_modules"), list):
            new["layers_to_transform"] = sorted(found.layers) or None
            new["layers_pattern"] = config.get("layers_pattern") or self.path.rpartition(".")[2]
        return new

    def _renamed(self, name: str) -> str:
        return self._numbered.sub(lambda match: f"{match[1]}{self.new[int(match[2])]}", name)

    def _stays(self, name: str) -> bool:
        return all(int(match[2]) in self.new for match in self._numbered.finditer(name))
