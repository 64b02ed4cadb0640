"""Write docs/cli.md from the help pages: `python docs/make_cli.py`. A test holds the two together."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

from llm_streamline.cli import COMMANDS, main

TARGET = Path(__file__).parent / "cli.md"


def page() -> str:
    os.environ["COLUMNS"] = "100"
    parts = ["# The command line\n\nMade by `python docs/make_cli.py` from `--help`; do not edit.\n"]
    for arguments in ([], *([name] for name in COMMANDS)):
        title = " ".join(["llm-streamline", *arguments])
        parts.append(f"\n## {title}\n\n```text\n{help_text(arguments)}```\n")
    return "".join(parts)


def help_text(arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
