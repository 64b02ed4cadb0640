"""Progress on stderr: a bar with an ETA in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Advance(Protocol):
    """Called with how many units have just been done, and a word on how it goes."""

    def __call__(self, done: int, note: str = "") -> None: ...


LINE_EVERY_S = 10.0


def say(message: str, quiet: bool = False) -> None:
    """One line of chatter for the person watching; results go to stdout instead."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, quiet: bool = False) -> Iterator[Advance]:
    """Yield `advance(done, note)`, to be called with how many of `total` units have just been done."""
    if quiet:
        yield _silent
    elif sys.stderr.isatty():
        with _bar(title, total) as advance:
            yield advance
    else:
        yield _lines(title, total)


def _silent(done: int, note: str = "") -> None:
    pass


@contextmanager
def _bar(title: str, total: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(done: int, note: str = "") -> None:
            bar.update(task, advance=done, note=note)

        yield advance


def _lines(title: str, total: int) -> Advance:
    started = last = time.monotonic()
    finished = 0

    def advance(done: int, note: str = "") -> None:
        nonlocal last, finished
        finished += done
        now = time.monotonic()
        if now - last >= LINE_EVERY_S and finished < total:
            last = now
            left = (now - started) * (total - finished) / finished
            say(f"{title} {f'{finished}/{total} {note}'.rstrip()}, about {left:.0f} s left")

    return advance
