"""Tables and lines of a run and of an evaluation, for the terminal."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from llm_streamline import tables, verdict
from llm_streamline.answers import FEWEST_EFFECTIVE, SIGNIFICANCE, Stability
from llm_streamline.card import score_rows
from llm_streamline.comparison import saved_of
from llm_streamline.findings import sentence, sentences
from llm_streamline.quantities import counted
from llm_streamline.ranking import NAMES, Ranking, confidences, disagreement
from llm_streamline.ranking import table as ranking_rows
from llm_streamline.records import Fit, LayerPlan, LinearFit, Scores, Similarity, Window

if TYPE_CHECKING:
    from rich.table import Table

    from llm_streamline.estimate import Estimate
    from llm_streamline.evaluation import Chain, Evaluation, ModelScore, Result, Sweep
    from llm_streamline.runtimes.records import Compared

MOST_OF_A_GROUP = 12  # tasks that the terminal lists one by one
USUAL_SHARES = (0.125, 0.25, 0.375, 0.5)


def estimate_table(found: Estimate) -> Table:
    """A line per stage: what it takes of memory and disk, and how long its tokens take."""
    table = _table("stage", "memory", "of", "disk", "tokens", "time, at most")
    for stage in found.stages:
        there = f"{found.available(stage) / 1e9:.1f} GB"
        spent = "" if stage.seconds is None else _duration(stage.seconds)
        sizes = (f"{stage.memory / 1e9:.2f} GB", there, f"{stage.disk / 1e9:.2f} GB")
        table.add_row(stage.name, *sizes, f"{stage.tokens:,}", spent)
    return table


def estimate_lines(found: Estimate) -> list[str]:
    """How the model is held, and what would help where something does not fit."""
    lines = ["the model is held in memory"]
    if found.offloaded:
        lines = ["the model does not fit: its layers are read from the disk, each once for 32k tokens"]
    elif found.writes_offloaded:
        lines = ["the model is held in memory while it computes, and written and checked layer by layer"]
    problem = found.problem(found.disk)
    return [*lines, *([f"does not fit: {problem}"] if problem else [])]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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


def ranking_lines(ranking: Ranking) -> list[str | Table]:
    """What each window costs by every score, and which of them each score would take."""
    head, rows = ranking_rows(ranking)
    table = _table(*head)
    for row in rows:
        table.add_row(*row)
    chosen = f"compress would take {ranking.winner.window}: {NAMES[ranking.by]} decides; {disagreement(ranking)}"
    return [table, chosen, f"{confidences(ranking)}; * is what a score would take"]


def usual_lengths(num_layers: int) -> list[int]:
    """An eighth to half of the layers, each length once."""
    return sorted({max(1, int(share * num_layers + 0.5)) for share in USUAL_SHARES})


def summary_table(plan: LayerPlan, scores: Scores) -> Table:
    """What was removed, what it cost and what the replacement brought back."""
    table = _table("model", "layers", "parameters", "validation loss", "excess, nats")
    for name, layers, parameters, loss, _, excess in score_rows(plan, scores):
        table.add_row(name, layers, parameters, loss, excess)
    return table


def chain_table(found: Chain) -> Table:
    """What each step of dense -> shortened -> quantised leaves; empty what was not measured."""
    rows = tables.chain(found)
    table = _table(*rows.head)
    for row in rows.rows:
        table.add_row(*row)
    return table


def sweep_table(found: Sweep) -> Table:
    """A line for each model: what is gone, and what is kept; empty what was not measured."""
    head = ("model", "removed", "layers", "parameters", "of them gone", "perplexity", "accuracy", "stability", "speed")
    table = _table(*head)
    for one in (found.dense, *found.points, *found.beside):
        kept = [one.accuracy, one.stability, one.decode]
        figures = [math.exp(one.nats) if one.nats is not None else None, *kept]
        cells = ["" if value is None else f"{value:.3f}" for value in figures]
        gone = f"{one.share:.1%}"
        table.add_row(one.name, one.removed or "", str(one.layers), f"{one.parameters:,}", gone, *cells)
    return table


def summary_lines(result: Result) -> list[str]:
    """The lines after the table: parameters, training, healing, verification, path."""
    plan, fit, verification = result.plan, result.fit, result.verification
    saved = plan.parameters_before - plan.parameters_after
    share = saved / plan.parameters_before
    lines = [
        f"removed   {plan}",
        f"parameters {plan.parameters_before:,} -> {plan.parameters_after:,} ({saved:,} fewer, {share:.1%})",
    ]
    rounds = {f"round {turn}": one for turn, one in enumerate(result.earlier, start=1)}
    trainings = {**rounds, "trained": fit, "healed": result.healing}
    lines += [f"{name:<9} {_training_line(one)}" for name, one in trainings.items() if isinstance(one, Fit)]
    if isinstance(fit, LinearFit):
        lines.append(f"solved    {verdict.solved(fit)}")
    lines.append(
        f"verified  in a fresh process: logits within {verification.logits_error:.1e}, cached = uncached generation, "
        f"{verification.tensors} tensors, {verification.parameters:,} parameters"
    )
    lines += [f"limit     {limit}" for limit in verification.limits]
    return [*lines, f"model     {result.model}"]


def _training_line(fit: Fit) -> str:
    return (
        f"{fit.trained_parameters:,} parameters on {fit.tokens:,} tokens in {counted(fit.steps, 'step')}; "
        f"{fit.measure} {fit.validation_before:.5f} -> {fit.validation_best:.5f} (step {fit.best_step})"
    )


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


def macro_lines(mean: dict[str, float], tasks: int) -> list[str]:
    """The average over several tasks, each weighing the same."""
    if tasks < 2:
        return []
    return [
        f"macro average over {tasks} tasks: accuracy {mean['accuracy_before']:.3f} -> {mean['accuracy_after']:.3f}, "
        f"stability {mean['stability']:.3f}, flips {mean['flips']:.3f}"
    ]


def compared_lines(found: Compared) -> list[str]:
    """What another program computes, and what of it was not put to the test."""
    written = "" if found.number_format == "f32" else ", each after those of transformers,"
    texts = "" if found.tokenised is None else f", {found.tokenised} texts cut into the same tokens"
    program = f"{found.runtime} {found.version}, {found.number_format}"
    return [
        f"{program}: {found.equal} of {found.tokens} greedy tokens{written} as in transformers, "
        f"logits within {found.logits_error:.1e}, divergence {found.divergence:.1e} nats{texts}",
        *(f"limit: {limit}" for limit in found.limits),
    ]


def evaluation_lines(found: Evaluation) -> list[str | Table]:
    """Accuracies, perplexities and, against the dense model, stability, each with what it is."""
    lines: list[str | Table] = []
    if any(one.tasks for one in found.models):
        lines += [
            accuracy_table(found),
            "accuracy is by summed log-likelihood; by PPL is the share right that stability counts",
            *dict.fromkeys(f"{task.task}: {task.note}" for one in found.models for task in one.tasks if task.note),
        ]
    if any(one.groups for one in found.models):
        lines += [group_table(found), "a group's figures are means in which every task of it weighs the same"]
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
        shown = [task for task in one.stability or () if task.task not in _folded(one)]
        if shown:
            lines.append(f"{one.label} against {found.against}; accuracy here is by PPL")
            lines += [stability_table(shown), *stability_lines(shown)]
    return [*lines, *sentences(found), *(f"warning: {one}" for one in found.warnings)]


def kept_lines(found: Evaluation | None) -> list[str]:
    """What a run's saved model keeps, and what is not as it seems; nothing where nothing was asked."""
    if found is None:
        return []
    saved = saved_of(found) or found.models[-1]
    return [f"kept      {sentence(found, saved)}", *(f"warning   {one}" for one in found.warnings)]


def _folded(model: ModelScore) -> set[str]:
    """Tasks that the terminal shows as their group only; evaluation.json has them all."""
    size = Counter(task.group for task in model.tasks)
    return {task.task for task in model.tasks if task.group and size[task.group] > MOST_OF_A_GROUP}


def group_table(found: Evaluation) -> Table:
    table = _table("model", "group", "tasks", "items", "mean", "stability")
    for model in found.models:
        for one in model.groups:
            name = "" if one.metric == "accuracy" else f" {one.metric}"
            stable = "" if one.stability is None else f"{one.stability:.3f}"
            table.add_row(model.label, one.group, str(one.tasks), str(one.items), f"{one.value:.3f}{name}", stable)
    return table


def accuracy_table(found: Evaluation) -> Table:
    table = _table("model", "task", "items", "accuracy [95 %]", "by PPL", "cut")
    for model in found.models:
        folded = _folded(model)
        for one in (task for task in model.tasks if task.task not in folded):
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
