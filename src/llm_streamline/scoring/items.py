"""Per-item files -> items: ours, lm-eval's logged samples, or OpenCompass's predictions, whichever a path holds.

An item is one multiple-choice question as one model answered it. `ppl` has a number per choice, and two kinds of them
are never mixed: `whole` is the mean negative log-likelihood in nats per token of query and choice (what OpenCompass
calls PPL), `choice` is that of the choice alone, in nats per byte (all that lm-eval's samples allow).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llm_streamline.answers import Item
from llm_streamline.errors import UserError, reason

Tasks = dict[str, dict[str, Item]]  # by task, then by item
_SAMPLES = re.compile(r"samples_(?P<task>.+?)_(?P<date>\d{4}-\d\d-\d\dT.*)\.jsonl")
_KINDS = "our items, lm-eval's samples_*.jsonl or OpenCompass's predictions"


def read_items(path: Path) -> Tasks:
    """Every task's items in a file or folder, found by what the files hold. Errors: UserError."""
    if not path.exists():
        raise UserError(f"{path} is neither a file nor a folder here; give one with {_KINDS}.")
    files = [path] if path.is_file() else _newest(sorted([*path.rglob("*.jsonl"), *path.rglob("*.json")]))
    tasks: Tasks = {}
    for file in files:
        for item in _read(file):
            known = tasks.setdefault(item.task, {})
            if item.id in known:
                raise UserError(
                    f"{file} holds item {item.id!r} of {item.task} a second time; give one run's files only."
                )
            known[item.id] = item
    if not tasks:
        raise UserError(f"{path} holds no items; give a file or folder with {_KINDS}.")
    return tasks


def _newest(files: list[Path]) -> list[Path]:
    """Of several logs of one lm-eval task, the last; everything else as it is."""
    logs: dict[tuple[Path, str], Path] = {}
    for file in files:
        if match := _SAMPLES.fullmatch(file.name):
            logs[file.parent, match["task"]] = file  # sorted by name, and the name ends in the date
    return [file for file in files if not _SAMPLES.fullmatch(file.name) or file in logs.values()]


def _read(file: Path) -> Iterator[Item]:
    """The items of one file; none where it holds something else, as folders of results do. Errors: UserError."""
    where = str(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".json":
            yield from _opencompass(file, json.loads(text))
            return
        match = _SAMPLES.fullmatch(file.name)
        for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also split inside of strings
            if line.strip():
                where = f"{file}, line {number},"
                row = json.loads(line)
                if isinstance(row, dict) and {"prompt", "text", "exact"} <= row.keys():
                    return  # a written task of an evaluation: it has no PPL
                yield sample_item(match["task"], row, where) if match else _own(row, where)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({reason(error)}); give {_KINDS}.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({getattr(error, 'msg', 'too deep')}); give {_KINDS}.") from error


def _own(row: Any, where: str) -> Item:
    try:
        return _checked(Item.model_validate(row, strict=True), where)
    except ValidationError as error:
        raise UserError(f"{where} is no item of an evaluation; give {_KINDS}.") from error


def _opencompass(file: Path, rows: Any) -> Iterator[Item]:
    """Items in OpenCompass's prediction format: {"0": {"label: A": {"PPL": ...}, ..., "prediction", "gold"}}."""
    first = next(iter(rows.values()), None) if isinstance(rows, dict) else None
    if not isinstance(first, dict) or "prediction" not in first:
        return
    for name, row in rows.items():
        where = f"{file}, item {name},"
        try:
            ppl = [_number(value["PPL"]) for key, value in row.items() if key.startswith("label: ")]
            answers = [_answer(row[key]) for key in ("prediction", "gold")]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where} has no PPL per choice, prediction or gold answer; give predictions of a PPL task."
            ) from error
        item = Item(task=file.stem, id=name, measure="whole", ppl=ppl, prediction=answers[0], gold=answers[1])
        yield _checked(item, where)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError("no number")
    return float(value)


def _answer(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError("no answer")
    return str(value)


def sample_item(task: str, row: Any, where: str) -> Item:
    """An lm-eval sample, as logged or in memory: log-likelihoods of the choices, divided by their bytes.

    Errors: UserError where it is no multiple choice.
    """
    try:
        calls = row["arguments"]
        arguments = [list(call.values()) for call in calls.values()] if isinstance(calls, dict) else calls
        scores = [float(answer[0]) for answer in row["filtered_resps"]]
        sizes = [len(call[1].encode()) for call in arguments]
        ppl = [-score / size for score, size in zip(scores, sizes, strict=True)]
        gold, name = _right_choice(row, arguments, scores), _answer(row["doc_id"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{where} is no multiple-choice sample with log-likelihoods that says which choice is right; "
            "give such tasks only."
        ) from error
    return _checked(
        Item(
            task=task,
            id=name,
            measure="choice",
            ppl=ppl,
            prediction=str(min(range(len(ppl)), key=ppl.__getitem__)),
            gold=gold,
            log_likelihoods=scores,
            choice_bytes=sizes,
        ),
        where,
    )


def _right_choice(row: dict[str, Any], arguments: list[Any], scores: list[float]) -> str:
    """The right choice's number. Errors: ValueError, KeyError.

    Where choices differ in the context alone, as in winogrande, the target is their common text; of two, lm-eval's own
    verdict on the likelier one says which is right.
    """
    texts = [call[1] for call in arguments]
    target = str(row["target"]).strip()
    told = target.isdigit() or [text.strip() for text in texts].count(target) == 1  # two choices may read the same
    if told and len({call[0] for call in arguments}) == 1:
        return _gold(target, texts)
    if len(texts) != 2 or scores[0] == scores[1]:
        raise ValueError("not said")
    likelier = int(scores[1] > scores[0])
    return str(likelier if float(row["acc"]) == 1.0 else 1 - likelier)


def _gold(target: Any, choices: list[str]) -> str:
    """The right choice's number: given as such, or by its text. Errors: ValueError."""
    text = str(target).strip()
    number = int(text) if text.isdigit() else [choice.strip() for choice in choices].index(text)
    if number >= len(choices):
        raise ValueError("no such choice")
    return str(number)


def _checked(item: Item, where: str) -> Item:
    if len(item.ppl) < 2:
        raise UserError(f"{where} has {len(item.ppl)} choice; a question has two or more.")
    if not all(math.isfinite(value) for value in item.ppl):
        raise UserError(f"{where} has a PPL that is no number; evaluate the model again.")
    return item
