"""One measured row in one small file, so that rows can lie in the repository and be added to on another day."""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from typing import Any

from llm_streamline.files import atomic, sha256

SUFFIX = ".json.xz"
DIGITS = 7


def read_row(file: Path) -> dict[str, Any]:
    with lzma.open(file, "rt", encoding="utf-8") as opened:
        return dict(json.load(opened))


def write_row(file: Path, row: dict[str, Any]) -> None:
    """Numbers are kept to seven digits."""
    with atomic(file) as temporary:
        temporary.write_bytes(lzma.compress(json.dumps(_rounded(row)).encode()))


def judged_by(**files: Path | None) -> dict[str, str]:
    """Of each file its name and the beginning of its digest, as others have the same names; empty for none."""
    return {key: f"{file.name} {sha256(file.read_bytes())[:12]}" if file else "" for key, file in files.items()}


def check_row(file: Path, **wanted: dict[str, str]) -> None:
    """Stop where the row that is there says something else. The first rows say by what they were judged in `dense`."""
    row = read_row(file)
    for part, values in wanted.items():
        there = row.get(part, values)
        if differs := sorted(key for key in values.keys() | there.keys() if there.get(key) != values.get(key)):
            sys.exit(f"{file} was measured with another {', '.join(differs)}; give another folder for the rows.")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
