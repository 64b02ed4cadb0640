"""Runs of layers, and where several of them can lie: apart, so that a layer of the source stays between any two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llm_streamline.record import Record


class Window(Record):
    """A half-open run of layers [start, stop), 0-based; equally, the boundaries start and stop."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def __len__(self) -> int:
        return self.stop - self.start

    def layers(self) -> range:
        return range(self.start, self.stop)

    def apart(self, others: Iterable[Window]) -> bool:
        """Whether it neither overlaps nor touches any other."""
        return all(self.stop < other.start or other.stop < self.start for other in others)

    @classmethod
    def parse(cls, text: str) -> Window:
        """'21:30' -> layers 21 to 29. Errors: ValueError."""
        first, colon, last = text.partition(":")
        if not (colon and first.strip().isdigit() and last.strip().isdigit() and int(first) < int(last)):
            raise ValueError(
                f"--window {text} is no run of layers; write it as first:end, such as 21:30 for layers 21 to 29"
            )
        return cls(start=int(first), stop=int(last))


def parse_windows(text: str) -> list[Window]:
    """'3:6,8:11' -> two windows, from the bottom up. Errors: ValueError for what is none, or where two meet."""
    found = sorted((Window.parse(one) for one in text.split(",")), key=lambda window: window.start)
    for number, window in enumerate(found):
        if not window.apart(found[number + 1 :]):
            raise ValueError(
                f"--window {text}: {window} and {found[number + 1]} overlap or touch; leave a layer between them, or "
                "give one longer window"
            )
    return found


def runs_of(layers: Iterable[int]) -> list[Window]:
    """Layers in as few windows as hold them and no others, in order."""
    found: list[Window] = []
    for layer in sorted(layers):
        if found and found[-1].stop == layer:
            found[-1] = Window(start=found[-1].start, stop=layer + 1)
        else:
            found.append(Window(start=layer, stop=layer + 1))
    return found


def split_evenly(total: int, parts: int) -> list[int]:
    """A number of layers as the lengths of so many windows, as even as can be, the longer first."""
    least, more = divmod(total, parts)
    return [least + (number < more) for number in range(parts)]


def places_for(bounds: Window, lengths: Sequence[int], taken: Sequence[Window] = ()) -> list[Window]:
    """Where in `bounds` a window of the first length can lie, apart from those taken and leaving room for the rest."""
    length, *rest = lengths
    windows = [Window(start=start, stop=start + length) for start in range(bounds.start, bounds.stop - length + 1)]
    return [window for window in windows if window.apart(taken) and _fit(_gaps(bounds, [*taken, window]), rest)]


def _gaps(bounds: Window, taken: Iterable[Window]) -> list[int]:
    """How long the runs of layers are in which a window could lie apart from those taken."""
    found, start = [], bounds.start
    for window in sorted(taken, key=lambda window: window.start):
        found.append(window.start - 1 - start)
        start = window.stop + 1
    return [*found, bounds.stop - start]


def _fit(gaps: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether windows of these lengths, the longest first, find room in the gaps, a layer between any two."""
    if not lengths:
        return True
    length, *rest = lengths
    tried = {gap for gap in gaps if gap >= length}
    return any(_fit(_without(gaps, gap, gap - length - 1), rest) for gap in tried)


def _without(gaps: Sequence[int], one: int, left: int) -> list[int]:
    found = [*gaps, left]
    found.remove(one)
    return found
