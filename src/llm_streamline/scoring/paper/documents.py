"""What the task files beside this call: one document per question, and how a summary is scored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from llm_streamline.scoring.writing import rouge

_BLANK = re.compile(r"#idiom\d+#")


def fill_blanks(dataset: Any) -> Any:
    """CLUE's ChID, one document per blank: what comes before it, and each idiom with what comes after.

    A row's passages share their ten idioms, and its answers are in the order of its blanks; other blanks of a passage
    are filled rightly.
    """
    from datasets import Dataset

    return Dataset.from_list([blank for row in dataset for blank in _blanks(row)])


def _blanks(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    right = iter(row["answers"]["candidate_id"])
    for passage in row["content"]:
        parts = _BLANK.split(passage)
        golds = [next(right) for _ in parts[1:]]
        for place, gold in enumerate(golds):
            idioms = [row["candidates"][one] for one in golds]
            before = "".join(text + idiom for text, idiom in zip(parts[:place], idioms, strict=False)) + parts[place]
            after = parts[place + 1] + "".join(
                idiom + text for idiom, text in zip(idioms[place + 1 :], parts[place + 2 :], strict=True)
            )
            yield {"before": before, "choices": [idiom + after for idiom in row["candidates"]], "gold": gold}


def summary_scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L of what was written, by rouge-score."""
    return rouge(results[0], [doc["summary"]])
