"""What --replace takes. Nothing here needs torch, so that a recipe can be read without it."""

from __future__ import annotations

import re

ONE_OF_ITS_OWN = ("layer", "layer:1", "mlp")  # one layer of the model's own kind, which trains
BEST = "best"  # the start of the layer, of the window's own, that costs least alone
SOLVED = "solved"  # the start of what has a closed form and is trained from there


def check_replace(value: str) -> str:
    """Errors: ValueError for what is no replacement."""
    if not re.fullmatch(r"none|mlp|merged|layer(:[1-9]\d*)?|(ffn|swiglu)(:residual)?|linear(:free|:patch)?", value):
        raise ValueError("there is no such replacement")
    return value


def solvable(replace: str) -> tuple[str, ...]:
    """The losses for which a replacement is had in closed form; none where it has to be trained."""
    if replace.partition(":")[0] != "linear":
        return ()
    return ("nmse", "mse") if replace == "linear:patch" else ("nmse", "mse", "cosine")
