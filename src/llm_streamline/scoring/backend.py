"""Who computes lm-eval's tasks: the model as transformers has loaded it, or vLLM, which loads its folder itself."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any

from llm_streamline.errors import UserError, reason
from llm_streamline.scoring.subject import Evaluated

_BATCH = 8


def check_vllm(tasks_of_harness: int) -> None:
    """Errors: UserError where vLLM is not installed or would have nothing to do."""
    if not tasks_of_harness:
        raise UserError("--backend vllm computes tasks of lm-eval, and none was given; name one, or leave it out.")
    if find_spec("vllm") is None:
        raise UserError("--backend vllm was given and vLLM is not installed; install it, or use --backend hf.")


def language_model(one: Evaluated, backend: str, batch: int | None) -> Any:
    """The model as lm-eval wants it. Errors: UserError where vLLM cannot load it."""
    with redirect_stdout(sys.stderr):
        return _vllm(one) if backend == "vllm" else _transformers(one, batch)


def _transformers(one: Evaluated, batch: int | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=one.model,
        tokenizer=one.tokenizer,
        batch_size=batch or _BATCH,
        max_length=one.context,
        softmax_dtype="float32",  # else a bfloat16 model's log-likelihoods are sums of bfloat16, in steps of 0.25
    )


def _vllm(one: Evaluated) -> Any:
    if one.path is None:
        raise UserError(f"--backend vllm needs a folder, and {one.name} is in none; use --backend hf.")
    from lm_eval.models.vllm_causallms import VLLM

    try:
        return VLLM(pretrained=one.path, dtype=one.compute.partition(" ")[0], max_model_len=one.context)
    except Exception as error:  # of whatever kind: vLLM refuses models and machines in many ways
        raise UserError(f"vLLM cannot load {one.name} ({reason(error)}); use --backend hf.") from error
