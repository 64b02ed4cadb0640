"""`python -m bench [NAME ...] [--compute float32|bfloat16]`: every ratio the project quotes, measured here and now."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

NAMES = ("help", "analyze", "deletion", "train", "processes", "memory", "logits", "speed")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=f"which of {', '.join(NAMES)}")
    parser.add_argument("--compute", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    findings = []
    for name in options.names:
        for finding in import_module(f"bench.{name}").run(options.compute):
            print(finding, flush=True)
            findings.append(finding)
    sys.exit(not all(finding.holds for finding in findings))


if __name__ == "__main__":
    main()
