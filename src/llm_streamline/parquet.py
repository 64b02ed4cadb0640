"""Parquet files -> rows: row groups in shuffled order, as many in memory at once as a fixed number of bytes allows."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_streamline.errors import UserError, reason
from llm_streamline.readers import CHAT_FIELDS, Row, Schema, no_domain, no_text

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

MEMORY = 2**28  # bytes of decoded columns in memory at once, or one row group where that is larger


@dataclass(frozen=True)
class _Group:
    """A row group of a file: its number, the number of its first row, its rows, and its bytes in the columns read."""

    file: Path
    number: int
    first: int
    rows: int
    size: int
    columns: tuple[str, ...]


class ParquetFiles:
    """All Parquet files of a pool as one shuffled source, so that memory does not grow with their number."""

    def __init__(self, files: list[Path], schema: Schema) -> None:
        """Read what the files say of themselves. Errors: UserError where a file cannot be used."""
        self._groups = [group for file in files for group in _groups(file, schema)]

    @property
    def count(self) -> int:
        return sum(group.rows for group in self._groups)

    def rows(self, seed: int) -> Iterator[Row]:
        draw = random.Random(seed)
        groups = self._groups.copy()
        draw.shuffle(groups)
        for window in _windows(groups):
            yield from _mixed(window, draw)


def _windows(groups: list[_Group]) -> Iterator[list[_Group]]:
    """Runs of groups that fit in memory together."""
    window: list[_Group] = []
    for group in groups:
        if window and sum(other.size for other in window) + group.size > MEMORY:
            yield window
            window = []
        window.append(group)
    yield window


def _mixed(window: list[_Group], draw: random.Random) -> Iterator[Row]:
    """The rows of several groups, in the order of one shuffle."""
    tables = [_table(group) for group in window]
    numbers = array("I", (number for number, table in enumerate(tables) for _ in range(table.num_rows)))
    draw.shuffle(numbers)
    orders = []
    for table in tables:
        orders.append(array("Q", range(table.num_rows)))
        draw.shuffle(orders[-1])
    for number in numbers:
        row = orders[number].pop()
        yield _row(window[number], tables[number], row), _where(window[number], row)


def _row(group: _Group, table: pyarrow.Table, row: int) -> dict[str, Any]:
    with _whole(group.file):
        return {name: table.column(name)[row].as_py() for name in group.columns}


def _where(group: _Group, row: int) -> Callable[[], str]:
    return lambda: f"--data {group.file}, row {group.first + row + 1},"


def _table(group: _Group) -> pyarrow.Table:
    with _opened(group.file) as file:
        return file.read_row_group(group.number, columns=list(group.columns), use_threads=False)


def _groups(file: Path, schema: Schema) -> list[_Group]:
    with _opened(file) as parquet:
        columns = _columns(file, parquet.schema_arrow, schema)
        groups, first = [], 0
        for number in range(parquet.metadata.num_row_groups):
            group = parquet.metadata.row_group(number)
            groups.append(_Group(file, number, first, group.num_rows, _size(group, columns), columns))
            first += group.num_rows
    if not first:
        raise UserError(f"--data {file} is empty; give a file with text.")
    return groups


def _size(group: Any, columns: tuple[str, ...]) -> int:
    parts = (group.column(number) for number in range(group.num_columns))
    return sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in columns)


def _columns(file: Path, schema: pyarrow.Schema, wanted: Schema) -> tuple[str, ...]:
    """The column with text, or else with chats, and the domain's. Errors: UserError where one is missing."""
    text = [name for name in wanted.fields if name in schema.names and _fits(schema.field(name).type, name, wanted)]
    if not text:
        raise UserError(f"--data {file} {no_text(wanted.fields, schema.names).replace('fields are', 'columns are')}")
    if wanted.domain is None:
        return (text[0],)
    top = wanted.domain.split(".")[0]
    if top not in schema.names:
        raise UserError(f"--data {file} {no_domain(wanted.domain, schema.names).replace('fields are', 'columns are')}")
    return tuple(dict.fromkeys((text[0], top)))


def _fits(kind: pyarrow.DataType, name: str, wanted: Schema) -> bool:
    """Whether a column's type can be text, or a chat where a chat is looked for."""
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    chat = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    string = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
    return string or (chat and (bool(wanted.field) or name in CHAT_FIELDS))


@contextmanager
def _opened(file: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"--data {file} needs pyarrow; install 'llm-streamline[hub]'.") from error
    with _whole(file), pyarrow.parquet.ParquetFile(file) as opened:
        yield opened


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """Errors: UserError where pyarrow finds damage."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"--data {file} holds text that is not UTF-8; write it again as UTF-8.") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"--data {file} is damaged or no Parquet file ({reason(error)}); fetch or write it again."
        ) from error
