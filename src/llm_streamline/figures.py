"""Figures of a run: what people would rather look at than read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_streamline.files import atomic
from llm_streamline.records import Fit, Similarity, Window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_similarity(
    similarity: Similarity, path: Path, chosen: Sequence[Window] = (), by_cosine: Window | None = None
) -> None:
    """The paper's Figure 2: cosine between each layer's input and output, with its standard error.

    The window that cosine would have taken is outlined where it is none of the chosen ones.
    """
    figure, axes = _figure(width=7.0, height=3.6)
    layers = range(similarity.num_layers)
    cosines = similarity.of_layers()
    errors = [similarity.error_of(Window(start=layer, stop=layer + 1)) for layer in layers]
    for one in chosen:
        axes.axvspan(one.start - 0.5, one.stop - 0.5, color="tab:orange", alpha=0.25, label=f"window {one}")
    if chosen:
        if by_cosine is not None and by_cosine not in chosen:
            ends, label = (by_cosine.start - 0.5, by_cosine.stop - 0.5), f"by cosine {by_cosine}"
            axes.axvspan(*ends, fill=False, linestyle="--", edgecolor="tab:gray", label=label)
        axes.legend(loc="lower right")
    axes.errorbar(layers, cosines, yerr=errors, marker="o", markersize=4, linewidth=1.2, capsize=2)
    _name_outliers(axes, cosines)
    axes.set(
        xlabel="layer",
        ylabel="cosine of its input and output",
        title="How little each layer changes the hidden state",
    )
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    _save(figure, path)


def _name_outliers(axes: Axes, cosines: list[float]) -> None:
    """Keep the axis where most layers are, and name those far below it (often the first layer)."""
    middle = sorted(cosines)[len(cosines) // 2]
    floor = middle - 4 * (max(cosines) - middle) - 0.02
    outliers = [layer for layer, cosine in enumerate(cosines) if cosine < floor]
    if not outliers:
        return
    low = min(cosine for cosine in cosines if cosine >= floor)
    axes.set_ylim(low - 0.35 * (max(cosines) - low) - 0.005, None)
    text = ", ".join(f"layer {layer}: {cosines[layer]:.2f}" for layer in outliers[:4])
    axes.annotate(f"below the axis: {text}", xy=(0.18, 0.05), xycoords="axes fraction", fontsize=8)


def draw_heat_map(similarity: Similarity, path: Path, chosen: Sequence[Window] = ()) -> None:
    """Cosine similarity of every window, by its first layer and its length."""
    import numpy as np

    count = similarity.num_layers
    values = np.full((count, count), np.nan)
    for length in range(1, count + 1):
        for window in similarity.windows(length):
            values[length - 1, window.start] = similarity.of(window)
    figure, axes = _figure(width=6.2, height=5.2)
    # the first layer's windows are often far from all others: the scale is theirs only where nothing else is left
    floor = np.nanmin(values[:, 1:]) if count > 1 else None
    extent = (-0.5, count - 0.5, 0.5, count + 0.5)
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis", extent=extent, vmin=floor)
    figure.colorbar(image, ax=axes, label="cosine", extend="min" if floor is not None else "neither")
    if chosen:
        label = f"window{'s' * (len(chosen) > 1)} {', '.join(map(str, chosen))}"
        axes.plot(
            [one.start for one in chosen],
            [len(one) for one in chosen],
            marker="o",
            markersize=11,
            mfc="none",
            mec="red",
            mew=2,
            ls="",
            label=label,
        )
        axes.legend(loc="upper right")
    axes.set(
        xlabel="first layer of the window",
        ylabel="layers in the window",
        title="Similarity of every window's ends",
    )
    axes.locator_params(integer=True)
    _save(figure, path)


def draw_training(fit: Fit, path: Path, title: str = "Training the replacement") -> None:
    """The paper's Figure 3: distillation loss over training, and the validation checks."""
    figure, axes = _figure(width=7.0, height=3.6)
    per_step = fit.tokens / fit.steps / 1e3
    axes.plot([p.tokens / 1e3 for p in fit.curve], [p.loss for p in fit.curve], linewidth=1.0, label="training")
    axes.plot(
        [c.step * per_step for c in fit.validation],
        [c.loss for c in fit.validation],
        "o-",
        label="validation",
    )
    axes.plot(fit.best_step * per_step, fit.validation_best, "*", markersize=13, color="tab:green", label="kept")
    axes.set(
        xlabel="thousand tokens",
        ylabel=f"distillation loss ({fit.loss})",
        title=title,
    )
    losses = [fit.validation_before, fit.validation_best]
    if max(losses) > 10 * min(losses):
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
