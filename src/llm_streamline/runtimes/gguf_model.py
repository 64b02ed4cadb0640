"""A GGUF file run by llama.cpp, through llama-cpp-python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llm_streamline.errors import UserError

_FLOAT32 = 0  # ggml's number of the format, for a cache as exact as the weights
_ERROR = 4  # ggml's number of the level


class GgufModel:
    """A `Runner` of a GGUF file, on the CPU, with room for so many tokens.

    Errors: UserError where llama.cpp does not load the file, with what it says.
    """

    def __init__(self, path: Path, context: int) -> None:
        import llama_cpp
        import torch

        threads = torch.get_num_threads()  # more than there are cores free wait for one another, spinning
        room: dict[str, Any] = {"n_ctx": context, "n_batch": context, "n_threads": threads, "n_threads_batch": threads}
        exact: dict[str, Any] = {"type_k": _FLOAT32, "type_v": _FLOAT32, "flash_attn": False}
        with errors_said() as said, weights_as_they_are():
            try:
                self._model = llama_cpp.Llama(
                    str(path), logits_all=True, n_gpu_layers=0, verbose=False, **room, **exact
                )
            except ValueError as error:
                why = next((line for line in said if ":" in line), str(error))
                raise UserError(f"llama.cpp does not load {path.name} ({why}); export another model.") from error

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """What the model expects after each of the T tokens: (T, V), float32."""
        self._model.reset()
        self._model.eval(list(ids))
        return np.array(self._model.scores[: len(ids)], dtype=np.float32)

    def greedy(self, ids: Sequence[int], new: int) -> list[int]:
        """So many tokens after the prompt, each the likeliest, through llama.cpp's cache."""
        written = [int(self.logits(ids)[-1].argmax())]
        while len(written) < new:
            self._model.eval(written[-1:])
            written.append(int(self._model.scores[self._model.n_tokens - 1].argmax()))
        return written

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without those that begin or end one."""
        return list(self._model.tokenize(text.encode(), add_bos=False, special=False))

    def close(self) -> None:
        self._model.close()


@contextmanager
def weights_as_they_are() -> Iterator[None]:
    """Models loaded meanwhile are not packed anew for one processor's instructions: on AMX, 0.3.36 crashes on some."""
    from llama_cpp import llama_cpp

    usual = llama_cpp.llama_model_default_params

    def unpacked() -> Any:
        settings = usual()
        settings.use_extra_bufts = False
        return settings

    llama_cpp.llama_model_default_params = unpacked
    try:
        yield
    finally:
        llama_cpp.llama_model_default_params = usual


@contextmanager
def errors_said() -> Iterator[list[str]]:
    """The lines that llama.cpp logs as errors meanwhile, without the function's name in front of each."""
    import llama_cpp
    from llama_cpp._logger import llama_log_callback

    said: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            said.append(text.decode(errors="replace").strip().partition(": ")[2])

    llama_cpp.llama_log_set(collect, None)
    try:
        yield said
    finally:
        llama_cpp.llama_log_set(llama_log_callback, None)
