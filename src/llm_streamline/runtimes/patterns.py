"""Which layers a runtime tells apart by their number, and whether a configuration agrees with what it would assume.

A runtime that counts (every sixth layer sees everything, say) runs a model whose layers were removed without any
complaint, and wrongly, unless whole periods went.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from llm_streamline.architectures import GGUF_COUNTED, GGUF_WRITTEN, LAYER_NUMBER_KEYS, PER_LAYER_KEYS
from llm_streamline.errors import UserError


def mixed_keys(config: PretrainedConfig) -> list[str]:
    """The keys by which a configuration says that its layers are not all of one kind."""
    listed = [key for key in PER_LAYER_KEYS if len(set(map(str, getattr(config, key, None) or []))) > 1]
    return listed + [key for key in LAYER_NUMBER_KEYS if getattr(config, key, None)]


def why_not_gguf(config: PretrainedConfig) -> str | None:
    """Why llama.cpp would take a layer for one of another kind; None where it would not."""
    kind = config.model_type
    for key in mixed_keys(config):
        if key in GGUF_WRITTEN.get(kind, ()):
            continue
        period = GGUF_COUNTED.get(kind, {}).get(key)
        if period is None:
            return f"its {key} differ from layer to layer, which llama.cpp is not known to read for {kind!r}"
        if not follows(getattr(config, key), period):
            return (
                f"llama.cpp tells its layers apart by their number ({key}: every {len(period)} layers "
                f"{_told(period)}), and {_told(getattr(config, key))} is not so"
            )
    return None


def follows(values: Sequence[Any], period: Sequence[Any]) -> bool:
    """Whether a list repeats a period from its first entry."""
    return all(value == period[number % len(period)] for number, value in enumerate(values))


def _told(values: Sequence[Any]) -> str:
    return " ".join(str(value).removesuffix("_attention") for value in values)


def gguf_period(config: PretrainedConfig, name: str) -> int:
    """How many layers llama.cpp counts in a period: so many, or a multiple, can go from one place.

    Errors: UserError where it would already run the dense model otherwise than it was made.
    """
    if why := why_not_gguf(config):
        raise UserError(f"--for gguf cannot hold for {name}, as {why}; leave it out.")
    counted = GGUF_COUNTED.get(config.model_type, {})
    return math.lcm(*(len(counted[key]) for key in mixed_keys(config) if key in counted))
