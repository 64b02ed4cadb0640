"""A GGUF file where a model of transformers is expected that is only asked for logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

from llm_streamline.runtimes.gguf_model import GgufModel

CONTEXT = 4096  # tokens that a row may have, where no more are asked for


class GgufLanguageModel:
    """Called with rows of token ids (B, T), it gives their `logits` (B, T, V), float32."""

    def __init__(self, path: Path, context: int = CONTEXT) -> None:
        """Errors: UserError where llama.cpp does not load the file."""
        self._model = GgufModel(path, context)
        self.device = torch.device("cpu")

    def parameters(self) -> Iterator[torch.Tensor]:
        """None: they are llama.cpp's."""
        return iter(())

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            logits=torch.stack([torch.from_numpy(self._model.logits(row)) for row in input_ids.tolist()])
        )
