"""lm-eval's samples of a task that is no multiple choice -> what the model wrote, one record per question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm_streamline.evaluation import Written
from llm_streamline.scoring.writing import plain, repetition, rouge

Sample = dict[str, Any]


def written_samples(task: str, samples: Iterable[Sample], tokenizer: PreTrainedTokenizerBase) -> list[Written]:
    """One record per question, in order; lm-eval has a sample for each of a task's filters."""
    found: dict[Any, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample["doc_id"], []).append(sample)
    return [_written(task, some, tokenizer) for some in found.values()]


def _written(task: str, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> Written:
    first, figures = samples[0], _figures(samples)
    arguments, response = first["arguments"][0], first["resps"][0][0]
    common = {"task": task, "id": str(first["doc_id"]), "prompt": str(arguments[0]), "figures": figures}
    if not isinstance(response, str):
        return Written(**common, text="", tokens=0, ended=None, repeated=0.0, **_likelihood(arguments, response))
    target = first["target"]
    answers = [str(one) for one in target] if isinstance(target, (list, tuple)) else [str(target)]
    ids = tokenizer.encode(response, add_special_tokens=False, verbose=False)
    told = next((value for key, value in figures.items() if key.startswith("exact_match,")), None)
    return Written(
        **common,
        text=response,
        tokens=len(ids),
        ended=None,
        repeated=repetition(ids),
        answers=answers,
        exact=plain(response) in {plain(answer) for answer in answers} if told is None else told == 1,
        rouge=rouge(response, answers),
    )


def _likelihood(arguments: Sequence[Any], response: Any) -> dict[str, Any]:
    """Of a task that asks how likely a text is: whether the model would have written it."""
    if len(arguments) < 2:  # a whole text, with nothing before it
        return {}
    return {"answers": [str(arguments[1])], "exact": bool(response[1])}


def _figures(samples: Sequence[Sample]) -> dict[str, float | list[float]]:
    """What lm-eval's metrics say about one question, as 'metric,filter'."""
    found: dict[str, float | list[float]] = {}
    for sample in samples:
        for name in sample["metrics"]:
            value = sample[name]
            if isinstance(value, Real):
                found[f"{name},{sample['filter']}"] = float(value)
            elif isinstance(value, (list, tuple)) and all(isinstance(one, Real) for one in value):
                found[f"{name},{sample['filter']}"] = [float(one) for one in value]
    return found
