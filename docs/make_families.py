"""Write docs/families.md from the rows: `python docs/make_families.py`. A test holds the two together.

Only the proven families are listed: the others depend on the installed transformers, and the command lists those.
"""

from __future__ import annotations

from pathlib import Path

from llm_streamline.families import known_families

TARGET = Path(__file__).parent / "families.md"
INTRODUCTION = """# Model families

Made by `python docs/make_families.py`; do not edit.

Proven means: for every run of one to three layers, a small model with every option that depends on a layer's number
was cut, saved and loaded again, and computed what the source computes with those layers skipped, with and without its
cache (`make matrix`). Anything else is refused; `llm-streamline families` lists all that the installed
transformers knows, with the reason.

| model_type | what was proven |
|---|---|
"""


def page() -> str:
    rows = [row for row in known_families() if row["status"] == "proven"]
    return INTRODUCTION + "".join(f"| `{row['model_type']}` | {row['reason']} |\n" for row in rows)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
