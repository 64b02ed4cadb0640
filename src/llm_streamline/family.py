"""A row of the table of architectures, and what some of them change in a configuration besides slicing its lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Changes = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One architecture whose checklist passes."""

    model_type: str
    layers: str  # path of the list of decoder layers inside the causal LM
    # within a layer: the projection whose zero weight and bias silence attention; of hybrids, all that may stand there
    attention_output: str | tuple[str, ...]
    mlp: tuple[str, ...]  # within a layer: what can still act then; names that an option leaves out are ignored
    # within a layer: the MLP's last projections, a ':2' after one whose third axis counts the outputs; none where a map
    # cannot be folded into them, for `unfoldable` or because a norm follows
    down: tuple[str, ...] = ("mlp.down_proj",)
    added: str = "mlp"  # within a layer: the module whose output is what the MLP adds to the stream
    refused: tuple[tuple[str, str], ...] = ()  # options that must be off, and why
    # from a config, the sliced keys and the layers that stay to more keys
    changes: Callable[[Any, Changes, Sequence[int]], Changes] | None = None
    norm: str = "norm"  # beside the layers: what follows the last of them
    unfoldable: str = "a norm follows the MLP's output"  # why, where `down` is empty
    tried: bool = False  # whether nobody has proven it, and only the check of what is saved stands for it

    def mixers(self) -> tuple[str, ...]:
        """Within a layer, the last projections of what mixes tokens; a layer has one of them, or several at once."""
        return (self.attention_output,) if isinstance(self.attention_output, str) else self.attention_output


def one_kind_per_layer(_: Any, sliced: Changes, __: Sequence[int]) -> Changes:
    """The compact spelling, from which the list per layer is made anew whenever a config is loaded."""
    return {"attention_types": [[[kind], 1] for kind in sliced["attention_layers"]]}


def same_scale(config: Any, _: Changes, sources: Sequence[int]) -> Changes:
    """What layers add is scaled by scale_depth over the root of their number: by the same for fewer of them."""
    return {"scale_depth": config.scale_depth * (len(sources) / config.num_hidden_layers) ** 0.5}


def spelled_out(config: Any, _: Changes, sources: Sequence[int]) -> Changes:
    """A pattern that is repeated for as many layers as there are: spelled out, it is repeated no more."""
    return {"block_types": [config.block_types[source % len(config.block_types)] for source in sources]}


def counted_from_one(config: Any, _: Changes, sources: Sequence[int]) -> Changes:
    """Lists of layers that transformers reads only where no other list is given, and other programs read."""
    given = getattr(config, "linear_attn_config", None) or {}
    listed = {key: given[key] for key in ("full_attn_layers", "kda_layers") if given.get(key)}
    new = {key: [to for to, source in enumerate(sources, 1) if source + 1 in old] for key, old in listed.items()}
    return {"linear_attn_config": {**given, **new}} if new else {}
