"""Model + plan + replacement -> a smaller model on disk, verified before it gets its name.

A new model is built from a new config and the weights are moved over, so that layer numbers are born right.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llm_streamline.card import write_card
from llm_streamline.checkpoint import round_weights
from llm_streamline.custom_code import write_custom_code
from llm_streamline.errors import StreamlineError, VerificationError
from llm_streamline.families import layers_of, layers_prefix, sliced_config, sliding_window
from llm_streamline.files import atomic
from llm_streamline.folding import FoldedLayer, check_fold
from llm_streamline.forward import returned_values, shortened
from llm_streamline.memory import memory_limit
from llm_streamline.networks import NetworkLayer, install
from llm_streamline.offload import is_offloaded, lend, save_lent, shard_bytes
from llm_streamline.oracle import (
    FOLDER,
    MANIFEST,
    PROMPTS,
    prompt_length,
    record_oracle,
    stored_tensors,
    verify,
    weight_hashes,
)
from llm_streamline.records import LayerPlan, Manifest, Verification
from llm_streamline.replacement import ReplacementLayers

_SAMPLE = "Alice's 3 cats, Ünal and the naïve 北京 visitor said: \"don't!\"\n\tif x >= 10: return"


@dataclass(frozen=True)
class Parts:
    """What a shortened model is made of. `source` holds float32 values that the saved number format can hold."""

    source: PreTrainedModel
    plan: LayerPlan
    replacement: ReplacementLayers
    tokenizer: PreTrainedTokenizerBase | None
    notices: Sequence[Path] = ()  # the source's licence files, which go with what is made of it
    memory: int | None = None  # bytes that the check may take; a larger model is checked layer by layer
    healed: frozenset[str] = frozenset()  # the source's tensors that do not hold what its files do


def assemble(parts: Parts, dtype: torch.dtype, prompts: Tensor, manifest: Manifest, target: Path) -> Verification:
    """Write the shortened model to `target`, which appears only if a fresh process finds it right.

    Args: prompts: token ids (N, T) to check with. manifest: what lies beside the weights; tensor counts and the
        verification are filled in here. Errors: VerificationError; nothing is left behind.
    """
    prompts, limits = _prompts(parts, prompts)
    limits += _fold_limits(parts, prompts, dtype)
    round_weights(parts.replacement.float(), dtype)  # what is checked is what is saved
    with atomic(target) as folder:
        folder.mkdir()
        for notice in parts.notices:
            shutil.copyfile(notice, folder / notice.name)
        with shortened(parts.source, parts.plan, list(parts.replacement)):
            record_oracle(parts.source, prompts, folder)
        tensors = _write_model(parts, dtype, folder)
        manifest = manifest.model_copy(update={"tensors": tensors, "limits": limits, "weights": weight_hashes(folder)})
        manifest.write(folder / MANIFEST)
        changed = {} if parts.plan.folded is None else {"changed": [parts.plan.folded]}
        _write_json(folder / "layer-map.json", {"layers": manifest.layer_map, **changed})
        verification = verify(folder, True, parts.memory)  # trusting what was written here, a moment ago
        if not verification.passed:
            raise VerificationError(f"the assembled model is not published: {'; '.join(verification.problems)}.")
        manifest = manifest.model_copy(update={"verification": verification})
        manifest.write(folder / MANIFEST)
        write_card(manifest, folder)  # its scores come later, and are then written into both
    return verification


def _prompts(parts: Parts, prompts: Tensor) -> tuple[Tensor, list[str]]:
    """Token ids (P, T) to check with, and what they limit the claim to."""
    length, limits = prompt_length(parts.source.config, sliding_window(parts.source.config))
    length = min(length, prompts.numel())
    count = min(PROMPTS, prompts.numel() // length)
    return prompts.reshape(-1)[: count * length].reshape(count, length), limits


def _fold_limits(parts: Parts, prompts: Tensor, dtype: torch.dtype) -> list[str]:
    """Check that a folded map is the unfolded one, before rounding; the oracle then has the rounded weights.

    An unfolded map cannot be held against weights that were rounded after folding: that alone moves logits by more
    than the tolerance in all but float32. Errors: VerificationError.
    """
    if not isinstance(parts.replacement, FoldedLayer):
        return []
    error = check_fold(parts.source, parts.plan, parts.replacement, prompts)
    name = str(dtype).removeprefix("torch.")
    return [
        f"the folded map was held against the unfolded one in float32 (logits within {error:.1e}), and the saved model "
        f"against the folded weights rounded to {name}"
    ]


def _write_model(parts: Parts, dtype: torch.dtype, folder: Path) -> dict[str, int]:
    """Save weights, configuration, tokenizer and generation settings; returns what became of the source's tensors."""
    model, tensors = build(parts, dtype)
    keys = {"save_original_format": not parts.plan.custom_code}  # or as the folder's own code has them
    if is_offloaded(parts.source):
        save_lent(model, folder, shard_bytes(parts.memory or memory_limit()), **keys)
    else:
        model.save_pretrained(folder, **keys)
    if parts.plan.custom_code:
        layer = layers_of(model)[parts.plan.window.start]
        assert isinstance(layer, NetworkLayer)
        write_custom_code(model, layer.spec, folder)
    if parts.source.can_generate():  # as it is: some published ones would be refused by transformers' own save
        text = parts.source.generation_config.to_json_string()
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
    if parts.tokenizer is not None:
        parts.tokenizer.save_pretrained(folder)
        sample = {"text": _SAMPLE, "ids": parts.tokenizer(_SAMPLE)["input_ids"]}
        _write_json(folder / FOLDER / "tokenizer.json", sample)
    return {**tensors, "stored": len(stored_tensors(folder))}


