"""How long `llm-streamline --help` takes, against importing its command-line library alone."""

from __future__ import annotations

import subprocess
import sys

from bench.common import Finding, interleaved, median_ratio


def run(compute: str) -> list[Finding]:
    def call(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    actions = {
        "help": lambda: call("-m", "llm_streamline", "--help"),
        "typer": lambda: call("-c", "import typer"),
    }
    ratio = median_ratio(interleaved(actions, rounds=15), "help", "typer")
    return [Finding("--help / importing typer", ratio, "at most 3", ratio <= 3)]
