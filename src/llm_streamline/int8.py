"""A shortened model's folder -> the same with int8 weights, by torchao: ordinary for transformers with torchao."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from llm_streamline.card import write_card
from llm_streamline.errors import UserError, VerificationError
from llm_streamline.files import atomic
from llm_streamline.oracle import MANIFEST, stored_tensors, verify, weight_hashes
from llm_streamline.records import Manifest, Verification

INT8 = "int8"


def check_int8() -> None:
    """Errors: UserError where torchao is not installed."""
    if find_spec("torchao") is None:
        raise UserError("int8 weights are torchao's, which is not installed: pip install 'llm-streamline[int8]'.")


def write_int8(source: Path, target: Path, memory: int | None = None) -> Verification:
    """Write `target`, a copy of a verified model folder with the weights of its linear layers in int8, row by row.

    It is checked in a fresh process against what the source with its window replaced computes, as the folder it comes
    from was, with more room. Errors: UserError; VerificationError, with nothing written, where it computes otherwise.
    """
    check_int8()
    with atomic(target) as folder:
        folder.mkdir()
        _quantise(source, folder)
        for part in source.iterdir():  # last, as they are: transformers writes some of them in its own way
            if part.is_dir():
                shutil.copytree(part, folder / part.name)
            elif not part.name.startswith("model") and part.name != "config.json":
                shutil.copyfile(part, folder / part.name)
        manifest = Manifest.read(source / MANIFEST)
        tensors = {**manifest.tensors, "stored": len(stored_tensors(folder))}
        news = {"tensors": tensors, "weights": weight_hashes(folder), "quantised": INT8, "verification": None}
        manifest = manifest.model_copy(update=news)
        manifest.write(folder / MANIFEST)
        verification = verify(folder, memory=memory)
        if not verification.passed:
            raise VerificationError(f"the int8 model is not published: {'; '.join(verification.problems)}.")
        manifest = manifest.model_copy(update={"verification": verification})
        manifest.write(folder / MANIFEST)
        write_card(manifest, folder)
    return verification


def _quantise(source: Path, folder: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    settings = TorchAoConfig(Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(source, quantization_config=settings).save_pretrained(folder)
