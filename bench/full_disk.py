"""A compress run on a disk that is full at every stage, and the same command again once there is room.

Needs the right to mount a tmpfs. Run `python -m bench.full_disk`, or `python -m bench full_disk`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.common import Finding
from bench.runs import CHECKPOINT, broken, leftovers, start
from llm_streamline.files import TEMPORARY
from llm_streamline.oracle import weight_hashes

PAGE, ROOM = 4096, 2**26
NO_TASKS = ("--tasks", "none")
RARELY, OFTEN = ("--checkpoint-every", "1h"), ("--checkpoint-every", "0.05s")
COPIES = 4  # of the replacement in a checkpoint: its weights, the best ones and two moments
STAGES = (  # in the order in which a run writes them
    "recipe.yaml",
    "similarity.json",
    "inputs.json",
    "plan.json",
    "similarity.png",
    "heat-map.png",
    "replacement/replacement.safetensors",
    "replacement/training.png",
    "replacement/fit.json",
    "model/verification/oracle.safetensors",
    "model/model.safetensors",
    "model",
    "scores.json",
    "report.html",
)


def pages(path: Path) -> int:
    """Bytes that a file, or what lies in a folder, takes on the disk."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(-(-file.stat().st_size // PAGE) * PAGE for file in files)


def sizes(out: Path) -> dict[str, int]:
    """Half of every stage's bytes past all that lies there before it, as an undisturbed run has left them."""
    found, before, seen = {}, 0, 0
    for stage in STAGES:
        own = pages(out / stage) - (seen if stage == "model" else 0)
        seen += own if stage.startswith("model/") else 0
        found[stage] = before + own // 2 // PAGE * PAGE
        before += own
    return found


@contextmanager
def small_disk() -> Iterator[Path]:
    """A tmpfs to be resized. Errors: CalledProcessError or OSError where that is not allowed."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder], check=True, capture_output=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def questions(folder: Path) -> Path:
    words = enumerate((" two", " of", " day", " man"))
    rows = ({"id": i, "query": "Once upon a", "choices": [" time", word], "gold": 0} for i, word in words)
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ended(out: Path, compute: str, *options: str) -> tuple[int, list[str]]:
    """The exit code and the lines on stderr."""
    process = start(out, compute, "--tokens", "8k", *options, module="bench.filled")
    err = process.communicate()[1]
    return process.returncode, err.splitlines()


def problems_when_full(code: int, err: list[str], out: Path, hashes: dict[str, str]) -> list[str]:
    errors = [line for line in err if line.startswith("error:")]
    found = [] if code == 2 else [f"exit {code}: {err[-3:]}"]
    if len(errors) != 1 or f"the disk is full: {out}" not in errors[0] or TEMPORARY in errors[0]:
        found.append(f"errors: {errors}")
    found += ["a traceback"] if any("Traceback" in line for line in err) else []
    return [*found, *(f"broken: {name}" for name in broken(out, hashes)), *(f"left: {name}" for name in leftovers(out))]


@dataclass
class Series:
    """One run folder on a disk that grows from one full place to the next, and in the end has room."""

    disk: Path
    compute: str
    hashes: dict[str, str]
    places: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.disk / "out"

    def full(self, what: str, size: int, *options: str) -> None:
        """The command with so many bytes for the run folder."""
        resize(self.disk, size + PAGE)  # the page is the filler's
        code, err = ended(self.out, self.compute, *options)
        found = problems_when_full(code, err, self.out, self.hashes)
        said = next((line for line in err if line.startswith("error:")), "no error").replace(str(self.out), "OUT")
        print(f"{what}, {size:,} bytes: {said[:70]}", flush=True)
        self.places += 1
        self.problems += [f"{what}: {problem}" for problem in found]

    def with_room(self, *options: str) -> None:
        resize(self.disk, ROOM)
        code, err = ended(self.out, self.compute, *options)
        found = [*broken(self.out, self.hashes), *leftovers(self.out)]
        if code or weight_hashes(self.out / "model") != self.hashes or (self.out / CHECKPOINT).exists():
            found.append(f"exit {code}, {err[-3:]}")
        print(f"with room: exit {code}, {len(found)} problems", flush=True)
        self.problems += [f"with room: {problem}" for problem in found]

    def clear(self) -> None:
        shutil.rmtree(self.out)


def every_stage(series: Series, wanted: dict[str, int]) -> None:
    """Without checkpoints, which while training take more than all that comes after; then the evaluation."""
    for stage, size in wanted.items():
        series.full(stage, size, *NO_TASKS, *RARELY)
    series.with_room(*NO_TASKS, *RARELY)
    with tempfile.TemporaryDirectory() as folder:
        asked = ("--tasks", str(questions(Path(folder))))
        series.full("own-text.jsonl", pages(series.out), *asked)
        series.full("items", pages(series.out) + 4 * PAGE, *asked)
        series.with_room(*asked)
    series.clear()


def checkpoints(series: Series, before: int, replacement: int) -> None:
    """The first one, and one that is to replace another; each from the beginning."""
    for what, share in (("the first checkpoint", 0.5), ("the second checkpoint", 1.5)):
        size = before + int(share * COPIES * replacement) // PAGE * PAGE
        series.full(what, size, *NO_TASKS, *OFTEN)
        if share > 1 and not (series.out / CHECKPOINT).exists():
            series.problems.append(f"{what}: the one before is gone")
        series.with_room(*NO_TASKS, *OFTEN)
        series.clear()


def run(compute: str) -> list[Finding]:
    try:
        with small_disk() as disk:
            code, err = ended(disk / "out", compute, *NO_TASKS, *RARELY)
            assert code == 0, err
            series = Series(disk, compute, weight_hashes(disk / "out/model"))
            wanted, replacement = sizes(series.out), pages(series.out / "replacement/replacement.safetensors")
            before = sum(
                pages(series.out / stage) for stage in STAGES[: STAGES.index("replacement/replacement.safetensors")]
            )
            series.clear()
            (disk / "filler").write_bytes(bytes(PAGE))  # a tmpfs of no bytes would be one without a limit
            checkpoints(series, before, replacement)
            every_stage(series, wanted)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        print(f"not measured: a tmpfs cannot be mounted here ({error})")
        return []
    print(*series.problems, sep="\n")
    count = len(series.problems)
    return [Finding(f"what does not hold at {series.places} places of a full disk", count, "0", not count)]


if __name__ == "__main__":
    results = run("float32")
    print(*results, sep="\n")
    sys.exit(not all(finding.holds for finding in results))
