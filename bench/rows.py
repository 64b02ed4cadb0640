"""One measured row in one small file, so that rows can lie in the repository and be added to on another day."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

from llm_streamline.files import atomic

SUFFIX = ".json.xz"
DIGITS = 7


def read_row(file: Path) -> dict[str, Any]:
    with lzma.open(file, "rt", encoding="utf-8") as opened:
        return dict(json.load(opened))


def write_row(file: Path, row: dict[str, Any]) -> None:
    """Numbers are kept to seven digits."""
    with atomic(file) as temporary:
        temporary.write_bytes(lzma.compress(json.dumps(_rounded(row)).encode()))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
