"""A model larger than memory: every command inside a control group, its peaks beside what `estimate` foretold.

As root: `python -m bench.large FOLDER`, then `python -m bench.contained FOLDER --data TEXT.jsonl --limit 3e9`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GROUPS = Path("/sys/fs/cgroup")
TOKENS = {"calibration": 4096, "validation": 512, "tokens": 4096}
DONE = {"similarity.json": "training", "replacement": "assembly", "model": "scores"}  # what is there says what goes on
EVERY, LINGERS = 0.02, 1.0  # seconds; what a stage held may be let go a moment after its file is there
TOLERANCE = 0.2


@dataclass
class Reading:
    """What a command took: anonymous bytes at each stage's peak, bytes read from the disk by its first process."""

    code: int = -1
    seconds: float = 0
    read: int = 0
    refusals: int = 0  # times that the group's limit was reached; the cache of files alone reaches it too
    peaks: dict[str, int] = field(default_factory=dict)
    out: str = ""

    def note(self, stage: str, anonymous: int) -> None:
        self.peaks[stage] = max(self.peaks.get(stage, 0), anonymous)


class Group:
    """A control group of either version with a limit of memory and no swap to fall back on."""

    def __init__(self, limit: int) -> None:
        old = GROUPS / "memory"
        self.path = (old if old.is_dir() else GROUPS) / f"llm-streamline-bench-{os.getpid()}"
        self._old = old.is_dir()
        self.path.mkdir()
        (self.path / ("memory.limit_in_bytes" if self._old else "memory.max")).write_text(str(limit))

    def enter(self) -> None:
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def anonymous(self) -> int:
        fields = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        return int(fields["total_rss" if self._old else "anon"])

    def processes(self) -> int:
        return len((self.path / "cgroup.procs").read_text().split())

    def refusals(self) -> int:
        if self._old:
            return int((self.path / "memory.failcnt").read_text())
        return int(dict(line.split() for line in (self.path / "memory.events").read_text().splitlines())["max"])


@contextmanager
def group(limit: int) -> Iterator[Group]:
    """Errors: OSError where this user may make none."""
    made = Group(limit)
    try:
        yield made
    finally:
        made.path.rmdir()


def run(arguments: list[str], limit: int, out: Path | None = None) -> Reading:
    """A command of ours under the limit, with nothing of the model in the cache of files at its start."""
    forget(Path(arguments[1]))
    reading, started = Reading(), time.perf_counter()
    recent: deque[str] = deque(maxlen=int(LINGERS / EVERY))
    with group(limit) as inside, tempfile.TemporaryFile("w+") as stdout:
        command = [sys.executable, "-m", "llm_streamline", *arguments, *(("-o", str(out)) if out else ())]
        process = subprocess.Popen(command, stdout=stdout, preexec_fn=inside.enter)
        while process.poll() is None:
            recent.append(stage_of(out, inside))
            reading.note(recent[0], inside.anonymous())
            reading.read = bytes_read(process.pid) or reading.read
            time.sleep(EVERY)
        stdout.seek(0)
        reading.out, reading.code = stdout.read(), process.returncode
        reading.seconds, reading.refusals = time.perf_counter() - started, inside.refusals()
    return reading


def stage_of(out: Path | None, inside: Group) -> str:
    """By what the run folder holds; a second process is the one that checks the saved folder."""
    there = [stage for name, stage in DONE.items() if out and (out / name).exists()]
    stage = there[-1] if there else "analysis"
    if stage == "training" and out and not (out / "plan.json").exists():
        return "analysis"
    if stage == "training" and "replace: none" in (out / "recipe.yaml").read_text():  # type: ignore[operator]
        stage = "assembly"
    return "verification" if stage == "assembly" and inside.processes() > 1 else stage


def bytes_read(pid: int) -> int:
    """From the disk, so far; 0 once the process has ended."""
    try:
        fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return int(fields["read_bytes"])
    except (OSError, KeyError):
        return 0


def forget(model: Path) -> None:
    """Drop a model's files from the cache, so that what is read is read from the disk."""
    for file in model.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def foretold(arguments: list[str], limit: int) -> dict[str, int]:
    """Bytes by stage, as `estimate` has them under the same limit."""
    estimate: dict[str, Any] = json.loads(run(["estimate", *arguments[1:], "--json"], limit).out)
    return {stage["name"]: stage["memory"] for stage in estimate["stages"]}


def report(name: str, reading: Reading, wanted: dict[str, int], size: int) -> bool:
    print(
        f"{name}: exit {reading.code}, {reading.seconds:.0f} s, read {reading.read / 1e9:.2f} GB = "
        f"{reading.read / size:.2f} of the model, limit reached {reading.refusals} times",
        flush=True,
    )
    holds = reading.code == 0
    for stage, peak in reading.peaks.items():
        ratio = peak / wanted[stage] if stage in wanted else float("nan")
        holds = holds and not abs(ratio - 1) > TOLERANCE
        print(f"  {stage}: {peak / 1e6:.0f} MB, foretold {wanted.get(stage, 0) / 1e6:.0f} MB: {ratio:.2f}", flush=True)
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.contained", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=float, default=3e9, help="bytes of the control group")
    parser.add_argument("--only", nargs="*", default=["estimate", "analyze", "none", "layer"])
    options = parser.parse_args()
    limit = int(options.limit)
    size = sum(file.stat().st_size for file in options.model.glob("*.safetensors"))
    sizes = (f"--calibration-tokens {TOKENS['calibration']} --validation-tokens {TOKENS['validation']}").split()
    common = [str(options.model), "--data", options.data, *sizes]
    training = ["--tokens", str(TOKENS["tokens"]), "--batch", "2"]
    commands = {
        "estimate": ["estimate", *common, *training, "--json"],
        "analyze": ["analyze", *common],
        "none": ["compress", *common, "--replace", "none"],
        "layer": ["compress", *common, *training],
    }
    holds = True
    for name in options.only:
        folder = Path(tempfile.mkdtemp(dir=options.model.parent))
        out = folder / "out" if name != "estimate" else None
        reading = run(commands[name], limit, out)
        wanted = foretold(commands[name], limit) if name != "estimate" else {}
        holds &= report(name, reading, wanted, size)
        shutil.rmtree(folder)
    sys.exit(not holds)


if __name__ == "__main__":
    main()
