"""A model that is evaluated: its name, fingerprint and tokenizer at once, its weights when first needed."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Protocol

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_streamline import checkpoint, fingerprints
from llm_streamline.custom_code import has_own_code
from llm_streamline.errors import UserError
from llm_streamline.files import sha256
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.workspace import Workspace

# two tokenizers with one vocabulary may still cut text differently
_PROBE = "The 3 quick, brown foxes'll jump -- 1,234.5 times!\n\n\tdef naïve(x): return 'Straße 北京' # …"


class Evaluated(Protocol):
    """What an evaluation asks of a model; `path` is None where no folder holds it as it is evaluated."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str | None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def compute(self) -> str: ...
    @property
    def context(self) -> int: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def tokenizer_digest(self) -> str: ...
    @property
    def model(self) -> PreTrainedModel: ...
    def release(self) -> None: ...


class Subject:
    """Errors: UserError on making one, for a model that cannot be used, with all but its weights looked at."""

    def __init__(self, name: str, runtime: Runtime) -> None:
        inner = Path(name) / "model"
        run = not (Path(name) / "config.json").exists() and (inner / "config.json").exists()
        self.name, self.path = name, str(inner) if run else name
        self._work = Workspace(Recipe(model=self.path), runtime)
        self._own_code = has_own_code(Path(self.path))
        if self._own_code and not runtime.trust_remote_code:
            raise UserError(f"{name} carries code of its own; read that code, then allow it with --trust-remote-code.")
        self.config = self._config()
        self.tokenizer = checkpoint.load_tokenizer(self._work.source, self.config.vocab_size)
        if self._own_code:
            checkpoint.check_weights(self._work.source)
        else:
            checkpoint.check_fit(self._work.source, self.config)
        self.fingerprint = fingerprints.whole_fingerprint(self._work.source, self.config)
        self.compute = self._work.compute

    def _config(self) -> PretrainedConfig:
        return AutoConfig.from_pretrained(self.path, trust_remote_code=True) if self._own_code else self._work.config

    @property
    def label(self) -> str:
        """A short name: the folder's, or that of the run it lies in."""
        path = Path(self.path)
        path = path.resolve() if path.name in ("", "..") or path.parent.name == ".." else path
        return path.parent.name if path.name == "model" and path.parent.name else path.name

    @property
    def context(self) -> int:
        return checkpoint.context_length(self.config)

    @cached_property
    def tokenizer_digest(self) -> str:
        return digest(self.tokenizer)

    @cached_property
    def model(self) -> PreTrainedModel:
        if self._own_code:
            return self._work.load_saved(Path(self.path), custom_code=True)
        return self._work.load(self._work.source)

    def release(self) -> None:
        """Let go of the weights."""
        self.__dict__.pop("model", None)


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash that two tokenizers share where they cut text alike."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return sha256(vocabulary.encode(), json.dumps(tokenizer.encode(_PROBE)).encode())
