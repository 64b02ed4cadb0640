"""Ctrl-C and SIGTERM: at once where nothing is lost, between two steps where a state is to be written first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from llm_streamline.errors import Interruption, Stopped

_ASKING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_at_once() -> Iterator[None]:
    """SIGTERM ends what runs like any error: in one sentence, with half-written files removed. Errors: Stopped."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interruption(Stopped(number, "the same command continues after the last finished stage"))

    try:
        with _handled((signal.SIGTERM,), stop):
            yield
    except Interruption as interruption:
        raise interruption.stopped from None


@contextmanager
def stop_between_steps() -> Iterator[Callable[[], int]]:
    """Yield what says which signal has asked to stop, 0 for none. A second Ctrl-C stops at once."""
    asked = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = number

    with _handled(_ASKING, note):
        yield lambda: asked


@contextmanager
def _handled(numbers: tuple[int, ...], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody handle signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
