"""Numbers as people write them: counts (250k), sizes (3GB) and times (5m), and how many there are of a thing."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smh]?)", re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt])?(i)?b?", re.IGNORECASE)
_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def counted(number: int, thing: str) -> str:
    """'1 layer', '4 layers', '1,000 layers'."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def parse_count(value: Any) -> Any:
    """'250k' -> 250000, '1.5M' -> 1500000; whole numbers pass through. Errors: ValueError for anything else, as 1.5."""
    if value is None or isinstance(value, int):
        return value
    match = _COUNT.fullmatch(str(value).strip())
    if not match:
        raise ValueError(f"{value!r} is no count; write a whole number, or one with k, M or B, such as 250k")
    count = Decimal(match[1]) * _SCALE[match[2].lower()]
    if count != int(count):
        raise ValueError(f"{value!r} is no whole number")
    return int(count)


def parse_duration(value: Any) -> Any:
    """'5m' -> 300.0 seconds; numbers are seconds. Errors: ValueError for anything else."""
    match = _DURATION.fullmatch(str(value).strip())
    if not match:
        raise ValueError(f"{value!r} is no time; write a number with s, m or h, such as 5m")
    return float(match[1]) * _SECONDS[match[2].lower()]


def parse_size(value: Any) -> Any:
    """'3GB' -> 3000000000 bytes, '2GiB' -> 2147483648; numbers are bytes. Errors: ValueError for anything else."""
    match = _SIZE.fullmatch(str(value).strip())
    if not match:
        raise ValueError(f"{value!r} is no size; write a number with MB, GB or GiB, such as 16GB")
    scale = 1024 if match[3] else 1000
    return round(float(match[1]) * scale ** " kmgt".index((match[2] or " ").lower()))


Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
Duration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
