"""What --heal takes. Nothing here needs torch, so that a recipe can be read without it.

heal   = "none" | layers *("+" above) | above *("+" above)
layers = "lora" | "lora:" R | "layers" | "layers:" N | "last" | "last:" N | "all"
above  = "norm" | "head"
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_streamline.records import LayerPlan

RANK = 16
NONE, NORM, HEAD = "none", "norm", "head"
_SIZES = {"lora": RANK, "layers": 1, "last": 3}


@dataclass(frozen=True)
class Heal:
    """Of the layers that stay adapters on all, the `size` on either side of each cut or the last `size` whole, or all.

    `kind` is "" where none of them trains; `above` is what does of the norm and the head that follow them.
    """

    kind: str
    size: int = 0
    above: tuple[str, ...] = ()

    def whole(self, new: int, plan: LayerPlan) -> bool:
        """Whether the shortened model's layer `new` is among those that train whole."""
        if self.kind == "last":
            return new >= len(plan.sources()) - self.size
        near = (cut.start - self.size <= new < cut.stop + self.size for cut in plan.cuts())
        return self.kind == "all" or (self.kind == "layers" and any(near))

    def __str__(self) -> str:
        kind = f"{self.kind}:{self.size}" if self.kind in _SIZES else self.kind
        return "+".join(filter(None, (kind, *self.above)))


def check_heal(text: str) -> str:
    """Errors: ValueError for what is no way to heal."""
    parse_heal(text)
    return text


def parse_heal(text: str) -> Heal | None:
    """'lora:8', 'layers:2', 'last:3+norm+head', 'all', 'head'; None for none. Errors: ValueError."""
    if text == NONE:
        return None
    first, *others = text.split("+")
    match = re.fullmatch(r"(lora|layers|last)(?::([1-9]\d*))?|all", first)
    above = others if match else [first, *others]
    if set(above) - {NORM, HEAD} or len(set(above)) < len(above):
        raise ValueError(
            f"{text!r} is no way to heal; there are none, lora, lora:8, layers:1, last:3 and all, each also with +norm "
            "and +head, and these two alone"
        )
    named = tuple(one for one in (NORM, HEAD) if one in above)
    if not match:
        return Heal("", above=named)
    kind = match[1] or "all"
    return Heal(kind, int(match[2] or _SIZES.get(kind, 0)), named)
