"""The control of `bench.quality`: the dense model itself, trained on the text's next tokens as others' models are.

`python -m bench.control ROWS --model MODEL --data TEXT.jsonl --heldout TEXT.jsonl --questions TASK.jsonl
    [--seeds 0 1 2]`

adds the rows `control` (one layer trains, as where a replacement does) and `control-all` (every layer, as where the
rest is healed), at the rate that healing has for weights of a trained model. A loss against the dense model's own
states or logits, or that part of a loss, has nothing to teach it. What they gain is what the text alone teaches a
model of this size: excess losses can be read over it too.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from bench.quality import Judge, described, flags, leagues
from bench.rows import SUFFIX, check_row, write_row
from llm_streamline.checkpoint import Source, load_model
from llm_streamline.forward import substituted
from llm_streamline.healing import GENTLER
from llm_streamline.memory import release
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import Fit, Window
from llm_streamline.replacement import build_replacement
from llm_streamline.student import Student
from llm_streamline.text import shuffled
from llm_streamline.train import Settings, Trainer
from llm_streamline.workspace import Workspace

WHOLE = {"control": False, "control-all": True}


def trained(work: Workspace, every: bool) -> tuple[Student, Window, Fit]:
    """The dense model's layers, one in the middle or all of them trained by the loss of the next token; and which."""
    model, layers = work.model, work.shape.num_layers
    student = Student(list(build_replacement(model, range(layers), "inherited", 0)), range(layers))
    chosen = Window(start=0, stop=layers) if every else Window(start=layers // 2, stop=layers // 2 + 1)
    for number, layer in enumerate(student):
        layer.requires_grad_(number in chosen.layers())
    blocks = shuffled(work.parts.training, work.recipe.seed)
    settings = Settings.resolve(work.recipe, blocks, (layers, work.config.hidden_size), work.memory, work.bfloat16)
    settings = replace(settings, lr=GENTLER * settings.lr, min_lr=GENTLER * settings.min_lr)
    trainer = Trainer(model, Window(start=0, stop=layers), student, settings, quiet=True)
    return student, chosen, trainer.fit(blocks, work.parts.validation)


def controlled(recipe: Recipe, every: bool, judge: Judge) -> dict[str, Any]:
    release()
    spent = time.process_time()
    work = Workspace(recipe, Runtime(quiet=True))
    student, chosen, fit = trained(work, every)
    seconds = time.process_time() - spent
    model = load_model(Source(recipe.model), torch.float32)  # as the dense model's row, and all others, are judged
    with substituted(model, chosen, list(student.float())[chosen.start : chosen.stop]):
        row = judge.row(model)
    gained = {"validation": fit.validation_best - fit.validation_before, "validation_dense": fit.validation_before}
    tokens = {"trained": fit.trained_parameters, "tokens": fit.tokens, "training_seconds": fit.seconds, "memory": 0}
    return {"window": "", "parameters": work.shape.total, "cpu_seconds": seconds, **tokens, **gained, **row}


def add_controls(options: argparse.Namespace) -> None:
    judge = Judge(options.model, options.heldout, options.questions)
    for seed in options.seeds:
        for name, every in WHOLE.items():
            files = {remove: options.rows / f"{name}-{remove.rstrip('%')}-{seed}{SUFFIX}" for remove in options.remove}
            base = {"model": options.model, "data": options.data, "tokens": options.tokens, "seed": seed, "loss": "lm"}
            asked, there = described(base), [file for file in files.values() if file.exists()]
            for file in there:
                check_row(file, asked=asked, judged_by=judge.by)
            if len(there) == len(files):
                continue
            row = {"seed": seed, "asked": asked, **controlled(Recipe(**base), every, judge)}
            for remove, file in files.items():  # nothing is removed: the row is the same beside every share
                write_row(file, {"method": name, "remove": remove, **row})
            print(f"{name}-{seed}: excess {row['validation']:.4f} nats", file=sys.stderr)


def main() -> None:
    for options in leagues(flags(__doc__).parse_args()):
        add_controls(options)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
