"""Figures and tables of a run: what people would rather look at than read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llm_streamline.card import score_rows
from llm_streamline.files import atomic
from llm_streamline.findings import sentence, sentences
from llm_streamline.records import (
    FEWEST_EFFECTIVE,
    SIGNIFICANCE,
    Fit,
    LayerPlan,
    Scores,
    Similarity,
    Stability,
    Verification,
    Window,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

    from llm_streamline.evaluation import Evaluation

USUAL_SHARES = (0.125, 0.25, 0.375, 0.5)


def layer_table(similarity: Similarity) -> Table:
    """One line per layer: how alike its input and output are, and by how much it changes the hidden state."""
    table = _table("layer", "cosine", "standard error", "relative change")
    for layer in range(similarity.num_layers):
        window = Window(start=layer, stop=layer + 1)
        cosine, error = similarity.of(window), similarity.error_of(window)
        table.add_row(str(layer), f"{cosine:.4f}", f"{error:.4f}", f"{similarity.change_of(window):.4f}")
    return table


def window_table(similarity: Similarity, protect_first: int, protect_last: int, best: int = 3) -> Table:
    """The most similar windows of the usual lengths, away from the protected ends."""
    table = _table("length", "window", "cosine", "standard error", "relative change")
    for length in usual_lengths(similarity.num_layers):
        for rank, window in enumerate(similarity.windows(length, protect_first, protect_last)[:best]):
            cosine, error = similarity.of(window), similarity.error_of(window)
            name = f"{length} ({length / similarity.num_layers:.0%})" if rank == 0 else ""
            table.add_row(name, str(window), f"{cosine:.4f}", f"{error:.4f}", f"{similarity.change_of(window):.4f}")
    return table


def usual_lengths(num_layers: int) -> list[int]:
    """An eighth to half of the layers, each length once."""
    return sorted({max(1, int(share * num_layers + 0.5)) for share in USUAL_SHARES})


def summary_table(plan: LayerPlan, scores: Scores) -> Table:
    """What was removed, what it cost and what the replacement brought back."""
    table = _table("model", "layers", "parameters", "held-out loss", "excess, nats")
    for name, layers, parameters, loss, _, excess in score_rows(plan, scores):
        table.add_row(name, layers, parameters, loss, excess)
    return table


def summary_lines(plan: LayerPlan, fit: Fit | None, verification: Verification, folder: Path) -> list[str]:
    """The lines after the table: parameters, training, verification, path."""
    saved = plan.parameters_before - plan.parameters_after
    share = saved / plan.parameters_before
    lines = [
        f"removed   {plan}",
        f"parameters {plan.parameters_before:,} -> {plan.parameters_after:,} ({saved:,} fewer, {share:.1%})",
    ]
    if fit:
        lines.append(
            f"trained   {fit.trained_parameters:,} parameters on {fit.tokens:,} tokens in {fit.steps} steps; "
            f"{fit.loss} {fit.validation_before:.5f} -> {fit.validation_best:.5f} (step {fit.best_step})"
        )
    lines.append(
        f"verified  in a fresh process: logits within {verification.logits_error:.1e}, cached = uncached generation, "
        f"{verification.tensors} tensors, {verification.parameters:,} parameters"
    )
    lines += [f"limit     {limit}" for limit in verification.limits]
    return [*lines, f"model     {folder}"]


def stability_table(found: list[Stability]) -> Table:
    """How two models' answers to each task compare; figures that rank nothing are in parentheses.

    Only what fits a terminal; the record has more.
    """
    table = _table("task", "items", "accuracy", "stability", "eff. n", "flips", "p")
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for one in found:
        low, high = one.stability_interval
        stable = f"{one.stability:.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(
            one.task,
            str(one.items),
            f"{one.accuracy_before:.3f} -> {one.accuracy_after:.3f}",
            stable if one.ranks else f"({stable})",
            f"{one.effective_items:.0f}",
            f"{one.flips:.3f}",
            f"{one.mcnemar_p:.2g}",
        )
    return table


def stability_lines(found: list[Stability]) -> list[str]:
    """What the table cannot say: which figures rank nothing and why, and what PPL was of."""
    lines = []
    for one in found:
        if one.above_chance_p >= SIGNIFICANCE:
            lines.append(f"{one.task}: the first model is not significantly above chance ({one.chance:.2f})")
        if one.effective_items < FEWEST_EFFECTIVE * one.items:
            lines.append(f"{one.task}: {one.effective_items:.1f} of {one.items} items decide the stability")
    if any(one.measure == "choice" for one in found):
        lines.append("choice-only: PPL is of the choices alone, per byte, as logged samples have no more")
    return lines


def evaluation_lines(found: Evaluation) -> list[str | Table]:
    """Accuracies, perplexities and, against the dense model, stability, each with what it is."""
    lines: list[str | Table] = []
    if any(one.tasks for one in found.models):
        lines += [
            accuracy_table(found),
            "accuracy is by summed log-likelihood; by PPL is the share right that stability counts",
        ]
    if any(one.texts for one in found.models):
        steps = {(text.block, text.stride, text.blocked) for one in found.models for text in one.texts}
        how = (
            f"{'blocked' if blocked else f'sliding by {stride}'}, {block} tokens" for block, stride, blocked in steps
        )
        lines += [perplexity_table(found), f"windows: {'; '.join(how)}; every token but a document's first counts once"]
    if any(one.writing for one in found.models):
        lines += [writing_table(found), "looping: over half of a sample's 4-grams are repeated; early: ended at once"]
    if any(one.timings for one in found.models):
        lines += [speed_table(found), *size_lines(found)]
    for one in found.models:
        if one.stability:
            lines.append(f"{one.label} against {found.against}; accuracy here is by PPL")
            lines += [stability_table(one.stability), *stability_lines(one.stability)]
    return [*lines, *sentences(found), *(f"warning: {one}" for one in found.warnings)]


def kept_lines(found: Evaluation | None) -> list[str]:
    """What a run's saved model, the last one, keeps, and what is not as it seems; nothing where nothing was asked."""
    if found is None:
        return []
    return [f"kept      {sentence(found, found.models[-1])}", *(f"warning   {one}" for one in found.warnings)]


