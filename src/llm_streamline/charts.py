"""Where everything lies in the report's figures, in percent of the figure; the template draws it as plain SVG.

Percent, and no fixed width: text keeps its size and dots stay round on a phone, a screen and paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llm_streamline.records import Fit, Similarity, Window

LEFT, RIGHT, TOP, BOTTOM = 13.0, 98.0, 4.0, 86.0  # of the plot within its figure
FAINTEST = 0.06  # opacity of the heat map's lowest value


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """A scale from values to percent of the figure; `start` is where `low` lies."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (*self.ends, value)
        return round(self.start + (self.stop - self.start) * (value - low) / (high - low), 3)

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    def ticks(self, most: int = 5, whole: bool = False) -> list[Tick]:
        """Round values within the axis, `most` at most; decades with their halves and fifths on a logarithmic one."""
        values = _decades(*self.ends) if self.log else _round_values(*self.ends, most, whole)
        return [Tick(self.at(value), f"{value:g}") for value in values]


def _round_values(low: float, high: float, most: int, whole: bool) -> list[float]:
    size = 10 ** math.floor(math.log10((high - low) / most))
    steps = [size * factor for factor in (1, 2, 5, 10, 20) if not whole or size * factor >= 1]
    step = next(step for step in steps or [1.0] if (high - low) / step <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 1e3 else (1,)
    values = (10.0**exponent * factor for exponent in exponents for factor in factors)
    return [value for value in values if low <= value <= high]


@dataclass(frozen=True)
class Dot:
    """A point with its standard error's ends; `clipped` is one that lies below the axis, at whose foot it is drawn."""

    x: float
    y: float
    low: float
    high: float
    clipped: bool
    title: str


@dataclass(frozen=True)
class LayerChart:
    x: list[Tick]
    y: list[Tick]
    dots: list[Dot]
    bands: list[tuple[float, float]]
    below: str


def layer_chart(similarity: Similarity, chosen: Sequence[Window]) -> LayerChart:
    """The paper's Figure 2: how alike each layer's input and output are. Layers far below the others are clipped."""
    cosines = similarity.of_layers()
    errors = [similarity.error_of(Window(start=layer, stop=layer + 1)) for layer in range(len(cosines))]
    floor = _floor(cosines)
    shown = [cosine for cosine in cosines if cosine >= floor]
    room = max(0.08 * (max(shown) - min(shown)), 0.002)
    y = Axis(min(shown) - room * (1 if shown == cosines else 3), max(shown) + room, BOTTOM, TOP)
    below = [layer for layer, cosine in enumerate(cosines) if cosine < y.low]
    x = Axis(-0.5, len(cosines) - 0.5, LEFT, RIGHT)
    dots = [
        Dot(
            x.at(layer),
            BOTTOM - 3 if layer in below else y.at(cosine),
            *((0.0, 0.0) if layer in below else (y.at(max(cosine - error, y.low)), y.at(min(cosine + error, y.high)))),
            layer in below,
            f"layer {layer}: cosine {cosine:.4f} ± {error:.4f}",
        )
        for layer, (cosine, error) in enumerate(zip(cosines, errors, strict=True))
    ]
    ends = [(x.at(window.start - 0.5), x.at(window.stop - 0.5)) for window in chosen]
    bands = [(left, right - left) for left, right in ends]
    named = ", ".join(f"layer {layer}: {cosines[layer]:.2f}" for layer in below[:4])
    return LayerChart(x.ticks(8, whole=True), y.ticks(), dots, bands, named)


def _floor(cosines: Sequence[float]) -> float:
    """What is below is far from most layers, often the first one alone."""
    middle = sorted(cosines)[len(cosines) // 2]
    return middle - 4 * (max(cosines) - middle) - 0.02


@dataclass(frozen=True)
class Cell:
    x: float
    y: float
    width: float
    height: float
    shade: float
    title: str


@dataclass(frozen=True)
class HeatMap:
    x: list[Tick]
    y: list[Tick]
    cells: list[Cell]
    chosen: list[Cell]
    low: str
    high: str


def heat_map(similarity: Similarity, chosen: Sequence[Window]) -> HeatMap:
    """Cosine between the ends of every window, by its first layer and its length."""
    count = similarity.num_layers
    windows = [window for length in range(1, count + 1) for window in similarity.windows(length)]
    # the first layer's windows are often far from all others: the scale is theirs only where nothing else is left
    values = [similarity.of(window) for window in windows if window.start or count == 1]
    low, high = min(values), max(values)
    x, y = Axis(-0.5, count - 0.5, LEFT, RIGHT), Axis(0.5, count + 0.5, BOTTOM, TOP)

    def cell(window: Window) -> Cell:
        left, top = x.at(window.start - 0.5), y.at(len(window) + 0.5)
        share = (similarity.of(window) - low) / (high - low) if high > low else 1.0
        return Cell(
            left,
            top,
            round(x.at(window.start + 0.5) - left, 3),
            round(y.at(len(window) - 0.5) - top, 3),
            round(FAINTEST + (1 - FAINTEST) * max(0.0, share), 3),
            f"{window}: {similarity.of(window):.4f}",
        )

    cells = [cell(window) for window in windows]
    outlined = [cell(window) for window in chosen]
    return HeatMap(x.ticks(8, True), y.ticks(6, True), cells, outlined, f"{low:.2f}", f"{high:.2f}")


@dataclass(frozen=True)
class TrainingChart:
    """`line` is the training loss as an SVG polyline in a box of 100 by 100; `checks` are the validations."""

    x: list[Tick]
    y: list[Tick]
    line: str
    checks: list[tuple[float, float]]
    kept: tuple[float, float]
    log: bool


def training_chart(fit: Fit) -> TrainingChart | None:
    """The paper's Figure 3: distillation loss over training. None where there is nothing finite to draw."""
    per_step = fit.tokens / fit.steps / 1e3
    curve = [(point.tokens / 1e3, point.loss) for point in fit.curve]
    checks = [(check.step * per_step, check.loss) for check in fit.validation]
    kept = (fit.best_step * per_step, fit.validation_best)
    losses = [loss for _, loss in (*curve, *checks, kept)]
    if not all(math.isfinite(loss) for loss in losses):
        return None
    low, high = min(losses), max(losses)
    log = low > 0 and high > 10 * low
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    y = Axis(low * 0.9, high * 1.1, BOTTOM, TOP, True) if log else Axis(low - room, high + room, BOTTOM, TOP)
    x = Axis(0.0, fit.tokens / 1e3, LEFT, RIGHT)
    inner = Axis(0.0, x.high, 0.0, 100.0), Axis(y.low, y.high, 100.0, 0.0, log)
    return TrainingChart(
        x.ticks(5),
        y.ticks(),
        " ".join(f"{inner[0].at(tokens):g},{inner[1].at(loss):g}" for tokens, loss in curve),
        [(x.at(tokens), y.at(loss)) for tokens, loss in checks],
        (x.at(kept[0]), y.at(kept[1])),
        log,
    )
