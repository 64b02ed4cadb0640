"""The states at all boundaries through a file, so that their number, and a model's depth, cost no memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_streamline.errors import UserError
from llm_streamline.families import layers_of
from llm_streamline.files import is_storage_failure, storage_sentence
from llm_streamline.layerwise import Flow, Layerwise, grouped


class States(Protocol):
    """A micro-batch's states (B, T, D) at one boundary, of which some tokens at a time are asked for."""

    @property
    def shape(self) -> torch.Size: ...
    def __getitem__(self, part: tuple[slice, slice]) -> Tensor: ...


class _Stored:
    """States (B, T, D) that lie in a file from `start` on."""

    def __init__(self, file: IO[bytes], start: int, like: Tensor) -> None:
        self._file, self._start = file, start
        self.shape, self._dtype, self._device = like.shape, like.dtype, like.device

    def __getitem__(self, part: tuple[slice, slice]) -> Tensor:
        sequences, length, width = self.shape
        first, last, _ = part[1].indices(length)
        rows = []
        for sequence in range(sequences):
            self._file.seek(self._start + (sequence * length + first) * width * self._dtype.itemsize)
            raw = bytearray(self._file.read((last - first) * width * self._dtype.itemsize))
            rows.append(torch.frombuffer(raw, dtype=self._dtype).view(last - first, width))
        return torch.stack(rows).to(self._device)


def spooled(model: PreTrainedModel, batches: Sequence[Tensor], scratch: Path | None) -> Iterator[Sequence[States]]:
    """The states at all boundaries, a micro-batch at a time; as many as share a reading of the weights are in the file.

    The file has no name and is gone with the process. Errors: UserError where the disk fills.
    """
    layers = Layerwise(model)
    for group in grouped(batches):
        with tempfile.TemporaryFile(dir=scratch) as file:
            try:
                found = _written(layers, group, file)
            except OSError as error:
                if not is_storage_failure(error):
                    raise
                raise UserError(storage_sentence(error, (scratch or Path(tempfile.gettempdir())) / "states")) from error
            yield from found


def _written(layers: Layerwise, group: Sequence[Tensor], file: IO[bytes]) -> list[list[_Stored]]:
    """Per micro-batch its states at the boundaries 0..L."""
    flows = layers.enter(group)
    found: list[list[_Stored]] = [[] for _ in flows]
    for boundary in range(len(layers_of(layers.model)) + 1):
        if boundary:
            layers.advance(flows, [boundary - 1])
        for flow, states in zip(flows, found, strict=True):
            states.append(_Stored(file, file.tell(), flow.state))
            _write(file, flow)
    file.flush()
    return found


def _write(file: IO[bytes], flow: Flow) -> None:
    file.write(flow.state.cpu().contiguous().view(torch.uint8).numpy().data)
