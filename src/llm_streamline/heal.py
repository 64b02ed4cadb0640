"""What --heal takes. Nothing here needs torch, so that a recipe can be read without it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_streamline.records import LayerPlan

RANK = 16
NONE = "none"


@dataclass(frozen=True)
class Heal:
    """Adapters of a rank on all layers that stay, or the `size` layers on either side of each cut, whole."""

    kind: str
    size: int

    def near(self, new: int, plan: LayerPlan) -> bool:
        """Whether the shortened model's layer `new` is among those that train whole."""
        near = (cut.start - self.size <= new < cut.stop + self.size for cut in plan.cuts())
        return self.kind == "all" or any(near)

    def __str__(self) -> str:
        return self.kind if self.kind == "all" else f"{self.kind}:{self.size}"


def check_heal(text: str) -> str:
    """Errors: ValueError for what is no way to heal."""
    parse_heal(text)
    return text


def parse_heal(text: str) -> Heal | None:
    """'lora:8', 'layers:2', 'all'; None for none. Errors: ValueError."""
    if text == NONE:
        return None
    match = re.fullmatch(r"(lora|layers)(?::([1-9]\d*))?|all", text)
    if not match:
        raise ValueError(f"{text!r} is no way to heal; there are none, lora, lora:8, layers:1 and all")
    kind = match[1] or "all"
    return Heal(kind, int(match[2] or {"lora": RANK, "layers": 1, "all": 0}[kind]))
