"""How much memory there is to work with, containers' limits included, and the micro-batches that it holds."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import psutil

from llm_streamline.recipe import Recipe

FORWARD_TOKENS = 4096  # of a micro-batch where nothing is trained
FEWEST_STEPS = 1000
LARGEST_BATCH_TOKENS = 16_384
_ROOT = Path("/sys/fs/cgroup")
# of a container, as control groups of version 2 and 1 tell it from inside
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_limit() -> int:
    """Bytes that this process may use: the machine's memory, or what its control group allows of it."""
    return min([psutil.virtual_memory().total, *(limit for path in _limit_files() if (limit := _read(path)))])


def held() -> int:
    """Bytes that this process holds and cannot give back: its anonymous memory, where the system tells it."""
    words = _lines(Path("/proc/self/status"))
    if "RssAnon:" in words:
        return int(words[words.index("RssAnon:") + 1]) * 1024
    return psutil.Process().memory_info().rss


def release() -> None:
    """Let go of what is kept by cycles alone: an optimizer's moments, a model that was hooked to be written."""
    gc.collect()
    trim()


def trim() -> None:
    """Give back to the system what was freed: among what stays, the C library keeps holes as large as the weights."""
    with suppress(OSError, AttributeError):  # other C libraries have no such call, and no need of it
        ctypes.CDLL(None).malloc_trim(0)


def _limit_files() -> list[Path]:
    """Also of the groups below the root, where no namespace hides where this process is."""
    found = [Path(path) for path in _LIMITS]
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, group = line.split(":", 2)
        if not controllers:
            own = Path(f"/sys/fs/cgroup{group}")  # which a group around it may limit
            found += [one / "memory.max" for one in (own, *own.parents) if len(one.parts) > len(_ROOT.parts)]
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


def layers_above(recipe: Recipe, depth: int) -> int:
    """How many frozen layers gradients pass, at most: those that a loss looks through, and those between windows.

    Which windows it will be is not known where none is given.
    """
    if not recipe.occupied or not (recipe.objective.above or recipe.count > 1):
        return 0
    end = 0 if recipe.objective.above else recipe.protect_last
    if given := recipe.given:
        top = depth if recipe.objective.above else given[-1].stop
        return max(0, top - given[0].start - sum(map(len, given)))
    return max(0, depth - end - recipe.protect_first - recipe.occupied - recipe.count)


def alive_layers(recipe: Recipe, depth: int) -> int:
    """How many layers' inner states the gradients of a replacement need at once."""
    return recipe.occupied + 1 + layers_above(recipe, depth)


def default_batch(blocks: tuple[int, int], accumulate: int, alive: tuple[int, int], memory: int) -> int:
    """Sequences per micro-batch of training on (N, T) token ids through so many layers of such a width.

    At least 1000 steps, at most 16k tokens a step, and what a quarter of memory holds.
    """
    (count, block), (layers, width) = blocks, alive
    for_steps = count // (FEWEST_STEPS * accumulate)
    for_tokens = LARGEST_BATCH_TOKENS // block
    # about 64 float32 values of the model's width are alive per token and layer while it trains
    for_memory = memory // 4 // (block * width * 4 * 64 * layers)
    return max(1, min(for_steps, for_tokens, for_memory))
