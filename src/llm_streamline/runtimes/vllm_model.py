"""A model folder run by vLLM, which loads it as it is.

vLLM tells probabilities and no logits: their logarithms are logits but for one number at every position.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llm_streamline.errors import UserError, reason

_ALL = -1  # tokens of the vocabulary
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}  # stdout is for results


class VllmModel:
    """A `Runner` of a model folder, in float32, with room for so many tokens.

    Errors: UserError where vLLM does not load it, or does not run it; what it prints on stderr says why.
    """

    def __init__(self, folder: Path, context: int) -> None:
        os.environ |= {key: value for key, value in _QUIET.items() if key not in os.environ}
        import vllm

        self._sampling: Any = vllm.SamplingParams
        with _refusing():
            self._model: Any = vllm.LLM(
                model=str(folder), dtype="float32", max_model_len=context, max_logprobs=_ALL, enforce_eager=True
            )

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logarithms of what the model expects after each of the T tokens: (T, V), float32."""
        told = self._run(ids, max_tokens=1, logprobs=_ALL, prompt_logprobs=_ALL)
        after = [*told.prompt_logprobs[1:], told.outputs[0].logprobs[0]]  # nothing is expected before the first
        return np.stack([_row(one) for one in after])

    def greedy(self, ids: Sequence[int], new: int) -> list[int]:
        """So many tokens after the prompt, each the likeliest, through vLLM's cache."""
        return list(self._run(ids, max_tokens=new, ignore_eos=True).outputs[0].token_ids)

    def close(self) -> None:
        del self._model

    def _run(self, ids: Sequence[int], **asked: Any) -> Any:
        """What vLLM says of one prompt, sampling nothing."""
        sampling = self._sampling(temperature=0.0, detokenize=False, **asked)
        with _refusing():
            return self._model.generate([{"prompt_token_ids": list(ids)}], sampling, use_tqdm=False)[0]


@contextmanager
def _refusing() -> Iterator[None]:
    """Errors: UserError for whatever vLLM raises, whose processes tell the cause only on stderr."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"vLLM does not run this model here ({reason(error)}); give another, or leave it out."
        ) from error


def _row(told: Mapping[int, Any]) -> np.ndarray:
    """By token id in order."""
    return np.array([told[token].logprob for token in range(len(told))], dtype=np.float32)
