"""Names that stand for several tasks: quick, which is bundled, readme and paper, which need lm-eval."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
DEFAULT = "quick"

_QUICK = ("quick/quick-continuation.jsonl", "quick/quick-grammar.jsonl", "quick/quick-facts.jsonl")
SUITES = {"quick": tuple(str(HERE / name) for name in _QUICK)}


def members(given: str) -> tuple[str, ...]:
    """The tasks that a suite's name stands for, as --tasks takes them; anything else stands for itself."""
    return SUITES.get(given, (given,))