def build(parts: Parts, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, int]]:
    """The shortened model in `dtype`, and how many of the source's tensors were kept, renamed, removed or replaced.

    Errors: StreamlineError for a tensor on either side that is not accounted for.
    """
    sources = parts.plan.sources()
    config = sliced_config(parts.source.config, sources)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if parts.plan.custom_code:
            install(layers_of(model), network_in(parts))
    weights, counts = _moved_weights(parts, sources)
    expected = set(model.state_dict())
    if unexplained := expected.symmetric_difference(weights):
        raise StreamlineError(
            f"{len(unexplained)} tensors are not accounted for, such as {min(unexplained)}; "
            "this family's layers are not what its row says, please report it."
        )
    model.load_state_dict({key: value.to(dtype) for key, value in weights.items()}, assign=True)
    model.tie_weights()
    if is_offloaded(parts.source):
        for new, (layer, source) in enumerate(zip(layers_of(model), sources, strict=True)):
            if weights[f"{layers_prefix(config)}{new}.{next(iter(layer.state_dict()))}"].is_meta:
                lend(layers_of(parts.source)[source], layer, dtype)
    return model, counts


def _moved_weights(parts: Parts, sources: list[int]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The new model's state dict by moving the source's keys, and what became of each of the source's tensors."""
    prefix = layers_prefix(parts.source.config)
    replaced = parts.plan.replaced()
    new_numbers = {source: new for new, source in enumerate(sources)}
    weights: dict[str, Tensor] = {}
    counts = dict.fromkeys(("kept", "renamed", "removed", "replaced", *(["healed"] if parts.healed else [])), 0)
    for key, value in parts.source.state_dict().items():
        number, _, rest = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix):
            counts["healed" if key in parts.healed else "kept"] += 1
            weights[key] = value
        elif key in parts.healed:
            counts["healed"] += 1
            weights[f"{prefix}{new_numbers[int(number)]}.{rest}"] = value
        elif (old := int(number)) not in new_numbers:
            counts["removed"] += 1
        elif old in replaced:
            untouched = isinstance(parts.replacement, FoldedLayer) and rest not in parts.replacement.changed
            counts["kept" if untouched else "replaced"] += 1
        else:
            counts["kept" if new_numbers[old] == old else "renamed"] += 1
            weights[f"{prefix}{new_numbers[old]}.{rest}"] = value
    for old, layer in zip(replaced, list(parts.replacement), strict=True):
        weights |= {f"{prefix}{new_numbers[old]}.{rest}": value for rest, value in layer.state_dict().items()}
    return weights, counts


def network_in(parts: Parts) -> dict[str, Any]:
    """What a network's layer in the new model is made from, and its place there."""
    (layer,) = parts.replacement
    assert isinstance(layer, NetworkLayer)
    return {**layer.spec, "place": parts.plan.window.start, "outputs": returned_values(parts.source)}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
