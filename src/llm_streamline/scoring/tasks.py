"""Tasks of lm-eval, by name or as a YAML file, run through its Python API.

Multiple choice gives items, whose PPL is of the choices alone; anything else gives what was written, and lm-eval's own
figures. lm-eval is an optional extra, imported only where such a task is asked for.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm_streamline.answers import Item
from llm_streamline.errors import UserError, reason
from llm_streamline.evaluation import Written
from llm_streamline.files import sha256
from llm_streamline.progress import say
from llm_streamline.scoring.items import sample_item
from llm_streamline.scoring.samples import written_samples
from llm_streamline.scoring.writing import check_rouge

YAML = (".yaml", ".yml")
_RESAMPLES = 1000  # of lm-eval, where it has no formula for a standard error


@dataclass(frozen=True)
class HarnessTask:
    """One task of lm-eval; `digest` is of its version, its configuration and its documents.

    `group` is the group or tag that was asked for, `note` what its file says of where its data differ.
    """

    name: str
    digest: str
    task: Any
    group: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Answers:
    """What lm-eval made of a task: items where it is multiple choice, else what was written, and its own figures.

    Each figure comes with its standard error.
    """

    items: list[Item]
    written: list[Written]
    metrics: dict[str, tuple[float, float | None]]
    count: int


def open_harness(given: str) -> list[HarnessTask]:
    """The task, or the tasks of a group, that a name or a YAML file stands for. Errors: UserError."""
    file = given.endswith(YAML)
    manager = _manager(given, include_defaults=not file)
    if file and not Path(given).is_file():
        raise UserError(
            f"--tasks {given} is no file here; give a task's .yaml, a .jsonl, or a name that lm-eval knows."
        )
    if not file and given not in manager.all_tasks:
        raise UserError(
            f"--tasks {given} is neither a .jsonl or .yaml file here nor a task of lm-eval; "
            "'lm-eval ls tasks' lists those."
        )
    group = given if given in (*manager.all_groups, *manager.all_tags) else None
    try:
        with redirect_stdout(sys.stderr):
            found = [_opened(name, task, group) for name, task in manager.load(given)["tasks"].items()]
    except ConnectionError as error:  # its text names the data set
        raise UserError(
            f"--tasks {given} needs data that could not be fetched ({reason(error)}); run it once where there is a "
            "network, or leave it out."
        ) from error
    except Exception as error:  # task files are code and data of many kinds
        raise UserError(
            f"--tasks {given} cannot be loaded by lm-eval ({reason(error)}); mend the task, or fetch its data first."
        ) from error
    if any(one.task.OUTPUT_TYPE != "multiple_choice" for one in found):
        check_rouge()
    return found


def _manager(given: str, include_defaults: bool) -> Any:
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--tasks {given} needs lm-eval, which is not installed; install 'llm-streamline[eval]', "
            "or give questions in a .jsonl file, which need nothing."
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return _index(include_defaults)


@cache
def _index(include_defaults: bool) -> Any:
    """lm-eval's list of tasks, which takes it seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _opened(name: str, task: Any, group: str | None) -> HarnessTask:
    configuration = task.dump_config()
    note = (configuration.pop("metadata", None) or {}).get("note")  # the rest of it is where the file lies
    text = json.dumps(configuration, default=str, sort_keys=True)
    documents = (json.dumps(document, default=str, sort_keys=True).encode() for document in task.eval_docs)
    return HarnessTask(name, sha256(version("lm-eval").encode(), text.encode(), *documents), task, group, note)


def run_harness(
    model: Any, tokenizer: PreTrainedTokenizerBase, one: HarnessTask, limit: int | None, quiet: bool = False
) -> Answers:
    """The task's answers by a model as `backend` gives it. What exceeds the context is cut at the front, by lm-eval."""
    from lm_eval.evaluator import simple_evaluate

    try:
        with redirect_stdout(sys.stderr):
            found = simple_evaluate(
                model,
                tasks=[one.task],
                limit=limit,
                log_samples=True,
                bootstrap_iters=_RESAMPLES,
                task_manager=_index(include_defaults=False),  # else it lists all tasks anew, for seconds
            )
    except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:  # a task and a model at odds
        raise UserError(f"task {one.name} cannot be asked of this model ({reason(error)}); leave it out.") from error
    samples, metrics = found["samples"][one.name], _metrics(found["results"][one.name])
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    if one.task.OUTPUT_TYPE != "multiple_choice":
        return Answers([], written_samples(one.name, samples, tokenizer), metrics, len(first))
    return Answers(_items(one, first, quiet), [], metrics, len(first))


def _items(one: HarnessTask, samples: list[dict[str, Any]], quiet: bool) -> list[Item]:
    """None, with a line that says so, where the task asks for something else than the one right choice of several."""
    try:
        return [sample_item(one.name, sample, f"task {one.name}") for sample in samples]
    except UserError as error:
        say(f"warning: no stability of {one.name}, only lm-eval's own figures: {reason(error)}", quiet)
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
