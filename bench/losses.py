"""One inherited layer trained by one loss after the other on the same tokens: excess loss and time.

`python -m bench.losses MODEL TEXT ROWS.jsonl [--tokens 250k] [--losses nmse kl mse:0.6,kl:0.4 ...] [--lr 1e-3]` adds
what is not yet in ROWS.jsonl; `python -m bench.losses --table ROWS.jsonl` prints the table. `none` is the window
deleted.

The window's two boundaries are computed once per seed and handed to every training, which is otherwise the product's
own; time is in seconds of the processor, of the frozen layers below and all that a loss takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.replacements import Remembered, measured, read
from llm_streamline import passages, run
from llm_streamline.objective import LOSS
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.scoring.perplexity import next_token_loss
from llm_streamline.workspace import Workspace

LOSSES = ("none", "nmse", "mse", "cosine", "lm", "kl", "kl:100", "kl+0.3lm", "mse:0.6,kl:0.4", LOSS)


def rows(options: argparse.Namespace, seed: int, done: set[tuple[Any, ...]]) -> Any:
    """One finished row after the other."""
    remembered, runtime = Remembered(), Runtime(compute="float32")
    passages.run_window = remembered  # type: ignore[assignment]
    base = {"model": options.model, "data": options.text, "tokens": options.tokens, "remove": options.remove}
    base |= {"seed": seed, "lr": options.lr, "validation_tokens": 32_768}
    first = Workspace(Recipe(**base), runtime)
    similarity = run.measure(first)
    dense = next_token_loss(first.model, first.parts.validation, 8, "dense").nats
    for loss in options.losses:
        if (loss, options.lr, seed) in done:
            continue
        own = {"replace": "none"} if loss == "none" else {"loss": loss}
        if "kl" in loss:
            own["temperature"] = options.temperature
        work = Workspace(Recipe(**base, **own), runtime)
        for part in ("model", "parts", "tokenizer"):
            work.__dict__[part] = getattr(first, part)
        name = {"loss_name": loss, "given_lr": options.lr, "seed": seed}
        yield name | measured(work, similarity, remembered, dense)


def table(found: list[dict[str, Any]]) -> None:
    """As Markdown; time is over that of the first trained row."""
    first = next(row["seconds"] + row["frozen"] for row in found if "seconds" in row)
    none = {row["seed"]: row["excess"] for row in found if row["loss_name"] == "none"}
    print("| `--loss` | lr | seed | window | excess, nats | of `none` | its last loss | time |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        share = f"{row['excess'] / none[row['seed']]:.2f}" if row["seed"] in none else ""
        text = f"{row['seed']} | {row['window']} | {row['excess']:.4f} | {share}"
        if "seconds" in row:
            time = (row["seconds"] + row["frozen"]) / first
            text = f"{row['given_lr'] or 'default'} | {text} | {row['distillation']:.4f} | {time:.2f}"
        else:
            text = f" | {text} | | "
        print(f"| `{row['loss_name']}` | {text} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?")
    parser.add_argument("rows", nargs="?", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--tokens", default="250k")
    parser.add_argument("--remove", default="25%")
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    if options.table:
        table(read(options.table))
        return
    done = {(row["loss_name"], row["given_lr"], row["seed"]) for row in read(options.rows)}
    for seed in options.seeds:
        for row in rows(options, seed, done):
            with options.rows.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            print(f"{row['loss_name']} seed {seed}: excess {row['excess']:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
