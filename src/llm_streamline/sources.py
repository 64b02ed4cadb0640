"""What `--data` names -> pools of documents: files, folders, globs and Hub data sets, with their weights.

Sources without weights are one pool, read in proportion to their documents; one with a weight is a pool of its own.
"""

from __future__ import annotations

import glob
import math
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from llm_streamline.checkpoint import BUNDLED
from llm_streamline.errors import UserError
from llm_streamline.parquet import ParquetFiles
from llm_streamline.readers import HUB, Document, HubStream, Lines, Reader, Row, Schema

SUFFIXES = (".txt", ".jsonl", ".parquet")
_BUNDLED_TEXT = Path(__file__).parent / "demo" / "stories.jsonl"
_KINDS = ".txt, .jsonl and .parquet files can be read"


@dataclass(frozen=True)
class Source:
    """One `--data`: its name and, where it was given as NAME@WEIGHT, its weight."""

    name: str
    weight: float | None = None

    @classmethod
    def parse(cls, given: str) -> Source:
        """Errors: UserError for a weight that is none. A file that is really named so wins over a weight."""
        name, at, weight = given.rpartition("@")
        if not at or "/" in weight or Path(given).exists():
            return cls(given)
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0 and name):
            raise UserError(
                f"--data {given} gives the weight {weight!r}; write a number above 0 after @, such as NAME@0.7."
            )
        return cls(name, number)

    @property
    def hub(self) -> str | None:
        """The data set's name and split, where it is one."""
        name = self.name.removeprefix(HUB)
        return None if name == self.name else name if ":" in name else f"{name}:train"

    def files(self) -> list[Path]:
        """The files that a local name stands for, sorted. Errors: UserError where there are none."""
        path = Path(self.name)
        if self.name == BUNDLED:
            return [_BUNDLED_TEXT]
        if path.is_dir():
            return self._some(file for file in path.rglob("*") if not _hidden(file.relative_to(path)))
        if not path.exists() and glob.has_magic(self.name):
            found = glob.iglob(self.name, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
            return self._some(Path(file) for file in found)
        if not path.is_file():
            raise UserError(
                f"--data {self.name} is no file here; give a file, a folder, a 'glob', hub:NAME, or bundled."
            )
        if path.suffix not in SUFFIXES:
            raise UserError(f"--data {self.name} ends in {path.suffix!r}; {_KINDS}.")
        return [path]

    def _some(self, found: Iterator[Path]) -> list[Path]:
        files = sorted(file for file in found if file.suffix in SUFFIXES and file.is_file())
        if not files:
            what = "is a folder without text" if Path(self.name).is_dir() else "matches no file with text"
            raise UserError(f"--data {self.name} {what}; {_KINDS}: give a path that has some.")
        return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


@dataclass(frozen=True)
class Pool:
    """Documents that are read together, in seeded order; `weight` is its share of the tokens, against other pools."""

    name: str
    weight: float
    readers: tuple[Reader, ...]
    schema: Schema
    seed: int

    @property
    def count(self) -> int | None:
        """How many documents there are, None for a stream of unknown length."""
        counts = [reader.count for reader in self.readers]
        return None if None in counts else sum(count or 0 for count in counts)

    def __iter__(self) -> Iterator[Document]:
        """Every document that has text. Errors: UserError for the first row that cannot be used."""
        for row, where in self._rows():
            document = self.schema.document(row, where, self.name)
            if document.text.strip():
                yield document

    def _rows(self) -> Iterator[Row]:
        """The files' rows, interleaved in proportion to how many each has."""
        streams = [reader.rows(self.seed + (number << 32)) for number, reader in enumerate(self.readers)]
        if len(streams) == 1:
            yield from streams[0]
            return
        turns = array("I", (number for number, reader in enumerate(self.readers) for _ in range(reader.count or 0)))
        random.Random(self.seed + (len(streams) << 32)).shuffle(turns)
        for number in turns:
            yield next(streams[number])


def open_pools(data: tuple[str, ...], schema: Schema, seed: int) -> list[Pool]:
    """The pools that `data` names, their files indexed. Errors: UserError for what cannot be read as text."""
    sources = [Source.parse(given) for given in data]
    _check(data, sources, schema)
    found: list[list[Path | str]] = [[source.hub] if source.hub else [*source.files()] for source in sources]
    _check_once([place for places in found for place in places])
    if sources[0].weight is not None:
        return [
            Pool(source.name, source.weight or 0.0, _readers(places, schema), schema, seed)
            for source, places in zip(sources, found, strict=True)
        ]
    places = [place for several in found for place in several]
    return [Pool(sources[0].name if len(sources) == 1 else "text", 1.0, _readers(places, schema), schema, seed)]


def _check(data: tuple[str, ...], sources: list[Source], schema: Schema) -> None:
    """Errors: UserError where sources do not go together."""
    if not sources:
        raise UserError(
            "no --data was given; give a .txt, .jsonl or .parquet file, a folder of them or hub:NAME, or "
            "--data bundled for the small text that ships with this package."
        )
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        bare = sources[weighted.index(False)].name
        raise UserError(f"--data {bare} has no weight and {data[weighted.index(True)]} has; weigh all sources or none.")
    if any(weighted) and schema.domain:
        raise UserError(
            f"--mixture and the weight in --data {data[0]} both set shares; give shares of domains with --mixture, "
            "or of sources with weights."
        )
    hub = next((source.name for source in sources if source.hub), None)
    if hub and len(sources) > 1 and not any(weighted):
        raise UserError(
            f"--data {hub} is a stream of unknown size beside another source; give all sources a weight, "
            f"such as {hub}@0.5."
        )


def _check_once(places: list[Path | str]) -> None:
    """Errors: UserError where one file or data set is given twice."""
    seen: set[Path | str] = set()
    for place in places:
        same = place.resolve() if isinstance(place, Path) else place
        if same in seen:
            raise UserError(f"--data names {place} twice; give every source once.")
        seen.add(same)


def _readers(places: list[Path | str], schema: Schema) -> tuple[Reader, ...]:
    """One reader per .txt or .jsonl file and data set, one for all Parquet files. Errors: UserError."""
    files = [place for place in places if isinstance(place, Path)]
    plain = next((file for file in files if file.suffix == ".txt"), None)
    if plain and schema.domain:
        raise UserError(f"--data {plain} has no domains, which --mixture needs; give .jsonl or .parquet files.")
    parquet = [file for file in files if file.suffix == ".parquet"]
    readers: list[Reader] = [Lines(file) for file in files if file.suffix != ".parquet"]
    readers += [ParquetFiles(parquet, schema)] if parquet else []
    return (*readers, *(HubStream(place) for place in places if isinstance(place, str)))


def is_new(document: Document, seen: set[bytes]) -> bool:
    """Whether no copy of a document was seen before, so that no part holds another's."""
    digest = blake2b(document.text.encode(), digest_size=12).digest()
    new = digest not in seen
    seen.add(digest)
    return new
