"""Tasks of lm-eval, by name or as a YAML file, run through its Python API on a model that is already loaded.

Multiple choice gives items, whose PPL is of the choices alone; anything else gives lm-eval's own figures.
lm-eval is an optional extra, imported only where such a task is asked for.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_streamline.checkpoint import context_length
from llm_streamline.errors import UserError, reason
from llm_streamline.files import sha256
from llm_streamline.records import Item
from llm_streamline.scoring.items import sample_item

YAML = (".yaml", ".yml")
_RESAMPLES = 1000  # of lm-eval, where it has no formula for a standard error
_BATCH = 8


@dataclass(frozen=True)
class HarnessTask:
    """One task of lm-eval; `digest` is of its version, its configuration and its documents."""

    name: str
    digest: str
    task: Any


@dataclass(frozen=True)
class Answers:
    """What lm-eval made of a task: items where it is multiple choice, and its own figures with standard errors."""

    items: list[Item]
    metrics: dict[str, tuple[float, float | None]]
    count: int


def open_harness(given: str) -> list[HarnessTask]:
    """The task, or the tasks of a group, that a name or a YAML file stands for. Errors: UserError."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--tasks {given} needs lm-eval, which is not installed; install 'llm-streamline[eval]', "
            "or give questions in a .jsonl file, which need nothing."
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    file = given.endswith(YAML)
    if file and not Path(given).is_file():
        raise UserError(
            f"--tasks {given} is no file here; give a task's .yaml, a .jsonl, or a name that lm-eval knows."
        )
    manager = TaskManager(include_defaults=not file)
    if not file and given not in manager.all_tasks:
        raise UserError(
            f"--tasks {given} is neither a .jsonl or .yaml file here nor a task of lm-eval; "
            "'lm-eval ls tasks' lists those."
        )
    try:
        with redirect_stdout(sys.stderr):
            found = manager.load(given)["tasks"]
            return [HarnessTask(name, _digest(name, given, task), task) for name, task in found.items()]
    except Exception as error:  # task files are code and data of many kinds, and data sets may have to be fetched
        raise UserError(
            f"--tasks {given} cannot be loaded by lm-eval ({reason(error)}); mend the task, or fetch its data first."
        ) from error


def _digest(name: str, given: str, task: Any) -> str:
    text = Path(given).read_text(encoding="utf-8") if given.endswith(YAML) else name
    documents = (json.dumps(document, default=str, sort_keys=True).encode() for document in task.eval_docs)
    return sha256(version("lm-eval").encode(), text.encode(), *documents)


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    one: HarnessTask,
    limit: int | None,
    batch: int | None,
) -> Answers:
    """The task's answers by this model. What is longer than the context is cut at the front, by lm-eval."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with redirect_stdout(sys.stderr):
        longest = context_length(model.config)
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch or _BATCH, max_length=longest)
        found = simple_evaluate(wrapped, tasks=[one.task], limit=limit, log_samples=True, bootstrap_iters=_RESAMPLES)
    samples = found["samples"][one.name]
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    return Answers(_items(one, samples), _metrics(found["results"][one.name]), len(samples))


def _items(one: HarnessTask, samples: list[dict[str, Any]]) -> list[Item]:
    """None where the task asks for something else than the one right choice of several."""
    if one.task.OUTPUT_TYPE != "multiple_choice":
        return []
    try:
        return [sample_item(one.name, sample, f"task {one.name}") for sample in samples]
    except UserError:
        return []


def _metrics(results: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """lm-eval's own figures, such as 'acc,none', each with its standard error where it has one."""
    found = {}
    for key, value in results.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, (int, float)):
            error = results.get(f"{name}_stderr,{kind}")
            found[key] = (float(value), float(error) if isinstance(error, (int, float)) else None)
    return found
