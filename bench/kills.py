"""A compress run that is killed again and again: what lies on the disk, where it goes on, and what comes out.

Run `python -m bench.kills [--kills N] [--seed N]`, or `python -m bench kills`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from bench.common import Finding
from bench.runs import CHECKPOINT, broken, leftovers, lines_of, start
from llm_streamline.oracle import weight_hashes

KILLS, EVERY = 50, 2.0
SLACK = 1.0  # seconds for a step, a validation and a write on a busy machine
OPTIONS = ("--tokens", "75k", "--tasks", "none", "--checkpoint-every", f"{EVERY:g}s")
TRAINING, TRAINED, RESUMED = "training on ", "assembling ", "resumed at step "


@dataclass
class Attempt:
    """One process of a run, and when it said what."""

    process: subprocess.Popen[str]
    started: float = field(default_factory=time.time)
    said: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in lines_of(self.process.stderr):
            self.said.append((time.time(), line))

    def ended(self, seconds: float | None) -> bool:
        """Wait for its end, at most so long; whether it has ended by itself."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._reader.join()
        return True

    def kill(self) -> float:
        """SIGKILL for the whole process group; returns the moment before."""
        moment = time.time()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        return moment

    def at(self, beginning: str) -> float | None:
        return next((moment for moment, line in self.said if line.startswith(beginning)), None)

    @property
    def resumed(self) -> int | None:
        lines = (line for _, line in self.said if line.startswith(RESUMED))
        return next((int(line.split()[3]) for line in lines), None)


@dataclass
class Tally:
    kills: int = 0
    in_training: int = 0  # with a step done
    resumed: int = 0
    completions: int = 0
    oldest: float = 0.0
    wrong_steps: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)


def kept_step(out: Path) -> int | None:
    """The step that the checkpoint on the disk was written after."""
    if not (out / CHECKPOINT).exists():
        return None
    with safe_open(out / CHECKPOINT, framework="pt") as file:
        return int(json.loads(file.metadata()["state"])["step"])


def note_resumption(attempt: Attempt, kept: int | None, tally: Tally) -> None:
    """Hold the step a process went on from against the one that lay on the disk when it started."""
    tally.resumed += bool(attempt.resumed)
    past = attempt.at(TRAINED) is not None and attempt.at(TRAINING) is not None
    if attempt.resumed != kept and (attempt.resumed is not None or past):
        tally.wrong_steps.append(f"resumed at {attempt.resumed} with {kept} on the disk")


def note_kill(attempt: Attempt, moment: float, out: Path, tally: Tally) -> None:
    tally.kills += 1
    begun = attempt.at(TRAINING)
    if begun is None or attempt.at(TRAINED) is not None or (out / "replacement").exists():
        return
    tally.in_training += bool(kept_step(out))
    written = (out / CHECKPOINT).stat().st_mtime if (out / CHECKPOINT).exists() else 0.0
    tally.oldest = max(tally.oldest, moment - max(begun, written))


@dataclass
class Undisturbed:
    """How long a run takes until it trains, until it is trained and until its end, and the SHA-256 of its weights."""

    training: float
    trained: float
    end: float
    weights: dict[str, str]


def lets_end(attempt: Attempt, out: Path, chance: random.Random, expected: Undisturbed) -> bool:
    """Wait until the moment to kill, or for the end of a process that is to live.

    One in eight is killed before training and one in three of the trained; the others evenly over the time that the
    whole training takes, so that those with little of it left mostly come to their end.
    """
    if chance.random() < 1 / 8:
        return attempt.ended(chance.uniform(0, expected.training))
    if (out / "replacement").exists():
        rest = expected.end - expected.trained + expected.training
        return attempt.ended(chance.uniform(0, rest) if chance.random() < 1 / 3 else None)
    while attempt.at(TRAINING) is None:
        if attempt.ended(0.01):
            return True
    return attempt.ended(chance.uniform(0, expected.trained - expected.training))


def undisturbed(out: Path, compute: str) -> Undisturbed:
    attempt = Attempt(start(out, compute, *OPTIONS))
    attempt.ended(None)
    assert attempt.process.returncode == 0, attempt.said
    training, trained = ((attempt.at(line) or 0) - attempt.started for line in (TRAINING, TRAINED))
    end = time.time() - attempt.started
    print(f"undisturbed: training from {training:.1f} s to {trained:.1f} s of {end:.1f} s", flush=True)
    return Undisturbed(training, trained, end, weight_hashes(out / "model"))


def until_complete(
    out: Path, compute: str, kills: int, chance: random.Random, expected: Undisturbed, tally: Tally
) -> None:
    """One run, killed again and again until it is complete."""
    while tally.kills < kills:
        kept, attempt = kept_step(out), Attempt(start(out, compute, *OPTIONS))
        if lets_end(attempt, out, chance, expected):
            note_end(attempt, kept, out, expected, tally)
            break
        moment = attempt.kill()
        note_resumption(attempt, kept, tally)
        note_kill(attempt, moment, out, tally)
        tally.broken += broken(out, expected.weights)
        print(f"kill {tally.kills} after {moment - attempt.started:.1f} s, step kept {kept_step(out)}", flush=True)
    shutil.rmtree(out, ignore_errors=True)


def note_end(attempt: Attempt, kept: int | None, out: Path, expected: Undisturbed, tally: Tally) -> None:
    """A run that has come to its end: the same weights, everything whole, nothing left over."""
    note_resumption(attempt, kept, tally)
    same = attempt.process.returncode == 0 and weight_hashes(out / "model") == expected.weights
    tally.completions += same
    tally.unequal += [] if same else [f"exit {attempt.process.returncode}: {attempt.said[-3:]}"]
    tally.broken += [*broken(out, expected.weights), *leftovers(out)]
    print("complete", flush=True)


def run(compute: str, kills: int = KILLS, seed: int = 0) -> list[Finding]:
    chance, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory() as folder:
        expected = undisturbed(Path(folder) / "undisturbed", compute)
        while tally.kills < kills:
            until_complete(Path(folder) / "out", compute, kills, chance, expected, tally)
    for problem in (*tally.wrong_steps, *tally.broken, *tally.unequal):
        print(problem)
    limit = EVERY + SLACK
    return [
        Finding("kills", tally.kills, f"{kills}", tally.kills == kills),
        Finding("kills in training with a step kept", tally.in_training, "above 0", tally.in_training > 0),
        Finding("resumed at a step > 0", tally.resumed, "above 0", tally.resumed > 0),
        Finding("resumed at another step than was kept", len(tally.wrong_steps), "0", not tally.wrong_steps),
        Finding("seconds of training lost by a kill, at most", tally.oldest, f"at most {limit}", tally.oldest <= limit),
        Finding("completions to the same bits", tally.completions, "above 0", tally.completions > 0),
        Finding("completions to others, or failed", len(tally.unequal), "0", not tally.unequal),
        Finding("broken or left-over files", len(tally.broken), "0", not tally.broken),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = run("float32", options.kills, options.seed)
    print(*found, sep="\n")
    sys.exit(not all(finding.holds for finding in found))