def accuracy_table(found: Evaluation) -> Table:
    table = _table("model", "task", "items", "accuracy [95 %]", "by PPL", "cut")
    for model in found.models:
        for one in model.tasks:
            interval = "" if one.interval is None else f" [{one.interval[0]:.3f}, {one.interval[1]:.3f}]"
            by_ppl = "" if one.right_by_ppl is None else f"{one.right_by_ppl:.3f}"
            cut = "" if one.cut is None else str(one.cut)
            name = "" if one.metric == "accuracy" else f" {one.metric}"
            table.add_row(model.label, one.task, str(one.items), f"{one.value:.3f}{interval}{name}", by_ppl, cut)
    return table


def perplexity_table(found: Evaluation) -> Table:
    table = _table("model", "text", "tokens", "nats per token", "perplexity", "bits/byte")
    for model in found.models:
        for one in model.texts:
            error = "" if one.se is None else f" ± {one.se:.4f}"
            table.add_row(
                model.label,
                one.text,
                f"{one.tokens:,}",
                f"{one.nats:.4f}{error}",
                f"{one.perplexity:.2f}",
                f"{one.bits_per_byte:.4f}",
            )
    return table


def writing_table(found: Evaluation) -> Table:
    """How the models write to the same prompts."""
    table = _table("model", "samples", "tokens", "repeated", "looping", "early", "unended")
    for model in found.models:
        if one := model.writing:
            shares = (one.repeated, one.looping, one.early, one.unended)
            table.add_row(model.label, str(one.samples), str(one.tokens), *(f"{share:.2f}" for share in shares))
    return table


def speed_table(found: Evaluation) -> Table:
    """Tokens per second, and how many times the dense model's."""
    table = _table("model", "batch", "prompt + new", "prefill, tokens/s", "x dense", "decode, tokens/s", "x dense")
    for model in found.models:
        for one in model.timings:
            prefill, decode = (
                "" if ratio is None or span is None else f"{ratio:.2f} [{span[0]:.2f}, {span[1]:.2f}]"
                for ratio, span in (
                    (one.prefill_ratio, one.prefill_interval),
                    (one.decode_ratio, one.decode_interval),
                )
            )
            load = (str(one.batch), f"{one.prompt} + {one.new}")
            table.add_row(model.label, *load, f"{one.prefill:,.0f}", prefill, f"{one.decode:,.0f}", decode)
    return table


def size_lines(found: Evaluation) -> list[str]:
    """Bytes of each model that was timed."""
    lines = []
    for model in found.models:
        if one := model.size:
            cache = "" if one.cache_per_token is None else f", {one.cache_per_token / 1024:,.1f} KiB of cache per token"
            peak = "" if one.peak is None else f", {one.peak / 2**20:,.0f} MiB at most while writing"
            lines.append(f"{model.label}: {one.weights / 2**20:,.1f} MiB of weights{cache}{peak}; {model.compute}")
    return lines


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def draw_similarity(similarity: Similarity, path: Path, chosen: Window | None = None) -> None:
    """The paper's Figure 2: cosine between each layer's input and output, with its standard error."""
    figure, axes = _figure(width=7.0, height=3.6)
    layers = range(similarity.num_layers)
    cosines = similarity.of_layers()
    errors = [similarity.error_of(Window(start=layer, stop=layer + 1)) for layer in layers]
    if chosen is not None:
        axes.axvspan(chosen.start - 0.5, chosen.stop - 0.5, color="tab:orange", alpha=0.25, label=f"window {chosen}")
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


def draw_heat_map(similarity: Similarity, path: Path, chosen: Window | None = None) -> None:
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
    if chosen is not None:
        label = f"window {chosen}"
        axes.plot(
            chosen.start,
            len(chosen),
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


def draw_training(fit: Fit, path: Path) -> None:
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
        title="Training the replacement",
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
