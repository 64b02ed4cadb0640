"""Files and data sets -> rows in a seeded random order, and rows -> documents.

A .txt or .jsonl file is indexed by byte offset and read by seeking, so that its order is a true shuffle at any size.
Parquet is read by row groups in shuffled order, with rows shuffled among the groups that are in memory together.
"""

from __future__ import annotations

import json
import random
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llm_streamline.errors import UserError, reason

HUB = "hub:"
TEXT_FIELDS = ("text", "content", "document", "story")
CHAT_FIELDS = ("messages", "conversations")
# a .txt is one long text; it is dealt out in about 256 pieces of whole lines, of 4 to 64 KB
_PIECES, _SMALLEST_PIECE, _LARGEST_PIECE = 256, 4096, 65_536
_LOOK_AHEAD_BYTES = 256
_HUB_BUFFER = 10_000
_HALVES = re.compile("[\ud800-\udfff]")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "developer": "system",
    **{name: name for name in ("user", "assistant", "system", "tool")},
}
Row = tuple[str | dict[str, Any], Callable[[], str]]  # what was read, and in words where


class Reader(Protocol):
    """A source's rows; `count` is how many there are, None for a stream of unknown length."""

    @property
    def count(self) -> int | None: ...

    def rows(self, seed: int) -> Iterator[Row]: ...


@dataclass(frozen=True)
class Document:
    """A text and the domain it belongs to. `chat` is one that a chat template has made, special tokens and all."""

    text: str
    domain: str
    chat: bool = False


@dataclass(frozen=True)
class Schema:
    """How a row becomes a document: the named text field, the path of the domain's, the tokenizer's chat template."""

    field: str | None = None
    domain: str | None = None
    render: Callable[[list[dict[str, str]]], str] | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,) if self.field else (*TEXT_FIELDS, *CHAT_FIELDS)

    def document(self, row: str | dict[str, Any], where: Callable[[], str], pool: str) -> Document:
        """A row's document, without text where it is null. Errors: UserError."""
        if isinstance(row, str):
            return Document(row, pool)
        domain = domain_of(row, self.domain, where) if self.domain else pool
        value = next((row[name] for name in self.fields if isinstance(row.get(name), str)), None)
        if value is None:
            value = next((row[name] for name in self.fields if row.get(name) is not None), None)
        if isinstance(value, str):
            return Document(_encodable(value), domain)
        if isinstance(value, list):
            return Document(self._rendered(value, where), domain, chat=True)
        if value is None and any(name in row for name in self.fields):
            return Document("", domain)
        raise UserError(f"{where()} {no_text(self.fields, row)}")

    def _rendered(self, chat: list[Any], where: Callable[[], str]) -> str:
        turns = messages(chat, where)
        if not turns:
            return ""
        if self.render is None:
            raise UserError(
                f"{where()} is a chat and the tokenizer has no chat template; "
                "give a model that has one, or name a field of plain text with --field."
            )
        try:
            return self.render(turns)
        except Exception as error:  # templates raise their own
            raise UserError(
                f"{where()} holds a chat that the tokenizer's chat template refuses ({reason(error)}); "
                "correct it or leave it out."
            ) from error


def _encodable(text: str) -> str:
    """The text with halves of characters, which JSON can hold and UTF-8 cannot, as question marks."""
    return text.encode("utf-8", "replace").decode() if _HALVES.search(text) else text


def no_text(fields: tuple[str, ...], names: Any) -> str:
    if present := next((name for name in fields if name in names), None):
        return f"holds no text in {present!r}, but something else; give a field of text, or name another with --field."
    return (
        f"has no text in {' or '.join(map(repr, fields))}; its fields are {', '.join(sorted(names)) or 'none'}: "
        "name the right one with --field."
    )


def no_domain(path: str, names: Any) -> str:
    return (
        f"has no domain in {path!r}, which --mixture needs; its fields are {', '.join(sorted(names)) or 'none'}: "
        "name the right one with --domain, such as meta.source."
    )


def domain_of(row: dict[str, Any], path: str, where: Callable[[], str]) -> str:
    """What lies at a dotted path of a row. Errors: UserError."""
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, (str, int)) and value != "":
        return str(value)
    raise UserError(f"{where()} {no_domain(path, row)}")


