"""What a run works with: its folder on disk, and the model, tokenizer and text, each loaded when first needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_streamline import checkpoint
from llm_streamline.errors import UserError
from llm_streamline.families import parameter_counts
from llm_streamline.files import remove_leftovers, write_text
from llm_streamline.recipe import Recipe, Runtime, changed_keys, read_yaml, to_yaml
from llm_streamline.records import ModelShape, Record
from llm_streamline.text import Parts, read_parts

RECIPE = "recipe.yaml"
R = TypeVar("R", bound=Record)


class RunFolder:
    """The run folder: a stage whose file is there is done. Nothing is made on disk before the first result."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self._recipe = path, recipe

    @classmethod
    def open(cls, path: Path | None, recipe: Recipe) -> RunFolder:
        """Continue or begin a run in `path`. Errors: UserError where it is not ours to continue."""
        if path is None:
            raise UserError("no output folder was given; name one with -o, such as -o streamlined.")
        if path.exists() and not path.is_dir():
            raise UserError(f"-o {path} is a file; give a folder that is new or empty.")
        if path.exists():
            remove_leftovers(path)
        contents = [entry.name for entry in path.iterdir()] if path.exists() else []
        if RECIPE in contents:
            changed = changed_keys(Recipe(**read_yaml(path / RECIPE)), recipe)
            if changed:
                raise UserError(
                    f"-o {path} holds a run of another recipe ({', '.join(changed)} changed); "
                    "repeat the command as it was, or give another folder."
                )
        elif contents:
            raise UserError(f"-o {path} is not empty and not a run of this tool; give a folder that is new or empty.")
        return cls(path, recipe)

    def file(self, name: str) -> Path:
        """Where a result belongs, with the recipe lying beside it before it is made."""
        if not (self.path / RECIPE).exists():
            write_text(self.path / RECIPE, to_yaml(self._recipe))
        return self.path / name

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def stage(self, name: str, kind: type[R], make: Callable[[], R]) -> R:
        """The record in `name`, made and written unless an earlier run has done so."""
        if self.has(name):
            return kind.read(self.path / name)
        record = make()
        record.write(self.file(name))
        return record


class Workspace:
    """The source model and its text, as the recipe and the runtime ask for them."""

    def __init__(self, recipe: Recipe, runtime: Runtime) -> None:
        self.recipe, self.runtime = recipe, runtime
        self.source = checkpoint.Source(recipe.model, runtime.allow_pickle, runtime.trust_remote_code)
        if runtime.threads:
            torch.set_num_threads(runtime.threads)

    @cached_property
    def config(self) -> PretrainedConfig:
        return checkpoint.load_config(self.source)

    @cached_property
    def shape(self) -> ModelShape:
        """Exact parameter counts, from a model without weights."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        total, layers = parameter_counts(model)
        return ModelShape(name=self.recipe.model, model_type=self.config.model_type, total=total, layers=layers)

    @cached_property
    def device(self) -> str:
        asked = self.runtime.device
        cuda = torch.cuda.is_available()
        if asked.startswith("cuda") and not cuda:
            raise UserError(f"--device {asked} was given but torch finds no GPU here; use --device cpu.")
        return ("cuda" if cuda else "cpu") if asked == "auto" else asked

    @cached_property
    def bfloat16(self) -> bool:
        """Whether to compute in bfloat16: where asked, or where the machine multiplies it fast."""
        if self.runtime.compute != "auto":
            return self.runtime.compute == "bfloat16"
        if self.device.startswith("cuda"):
            return torch.cuda.is_bf16_supported(including_emulation=False)
        tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, test, lambda: False)() for test in tests)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The number format of the saved model."""
        return getattr(torch, self.recipe.dtype) if self.recipe.dtype else checkpoint.checkpoint_dtype(self.config)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The frozen source: in the checkpoint's number format to compute in bfloat16, else in float32."""
        return self.load(self.source)

    def load(self, source: checkpoint.Source) -> PreTrainedModel:
        return checkpoint.load_model(source, "auto" if self.bfloat16 else torch.float32, self.device)

    def model_as_saved(self) -> PreTrainedModel:
        """The source on the CPU in float32, rounded to what the saved number format holds."""
        same = self.model.dtype == torch.float32 and self.dtype == checkpoint.checkpoint_dtype(self.config)
        if same and self.device == "cpu":
            return self.model
        return checkpoint.round_weights(checkpoint.load_model(self.source, torch.float32), self.dtype)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return checkpoint.load_tokenizer(self.source, self.config.vocab_size)

    @cached_property
    def parts(self) -> Parts:
        context = checkpoint.context_length(self.config)
        parts = read_parts(self.recipe, self.tokenizer, context, self.runtime.quiet)
        for blocks in (parts.calibration, parts.training, parts.validation):
            checkpoint.check_ids(blocks, self.config.vocab_size)
        return parts

    def batch(self, tokens: int) -> int:
        """Sequences that make up about `tokens` tokens."""
        return max(1, tokens // self.parts.validation.shape[1])
