"""`python -m bench.versions VERSION ...`: the checklist of all families on other versions of transformers.

Each is installed, with what it needs, into a folder of its own that goes before this environment's on Python's path;
`--pre` allows pre-releases, `--folder` keeps what was installed. A line for each: how many tests passed, and of which
configurations some did not. STREAMLINE_MATRIX=1 runs every window of every configuration.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = "tests/test_families.py"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.versions", description=__doc__)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("--folder", type=Path, help="where versions are installed, and found again")
    parser.add_argument("--pre", action="store_true", help="allow pre-releases")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for version in options.versions:
            place = (options.folder or Path(scratch)) / version
            install(version, place, options.pre)
            print(f"transformers {version}: {outcome(place)}", flush=True)


def install(version: str, place: Path, pre: bool) -> None:
    if not (place / "transformers").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(place)]
        subprocess.run([*command, *(["--pre"] if pre else []), f"transformers=={version}"], check=True)


def outcome(place: Path) -> str:
    """What the checklist says with the transformers that lies in a folder."""
    path = os.pathsep.join([str(place), str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    quiet = ["--tb=no", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning"]  # old versions meet a newer torch
    command = [sys.executable, "-m", "pytest", *quiet, TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    failed = re.findall(r"^FAILED \S+?::(\S+)", done.stdout, re.MULTILINE)
    names = sorted({re.sub(r"^\w+\[(?:\d-)?|\]$", "", name) for name in failed})
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    return f"{last}; {', '.join(names)}" if names else last


if __name__ == "__main__":
    main()
