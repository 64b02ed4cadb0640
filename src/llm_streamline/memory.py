"""How much memory there is to work with, containers' limits included."""

from __future__ import annotations

from pathlib import Path

import psutil

# of a container, as control groups of version 2 and 1 tell it from inside
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_limit() -> int:
    """Bytes that this process may use: the machine's memory, or what its control group allows of it."""
    return min([psutil.virtual_memory().total, *(limit for path in _limit_files() if (limit := _read(path)))])


def _limit_files() -> list[Path]:
    """Also of the groups below the root, where no namespace hides where this process is."""
    found = [Path(path) for path in _LIMITS]
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, group = line.split(":", 2)
        if not controllers:
            found.append(Path(f"/sys/fs/cgroup{group}/memory.max"))
        elif "memory" in controllers.split(","):
            found.append(Path(f"/sys/fs/cgroup/memory{group}/memory.limit_in_bytes"))
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:  # no such thing on other systems
        return []


def _read(path: Path) -> int | None:
    words = _lines(path)
    return int(words[0]) if words and words[0].isdigit() else None  # 'max' is no limit
