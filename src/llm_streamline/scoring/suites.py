"""Names that stand for several tasks: quick, which is bundled, readme and paper, which need lm-eval."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
DEFAULT = "quick"


def _ours(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(str(HERE / folder / name) for name in names)


SUITES = {
    "quick": _ours("quick", "quick-continuation.jsonl", "quick-grammar.jsonl", "quick-facts.jsonl"),
    "readme": ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande"),
    "paper": (
        *_ours("paper", "c3.yaml", "cmnli.yaml", "chid.yaml"),
        *("boolq", "wsc", "hellaswag", "piqa"),
        *_ours("paper", "race_middle.yaml", "race_high.yaml"),
        *("mmlu", "cmmlu", "commonsense_qa"),
        *_ours("paper", "xsum_rouge.yaml"),
        "gsm8k",
        *_ours("paper", "strategyqa.yaml"),
    ),
}


def members(given: str) -> tuple[str, ...]:
    """The tasks that a suite's name stands for, as --tasks takes them; anything else stands for itself."""
    return SUITES.get(given, (given,))
