"""Where documents come from: local .txt and .jsonl files, or a Hub data set; read in a seeded random order.

Local files are indexed by byte offset first and then read by seeking, so the order is a true shuffle of any size of
file and only the documents that are used are decoded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llm_streamline.checkpoint import BUNDLED
from llm_streamline.errors import UserError, reason

HUB = "hub:"
TEXT_FIELDS = ("text", "content", "document", "story")
_BUNDLED_TEXT = Path(__file__).parent / "demo" / "stories.jsonl"
# a .txt is one long text; it is dealt out in about 256 pieces of whole lines, of 4 to 64 KB
_PIECES, _SMALLEST_PIECE, _LARGEST_PIECE = 256, 4096, 65_536
_LOOK_AHEAD_BYTES = 256
_HUB_BUFFER = 10_000


@dataclass(frozen=True)
class _Piece:
    """One document's place in a local file."""

    file: Path
    offset: int
    length: int


class Documents:
    """An iterable of texts in seeded order; `count` is how many there are, None for a stream of unknown length."""

    def __init__(self, pieces: list[_Piece], hub: list[str], field: str | None, seed: int) -> None:
        self._pieces, self._hub, self._field, self._seed = pieces, hub, field, seed

    @classmethod
    def open(cls, data: tuple[str, ...], field: str | None, seed: int) -> Documents:
        """Index the local files. Errors: UserError for what cannot be read as text."""
        if not data:
            raise UserError(
                "no --data was given; give a .txt or .jsonl file or hub:NAME, or --data bundled for the small text "
                "that ships with this package."
            )
        hub = [name.removeprefix(HUB) for name in data if name.startswith(HUB)]
        if len(set(data)) < len(data):
            raise UserError(f"--data names {max(data, key=data.count)} twice; give every source once.")
        files = [_BUNDLED_TEXT if name == BUNDLED else Path(name) for name in data if not name.startswith(HUB)]
        pieces = [piece for file in files for piece in _index(file)]
        return cls(pieces, hub, field, seed)

    @property
    def count(self) -> int | None:
        return None if self._hub else len(self._pieces)

    def __iter__(self) -> Iterator[str]:
        """Each document once: a copy of one that was given before is left out, so that no part holds another's."""
        seen: set[bytes] = set()
        for text in self._all():
            digest = blake2b(text.encode(), digest_size=12).digest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                yield text

    def _all(self) -> Iterator[str]:
        pieces = self._pieces.copy()
        random.Random(self._seed).shuffle(pieces)
        for piece in pieces:
            yield _read(piece, self._field)
        for name in self._hub:
            yield from _stream(name, self._field, self._seed)


def _index(file: Path) -> list[_Piece]:
    """Where each document of a file lies. Errors: UserError."""
    if not file.is_file():
        raise UserError(f"--data {file} is no file here; give a .txt or .jsonl file, hub:NAME, or bundled.")
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--data {file} ends in {file.suffix!r}; .txt and .jsonl files can be read.")
    pieces, start, offset = [], 0, 0
    size = max(_SMALLEST_PIECE, min(_LARGEST_PIECE, file.stat().st_size // _PIECES))
    for line in _lines(file, size if file.suffix == ".txt" else -1):
        if b"\0" in line:
            raise UserError(f"--data {file} is binary; give text in UTF-8.")
        offset += len(line)
        whole = line.strip() if file.suffix == ".jsonl" else offset - start >= size
        if whole:
            pieces.append(_Piece(file, start, offset - start))
            start = offset
    if file.suffix == ".txt" and offset > start:
        pieces.append(_Piece(file, start, offset - start))
    if not pieces:
        raise UserError(f"--data {file} is empty; give a file with text.")
    return pieces


def _lines(file: Path, limit: int) -> Iterator[bytes]:
    """The lines of a file; one longer than `limit` (-1 for none) is cut at a blank, or else between characters."""
    with file.open("rb") as stream:
        while line := stream.readline(limit):
            if len(line) == limit and not line.endswith(b"\n"):
                here = stream.tell()
                line += _to_a_cut(stream.read(_LOOK_AHEAD_BYTES))
                stream.seek(here + len(line) - limit)
            yield line


def _to_a_cut(ahead: bytes) -> bytes:
    """What to add to a line that was cut anywhere: up to the next blank, or the rest of a UTF-8 character."""
    blanks = [place for place in (ahead.find(b" "), ahead.find(b"\n")) if place >= 0]
    if blanks:
        return ahead[: min(blanks) + 1]
    rest = next((place for place, byte in enumerate(ahead) if byte & 0xC0 != 0x80), len(ahead))
    return ahead[:rest]


def _read(piece: _Piece, field: str | None) -> str:
    """The text of one document. Errors: UserError."""
    with piece.file.open("rb") as stream:
        stream.seek(piece.offset)
        raw = stream.read(piece.length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data {piece.file} is not UTF-8 at byte {piece.offset + error.start}; convert it to UTF-8."
        ) from error
    text = text.removeprefix("\ufeff")
    return text if piece.file.suffix == ".txt" else _parse(text, piece, field)


def _parse(line: str, piece: _Piece, field: str | None) -> str:
    where = f"--data {piece.file}, the line at byte {piece.offset},"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); give one JSON object per line.") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object; give one object with a text field per line.")
    return _text_of(row, field, where)


def _text_of(row: dict[str, Any], field: str | None, where: str) -> str:
    """The text of a row: the named field, else the first usual one; null is no text. Errors: UserError."""
    names = (field,) if field else TEXT_FIELDS
    if any(name in row and row[name] is None for name in names):
        return ""
    for name in names:
        if isinstance(row.get(name), str):
            return row[name]
    raise UserError(
        f"{where} has no text in {' or '.join(map(repr, names))}; its fields are {', '.join(sorted(row)) or 'none'}: "
        "name the right one with --field."
    )


def _stream(name: str, field: str | None, seed: int) -> Iterator[str]:
    """Documents of a Hub data set (or a local folder of one), streamed. Errors: UserError."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"--data {HUB}{name} needs the datasets library; install 'llm-streamline[hub]'.") from error
    repository, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, split=split or "train", streaming=True)
        for row in rows.shuffle(seed=seed, buffer_size=_HUB_BUFFER):
            yield _text_of(row, field, f"--data {HUB}{name}")
    except UserError:
        raise
    except Exception as error:  # the library raises its own, the Hub's and the file system's
        raise UserError(
            f"--data {HUB}{name} cannot be read ({reason(error)}); check the name, the split and the network."
        ) from error
