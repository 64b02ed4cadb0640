"""Every replacement, inherited and random, trained on the same tokens: excess loss, parameters, time.

`python -m bench.replacements MODEL TEXT ROWS.jsonl [--tokens N] [--loss nmse] [--remove 25%] [--seeds 0 1 2]` adds
what is not yet in ROWS.jsonl; `python -m bench.replacements --table ROWS.jsonl` prints the table, and with
`--figure PNG` draws the training curves (the paper's Figure 3).

The window's two boundaries are computed once per seed and handed to every training, which is otherwise the product's
own; the time of a replacement is that of the frozen layers plus its own, in seconds of the processor.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from llm_streamline import choose, passages, run
from llm_streamline.errors import UserError
from llm_streamline.forward import Passage, run_window, substituted
from llm_streamline.memory import alive_layers
from llm_streamline.progress import progress
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.scoring.perplexity import next_token_loss
from llm_streamline.text import shuffled
from llm_streamline.train import Settings, Trainer
from llm_streamline.workspace import Workspace

KINDS = ("none", "layer", "mlp", "swiglu", "swiglu:residual", "ffn", "ffn:residual")
INITS = ("inherited", "random")


class Remembered:
    """`run_window` with the passages of one model, window and text kept, and the processor's seconds they took."""

    def __init__(self) -> None:
        self.passages: dict[bytes, Passage] = {}
        self.seconds = 0.0

    def __call__(self, model: Any, window: Any, ids: torch.Tensor) -> Passage:
        key = ids.to(torch.int32).numpy().tobytes()
        if key not in self.passages:
            started = time.process_time()
            self.passages[key] = run_window(model, window, ids)
            self.seconds += time.process_time() - started
        return self.passages[key]


def rows(options: argparse.Namespace, seed: int, done: set[tuple[Any, ...]]) -> Any:
    """One finished row after the other."""
    remembered = Remembered()
    passages.run_window = remembered  # type: ignore[assignment]
    runtime = Runtime(compute="float32")
    base = {"model": options.model, "data": options.text, "tokens": options.tokens, "remove": options.remove}
    base |= {"seed": seed, "loss": options.loss, "lr": options.lr, "batch": options.batch}
    base |= {"custom_code": True, "validation_tokens": 32_768}
    first = Workspace(Recipe(**base), runtime)
    similarity = run.measure(first)
    dense = next_token_loss(first.model, first.parts.validation, 8, "dense").nats
    for replace in KINDS:
        for init in INITS if replace != "none" else INITS[:1]:
            recipe = Recipe(**base, replace=replace, init=init)
            work = Workspace(recipe, runtime)
            name = (replace, init, seed, options.loss)
            if name in done or not possible(work):
                continue
            for part in ("model", "parts", "tokenizer"):
                work.__dict__[part] = getattr(first, part)
            yield dict(zip(("replace", "init", "seed", "loss_name"), name, strict=True)) | measured(
                work, similarity, remembered, dense
            )


def possible(work: Workspace) -> bool:
    try:
        return work.shape is not None
    except UserError as error:
        print(f"{work.recipe.replace} {work.recipe.init}: {error}", file=sys.stderr)
        return False


def measured(work: Workspace, similarity: Any, remembered: Remembered, dense: float) -> dict[str, Any]:
    """Train one replacement and say what it keeps: excess of the next-token loss over the dense model's, in nats."""
    recipe, plan = work.recipe, choose.choose(similarity, work.shape, work.recipe)
    validation = work.parts.validation
    row: dict[str, Any] = {"window": str(plan.window), "parameters": plan.parameters_after, "dense": dense}
    replacement = []
    if recipe.replace != "none":
        training = shuffled(work.parts.training, recipe.seed)
        module = work.replacement(work.model, plan.replaced())
        alive = (alive_layers(recipe, work.shape.num_layers), work.config.hidden_size)
        settings = Settings.resolve(recipe, training, alive, work.memory, False)
        with progress("frozen layers", training.numel()) as advance:
            for ids in (*training.split(settings.batch), *validation.split(settings.batch)):
                remembered(work.model, plan.window, ids.long())
                advance(ids.numel())
        started = time.process_time()
        fit = Trainer(work.model, plan.window, module, settings).fit(training, validation)
        row |= {"seconds": time.process_time() - started, "frozen": remembered.seconds}
        row |= {"trained": fit.trained_parameters, "tokens": fit.tokens, "steps": fit.steps, "lr": fit.lr}
        row |= {"distillation": fit.validation_best, "curve": [(point.tokens, point.loss) for point in fit.curve]}
        replacement = list(module)
    with substituted(work.model, plan.window, replacement):
        row["loss"] = next_token_loss(work.model, validation, 8, recipe.replace, True).nats
    return row | {"excess": row["loss"] - dense}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def table(found: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds, as Markdown."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        groups[row["replace"], row["init"] if row["replace"] != "none" else ""].append(row)
    layer = [row["seconds"] + row["frozen"] for row in groups["layer", "inherited"]]
    none = {row["seed"]: row["excess"] for row in groups["none", ""]}
    print(
        "| replacement | start | trained parameters | excess, nats | of `none` | distillation loss | time / `layer` |"
    )
    print("|---|---|---|---|---|---|---|")
    for (replace, init), rows_ in groups.items():
        excess = [row["excess"] for row in rows_]
        spread = f" ± {stdev(excess):.3f}" if len(excess) > 1 else ""
        text = f"| `{replace}` | {init} | {rows_[0].get('trained', 0):,} | {mean(excess):.3f}{spread} "
        text += f"| {mean(row['excess'] / none[row['seed']] for row in rows_):.2f} "
        if "seconds" in rows_[0]:
            seconds = [row["seconds"] + row["frozen"] for row in rows_]
            text += f"| {mean(row['distillation'] for row in rows_):.4f} | {mean(seconds) / mean(layer):.2f} |"
        print(text if text.endswith("|") else text + "| | |")


def figure(found: list[dict[str, Any]], file: Path) -> None:
    """Training loss against tokens, the mean over seeds."""
    from matplotlib.figure import Figure

    groups: dict[str, list[Any]] = defaultdict(list)
    for row in found:
        if "curve" in row:
            groups[f"{row['replace']}, {row['init']}"].append(row["curve"])
    drawing = Figure(figsize=(8, 5), layout="constrained")
    axes = drawing.subplots()
    for name, curves in groups.items():
        style = "-" if "inherited" in name else "--"
        losses = [mean(points) for points in zip(*([loss for _, loss in curve] for curve in curves), strict=True)]
        axes.plot([tokens / 1000 for tokens, _ in curves[0]], losses, style, label=name, linewidth=1.4)
    axes.set(xlabel="training tokens (thousands)", ylabel="distillation loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    drawing.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?")
    parser.add_argument("rows", nargs="?", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--tokens", default="500k")
    parser.add_argument("--remove", default="25%")
    parser.add_argument("--loss", default="nmse")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    if options.table:
        table(read(options.table))
        if options.figure:
            figure(read(options.table), options.figure)
        return
    done = {(row["replace"], row["init"], row["seed"], row["loss_name"]) for row in read(options.rows)}
    for seed in options.seeds:
        for row in rows(options, seed, done):
            with options.rows.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            print(f"{row['replace']} {row['init']} seed {seed}: excess {row['excess']:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