def messages(chat: list[Any], where: Callable[[], str]) -> list[dict[str, str]]:
    """The turns of a chat, whichever way they were written. Errors: UserError for a turn without role or text."""
    turns = []
    for turn in chat:
        role, text = _turn(turn)
        if role in _ROLES and text is None:
            continue  # a call of a tool, or a picture: no text to learn from
        if role not in _ROLES or not isinstance(text, str):
            raise UserError(
                f"{where()} holds a chat with a malformed turn; every turn is an object with a role "
                "(user, assistant, system or tool) and content, or ShareGPT's from and value: correct it."
            )
        turns.append({"role": _ROLES[role], "content": _encodable(text)})
    return turns


def _turn(turn: Any) -> tuple[Any, Any]:
    """A turn's role and text; text in parts is joined, and None where there is none."""
    if not isinstance(turn, dict) or not {"content", "value"} & set(turn):
        return None, ""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "\n".join(part for part in parts if isinstance(part, str)) or None
    return turn.get("role") or turn.get("from"), content


def shuffled_numbers(count: int, seed: int) -> array[int]:
    """0 to count-1 in seeded order."""
    numbers = array("Q", range(count))
    random.Random(seed).shuffle(numbers)
    return numbers


class Lines:
    """A local .txt or .jsonl file: the byte offsets between which its documents lie."""

    def __init__(self, file: Path) -> None:
        """Index the file. Errors: UserError where it is binary or empty."""
        self.file, self.plain = file, file.suffix == ".txt"
        self._offsets, offset = array("Q", [0]), 0
        size = max(_SMALLEST_PIECE, min(_LARGEST_PIECE, file.stat().st_size // _PIECES))
        for line in _lines(file, size if self.plain else -1):
            if b"\0" in line:
                raise UserError(f"--data {file} is binary; give text in UTF-8.")
            offset += len(line)
            if offset - self._offsets[-1] >= size if self.plain else line.strip():
                self._offsets.append(offset)
        if self.plain and offset > self._offsets[-1]:
            self._offsets.append(offset)
        if not self.count:
            raise UserError(f"--data {file} is empty; give a file with text.")

    @property
    def count(self) -> int:
        return len(self._offsets) - 1

    def rows(self, seed: int) -> Iterator[Row]:
        for number in shuffled_numbers(self.count, seed):
            text = self.text(number)
            yield (text, self._where_of(number)) if self.plain else (self._parse(text, number), self._where_of(number))

    def text(self, number: int) -> str:
        """What lies between two offsets. Errors: UserError where it is not UTF-8."""
        start, stop = self._offsets[number : number + 2]
        with self.file.open("rb") as stream:
            stream.seek(start)
            raw = stream.read(stop - start)
        try:
            return raw.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise UserError(
                f"--data {self.file} is not UTF-8 at byte {start + error.start}; convert it to UTF-8."
            ) from error

    def _where_of(self, number: int) -> Callable[[], str]:
        return lambda: f"--data {self.file}, line {self._line(number)},"

    def _line(self, number: int) -> int:
        """The line in which a document ends, the first being 1; counted when it has to be named."""
        with self.file.open("rb") as stream:
            before = stream.read(self._offsets[number + 1]).rstrip()
        return before.count(b"\n") + 1

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            where = self._where_of(number)()
            raise UserError(
                f"{where} is not JSON ({getattr(error, 'msg', error)}); give one JSON object per line."
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{self._where_of(number)()} is no JSON object; give one object with a text field per line."
            )
        return row


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


@dataclass(frozen=True)
class HubStream:
    """A Hub data set (or a local folder of one), streamed; its name is NAME or NAME:SPLIT."""

    name: str
    count: None = None

    def rows(self, seed: int) -> Iterator[Row]:
        """Errors: UserError."""
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"--data {HUB}{self.name} needs datasets; install 'llm-streamline[hub]'.") from error
        repository, _, split = self.name.partition(":")
        try:
            rows = datasets.load_dataset(repository, split=split or "train", streaming=True)
            for row in rows.shuffle(seed=seed, buffer_size=_HUB_BUFFER):
                yield row, lambda: f"--data {HUB}{self.name}"
        except Exception as error:  # the library raises its own, the Hub's and the file system's
            raise UserError(
                f"--data {HUB}{self.name} cannot be read ({reason(error)}); check the name, the split and the network."
            ) from error
