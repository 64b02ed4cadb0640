"""What tells one checkpoint from another, without reading all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from transformers import PretrainedConfig

from llm_streamline.checkpoint import Source, check_weights, files_of
from llm_streamline.files import sha256

_LOOK = 4096  # bytes in the middle of each tensor


def fingerprint(source: Source) -> str:
    """What tells one local checkpoint from another without reading all of it; the name for one on the Hub.

    Errors: as `check_weights`.
    """
    check_weights(source)
    folder = Path(source.path)
    if not folder.is_dir():
        return source.name
    parts = [(folder / "config.json").read_bytes()]
    for file in files_of(source):
        size = file.stat().st_size
        with file.open("rb") as stream:
            parts += [str(size).encode(), stream.read(2**20)]
            stream.seek(-min(2**20, size), 2)
            parts.append(stream.read())
    return sha256(*parts)


def whole_fingerprint(source: Source, config: PretrainedConfig) -> str:
    """As `fingerprint`, but for a look into every tensor, for end tokens, and for the commit of one on the Hub."""
    folder = Path(source.path)
    if not folder.is_dir():
        return sha256(fingerprint(source).encode(), str(getattr(config, "_commit_hash", None)).encode())
    generation = folder / "generation_config.json"
    parts = [fingerprint(source).encode(), generation.read_bytes() if generation.is_file() else b""]
    for file in files_of(source):
        with file.open("rb") as stream:
            for place, length in _looks(file):
                stream.seek(place)
                parts.append(stream.read(length))
    return sha256(*parts)


def _looks(file: Path) -> Iterator[tuple[int, int]]:
    """Where to look, and how many bytes: the middle of every tensor; of a pickle, a place in every megabyte."""
    if file.suffix == ".bin":
        yield from ((place, _LOOK) for place in range(0, file.stat().st_size, 2**20))
        return
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    for name in sorted(header.keys() - {"__metadata__"}):
        start, stop = header[name]["data_offsets"]
        yield 8 + size + start + (stop - start) // 2, min(_LOOK, (stop - start + 1) // 2)
