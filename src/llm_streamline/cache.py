"""States at a window's boundaries on the disk, so that later epochs need not run the frozen layers again.

One file of fixed places, mapped into memory, in the number format the model computes in; beside it what it belongs to
and a checksum of every block, without which a place counts as empty. Used only where reading is measured to be faster.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_streamline.errors import UserError
from llm_streamline.files import storage_guard, write_text
from llm_streamline.forward import Passage
from llm_streamline.layerwise import Layerwise
from llm_streamline.passages import Passages
from llm_streamline.progress import say
from llm_streamline.records import Window

TRIALS = 3  # micro-batches that are read back before the cache is trusted to be worth it


def cache_bytes(blocks: Tensor, width: int, dtype: torch.dtype) -> int:
    """What the states on (N, T) token ids take at both boundaries."""
    return 2 * blocks.numel() * width * dtype.itemsize


def reserve(stream: IO[bytes], count: int) -> None:
    """Give a file its bytes now: a full disk is an error here, and would be the process's end in mapped memory.

    The error leaves it empty: some file systems would keep the bytes that they had.
    """
    try:
        _reserve(stream, count)
    except OSError:
        stream.truncate(0)
        raise


def _reserve(stream: IO[bytes], count: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(stream.fileno(), 0, count)
    else:
        stream.truncate(count)


@dataclass
class StateCache:
    """The states (2, T, D) of each of N blocks, found by the block's token ids.

    `owner` says whose states they are: model, text, window and format. Errors: UserError on opening another's, or a
    damaged one, and for a full disk.
    """

    folder: Path
    owner: str
    blocks: Tensor
    width: int
    dtype: torch.dtype
    sums: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._places = {ids.numpy().tobytes(): place for place, ids in enumerate(self.blocks)}
        if self._index.exists():
            self.sums = self._kept()
        shape = (len(self.blocks), 2, self.blocks.shape[1], self.width)
        count = cache_bytes(self.blocks, self.width, self.dtype)
        with storage_guard(self._file):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._file.exists() or self._file.stat().st_size != count:
                self.sums.clear()
                with self._file.open("wb") as stream:
                    reserve(stream, count)
            raw = np.memmap(self._file, dtype=np.uint8, mode="r+", shape=(count,))
        self._states = torch.from_numpy(raw).view(self.dtype).view(shape)

    @property
    def _file(self) -> Path:
        return self.folder / "states.bin"

    @property
    def _index(self) -> Path:
        return self.folder / "states.json"

    def _kept(self) -> dict[int, int]:
        """The checksums that an earlier process has written down."""
        try:
            kept = json.loads(self._index.read_text(encoding="utf-8"))
            owner, sums = kept["owner"], {int(place): int(value) for place, value in kept["sums"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(self._damaged(self._index)) from error
        if owner != self.owner:
            raise UserError(
                f"{self.folder} holds states of another model, text, window or --compute; "
                "delete it and repeat the command to continue, or begin with --fresh."
            )
        return sums

    def _damaged(self, file: Path) -> str:
        return f"{file} is damaged; delete {self.folder} and repeat the command to continue."

    def has(self, ids: Tensor) -> bool:
        """Whether every block of (B, T) token ids is there."""
        return all(self._places.get(row.numpy().tobytes()) in self.sums for row in ids.cpu())

    def holds(self, ids: Tensor) -> bool:
        """Whether every block has a place."""
        return all(row.numpy().tobytes() in self._places for row in ids.cpu())

    def write(self, ids: Tensor, passage: Passage) -> None:
        for row, *states in zip(ids.cpu(), passage.entering.cpu(), passage.leaving.cpu(), strict=True):
            place = self._places[row.numpy().tobytes()]
            self._states[place] = torch.stack(states)
            self.sums[place] = self._sum(place)

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The states (B, T, D) entering and leaving. Errors: UserError where they are not what was written."""
        places = [self._places[row.numpy().tobytes()] for row in ids.cpu()]
        for place in places:
            if self._sum(place) != self.sums[place]:
                raise UserError(self._damaged(self._file))
        found = self._states[places]
        return found[:, 0], found[:, 1]

    def keep(self) -> None:
        """Write down which places are filled, for a later process."""
        write_text(self._index, json.dumps({"owner": self.owner, "sums": self.sums}))

    def _sum(self, place: int) -> int:
        return zlib.crc32(self._states[place].view(torch.uint8).numpy().data)


@dataclass
class Cached:
    """`stream`, with what it has given once taken from the cache as long as that is faster."""

    model: PreTrainedModel
    window: Window
    stream: Passages
    cache: StateCache
    quiet: bool = False
    computing: list[float] = field(default_factory=list)  # seconds per micro-batch
    reading: list[float] = field(default_factory=list)
    used: bool = True

    def __call__(self, batches: Sequence[Tensor]) -> Iterator[Passage]:
        batches = list(batches)
        while batches:
            coming = [] if self.used and self.cache.has(batches[0]) else list(self._to_compute(batches))
            if coming:
                yield from self._computed(coming)
                del batches[: len(coming)]
            else:
                yield self._read(batches.pop(0))

    def _to_compute(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """The next batches in a row of which no block is there, or will be when its turn has come."""
        seen: set[bytes] = set()

        def fresh(ids: Tensor) -> bool:
            rows = {row.numpy().tobytes() for row in ids.cpu()}
            known = self.used and (self.cache.has(ids) or bool(rows & seen))
            seen.update(rows)
            return not known

        return takewhile(fresh, batches)

    def _computed(self, batches: list[Tensor]) -> Iterator[Passage]:
        passages = self.stream(batches)
        for ids in batches:
            started = time.perf_counter()
            passage = next(passages)
            self.computing.append(time.perf_counter() - started)
            if self.used and passage.leaving.dtype != self.cache.dtype:
                self._let_go(f"this model's states are in {passage.leaving.dtype}, not in {self.cache.dtype}")
            if self.used and self.cache.holds(ids):
                self.cache.write(ids, passage)
                if len(self.reading) < TRIALS:
                    self._read(ids)
            yield passage
        if self.used:
            self.cache.keep()

    def _read(self, ids: Tensor) -> Passage:
        started = time.perf_counter()
        entering, leaving = self.cache.read(ids)
        (flow,) = Layerwise(self.model).enter([ids])
        device = self.model.device
        calls = flow.calls[self.window.start : self.window.stop]
        passage = Passage(entering.to(device), leaving.to(device), calls, flow.ids)
        self.reading.append(time.perf_counter() - started)
        if len(self.reading) == TRIALS and self.computing:
            self._judge()
        return passage

    def _judge(self) -> None:
        """Let go of the cache where computing was as fast. The least times: others' work only ever adds to them."""
        computing, reading = sum(self.computing) / len(self.computing), min(self.reading)
        if reading >= computing:
            self._let_go(f"reading a batch takes {reading:.2g} s, computing it {computing:.2g} s")

    def _let_go(self, why: str) -> None:
        self.used = False
        say(f"the cache is not used: {why}", self.quiet)
