"""A shortened model's folder -> the same with fewer bits per weight, by torchao or llm-compressor: ordinary besides."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llm_streamline.card import write_card
from llm_streamline.errors import UserError, VerificationError
from llm_streamline.families import layers_of
from llm_streamline.files import atomic
from llm_streamline.oracle import MANIFEST, stored_tensors, verify, weight_hashes
from llm_streamline.records import Manifest, Scores, Verification

INT8 = "int8"
W4A16 = "w4a16"  # bits of weights, and of what they multiply
GROUPS = (128, 64, 32)
CALIBRATION = 128  # sequences of text that GPTQ rounds the weights by, at most
LIBRARIES = {INT8: ("torchao", "int8"), W4A16: ("llmcompressor", "vllm")}
Quantise = Callable[[Path, Path], None]


def check_library(kind: str) -> None:
    """Errors: UserError where what makes such weights is not installed."""
    library, extra = LIBRARIES[kind]
    if find_spec(library) is None:
        raise UserError(
            f"{kind} weights are {library}'s, which is not installed: pip install 'llm-streamline[{extra}]'."
        )


def group_size(layers: nn.Module) -> int:
    """How many weights of a row share a scale in 4 bits: as many as every row of the linear layers has whole groups of.

    Errors: UserError where there is no such size among GROUPS, or no linear layer.
    """
    widths = {part.in_features for part in layers.modules() if isinstance(part, nn.Linear)}
    if not widths:
        raise UserError("--then w4a16 rounds torch's linear layers, of which this model has none; use --then int4.")
    for size in GROUPS:
        if not any(width % size for width in widths):
            return size
    raise UserError(
        f"--then w4a16 has a scale for every {GROUPS[-1]} weights of a row or more, and this model has rows of "
        f"{', '.join(map(str, sorted(widths)))}; use --then int8."
    )


def write_lighter(
    kind: str,
    quantise: Quantise,
    source: Path,
    target: Path,
    memory: int | None = None,
    scores: Scores | None = None,
) -> Verification:
    """Write `target`, a copy of a verified model folder with the weights that `quantise(source, folder)` writes there.

    It is checked in a fresh process against what the source with its window replaced computes, as the folder it comes
    from was, with more room; `scores` are for its manifest, where that of `source` has none yet. Errors: UserError;
    VerificationError, with nothing written, where it computes otherwise.
    """
    check_library(kind)
    with atomic(target) as folder:
        folder.mkdir()
        quantise(source, folder)
        _copy_the_rest(source, folder)
        manifest = Manifest.read(source / MANIFEST)
        tensors = {**manifest.tensors, "stored": len(stored_tensors(folder))}
        news = {"tensors": tensors, "weights": weight_hashes(folder), "quantised": kind, "verification": None}
        manifest = manifest.model_copy(update=news | ({"scores": scores} if scores else {}))
        manifest.write(folder / MANIFEST)
        verification = verify(folder, memory=memory)
        if not verification.passed:
            raise VerificationError(f"the {kind} model is not published: {'; '.join(verification.problems)}.")
        manifest = manifest.model_copy(update={"verification": verification})
        manifest.write(folder / MANIFEST)
        write_card(manifest, folder)
    return verification


def _copy_the_rest(source: Path, folder: Path) -> None:
    """All but weights and configuration, as it is: transformers writes some of it in its own way."""
    for part in source.iterdir():
        if part.is_dir():
            shutil.copytree(part, folder / part.name)
        elif not part.name.startswith("model") and part.name != "config.json":
            shutil.copyfile(part, folder / part.name)


def by_torchao(source: Path, folder: Path) -> None:
    """int8 weights of the linear layers, row by row."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    settings = TorchAoConfig(Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(source, quantization_config=settings).save_pretrained(folder)


def by_llm_compressor(blocks: Tensor, quiet: bool) -> Quantise:
    """GPTQ (arXiv 2210.17323) on (N, T) token ids, in the format compressed-tensors, which vLLM reads; no head."""

    def quantise(source: Path, folder: Path) -> None:
        from datasets import Dataset
        from llmcompressor import LoggerConfig, configure_logger, oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier

        configure_logger(LoggerConfig(disabled=True))
        ids = blocks[:CALIBRATION]
        text = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
        model = AutoModelForCausalLM.from_pretrained(source)
        rounded = {"num_bits": 4, "strategy": "group", "group_size": group_size(layers_of(model))}
        with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
            way = {"linear": {"targets": ["Linear"], "weights": rounded}}
            recipe = GPTQModifier(config_groups=way, ignore=["lm_head"])
            sizes = {"max_seq_length": ids.shape[1], "num_calibration_samples": len(ids)}
            oneshot(model=model, dataset=text, recipe=recipe, **sizes)
        model.save_pretrained(folder, save_compressed=True)

    return quantise
