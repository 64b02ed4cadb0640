"""The paper's Figure 4: what is kept against the share of the parameters that is gone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llm_streamline.files import atomic

if TYPE_CHECKING:
    from llm_streamline.evaluation import Point, Sweep

# a panel's title, and the value of a model in it
PANELS: dict[str, Callable[[Point], float | None]] = {
    "accuracy": lambda one: one.accuracy,
    "stability": lambda one: one.stability,
    "validation perplexity": lambda one: None if one.nats is None else math.exp(one.nats),
    "speed of writing, dense = 1": lambda one: one.decode,
}


def panels(found: Sweep) -> dict[str, Callable[[Point], float | None]]:
    """Those with a value for every model that was shortened."""
    return {name: of for name, of in PANELS.items() if all(of(one) is not None for one in found.points)}


def interval(title: str, one: Point) -> tuple[float, float] | None:
    """The 95 % interval of what a panel shows, where it has one."""
    return {"accuracy": one.accuracy_interval, "stability": one.stability_interval}.get(title)


def draw(found: Sweep, path: Path) -> None:
    """A small panel for each figure that was measured, the dense model at 0; dense models beside it are not joined."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = panels(found)
    figure = Figure(figsize=(3.1 * len(shown), 3.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, of) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        line = sorted([found.dense, *found.points], key=lambda one: one.share)
        known = [(100 * one.share, value) for one in line if (value := of(one)) is not None]
        axes.plot(*zip(*known, strict=True), "o-", color="tab:blue", markersize=4)
        for one in line:
            if low_high := interval(title, one):
                axes.plot([100 * one.share] * 2, low_high, color="tab:blue", linewidth=1, alpha=0.6)
        if (dense := of(found.dense)) is not None:
            axes.axhline(dense, color="gray", linewidth=0.8, linestyle="--")
        for one in found.beside:
            if (value := of(one)) is not None:
                axes.plot(100 * one.share, value, "D", color="tab:orange", markersize=5)
                axes.annotate(Path(one.name).name, (100 * one.share, value), fontsize=7)
        axes.set(title=title, xlabel="% of parameters removed")
        axes.grid(alpha=0.3)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
