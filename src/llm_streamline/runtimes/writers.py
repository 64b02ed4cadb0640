"""The formats that a model folder can be written in, each with the program that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from transformers import PretrainedConfig

from llm_streamline.checkpoint import Source, checkpoint_dtype
from llm_streamline.errors import UserError
from llm_streamline.runtimes import gguf
from llm_streamline.runtimes.gguf_model import GgufModel
from llm_streamline.runtimes.onnx import OnnxModel, export_onnx
from llm_streamline.runtimes.patterns import why_not_gguf
from llm_streamline.runtimes.runner import Runner
from llm_streamline.runtimes.vllm_model import VllmModel

EXACT = "f32"
_SHORT = {"float32": EXACT, "float16": "f16", "bfloat16": "bf16"}


class Writer:
    """Writes one model folder. `lossy` formats are made of a file in the `default` one."""

    runtime: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    lossy: ClassVar[tuple[str, ...]] = ()

    def __init__(self, folder: Path, config: PretrainedConfig, llama_cpp: Path | None) -> None:
        """Errors: UserError for what can be seen not to go."""
        self.folder, self.config, self._llama_cpp = folder, config, llama_cpp
        self.default = EXACT
        self.check()

    def check(self) -> None:
        """Errors: UserError where the program would run the model otherwise than it was made, or is not here."""

    def write(self, target: Path, number_format: str) -> None:
        raise NotImplementedError

    def lessen(self, source: Path, target: Path, number_format: str) -> None:
        raise NotImplementedError

    def runner(self, path: Path, context: int) -> Runner:
        raise NotImplementedError


class GgufWriter(Writer):
    """A file for llama.cpp."""

    runtime, formats, lossy = "llama.cpp", gguf.CONVERTED, gguf.QUANTISED

    def check(self) -> None:
        if why := why_not_gguf(self.config):
            raise UserError(
                f"{self.folder} cannot be written as GGUF, as {why}; shorten the dense model again with --for gguf, "
                "which removes whole periods."
            )
        self._converter = gguf.find_converter(self._llama_cpp)
        dtype = checkpoint_dtype(Source(str(self.folder)), self.config)
        self.default = _SHORT[str(dtype).removeprefix("torch.")]

    def write(self, target: Path, number_format: str) -> None:
        gguf.convert(self.folder, target, self._converter, number_format)

    def lessen(self, source: Path, target: Path, number_format: str) -> None:
        gguf.quantise(source, target, number_format)

    def runner(self, path: Path, context: int) -> Runner:
        return GgufModel(path, context)


class OnnxWriter(Writer):
    """A folder for ONNX Runtime."""

    runtime, formats = "onnxruntime", (EXACT,)

    def write(self, target: Path, number_format: str) -> None:
        export_onnx(self.folder, target)

    def runner(self, path: Path, context: int) -> Runner:
        return OnnxModel(path)


class VllmFolder(Writer):
    """The folder itself, for vLLM."""

    runtime, formats = "vllm", (EXACT,)

    def write(self, target: Path, number_format: str) -> None:
        target.symlink_to(self.folder.resolve(), target_is_directory=True)

    def runner(self, path: Path, context: int) -> Runner:
        return VllmModel(path, context)


WRITERS: dict[str, type[Writer]] = {"gguf": GgufWriter, "onnx": OnnxWriter}
_KINDS: tuple[type[Writer], ...] = (*WRITERS.values(), VllmFolder)
RUNTIMES = {kind.runtime: kind for kind in _KINDS}
