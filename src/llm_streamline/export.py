"""A model folder in another program's format, held against transformers in that program before it has its name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from llm_streamline.checkpoint import Source, checkpoint_dtype
from llm_streamline.custom_code import PREFIX
from llm_streamline.errors import UserError, VerificationError
from llm_streamline.files import atomic
from llm_streamline.progress import say
from llm_streamline.runtimes import gguf
from llm_streamline.runtimes.check import Reference, installed, require
from llm_streamline.runtimes.gguf_model import GgufModel
from llm_streamline.runtimes.patterns import why_not_gguf
from llm_streamline.runtimes.records import Compared, Exported

GGUF = "gguf"
RUNTIME_OF = {GGUF: "llama.cpp"}
FORMATS = {GGUF: (*gguf.CONVERTED, *gguf.QUANTISED)}
_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_EXACT = "f32"


def export(
    model: str, to: str, output: Path, number_format: str | None = None, llama_cpp: Path | None = None
) -> Exported:
    """Write `output`, which must not be there, of the model in a folder or run folder.

    What the format's own program computes is compared with transformers where it is installed; a lossy format is made
    of one that is not, which is compared too. Errors: UserError for what cannot be written; VerificationError, with
    nothing written, for what differs.
    """
    folder, config = exportable(model)
    if to not in RUNTIME_OF:
        raise UserError(f"--to {to} is not known; give one of: {', '.join(RUNTIME_OF)}.")
    wanted = number_format or _SHORT[str(checkpoint_dtype(Source(str(folder)), config)).removeprefix("torch.")]
    if wanted not in FORMATS[to]:
        raise UserError(f"--type {wanted} is not known for {to}; give one of: {', '.join(FORMATS[to])}.")
    if output.exists():
        raise UserError(f"-o {output} is there already; give a name that is new.")
    writer = GgufWriter(folder, config, llama_cpp)
    with atomic(output) as temporary:
        checks = _written(writer, temporary, wanted)
        size = sum(file.stat().st_size for file in [temporary, *temporary.rglob("*")] if file.is_file())
    return Exported(to=to, path=str(output), number_format=wanted, bytes=size, checks=checks)


def compare_runtime(model: str, runtime: str, llama_cpp: Path | None = None) -> Compared:
    """What a runtime computes of a model folder, in float32, against transformers.

    Errors: UserError where it is not installed, or cannot take the model.
    """
    if runtime not in RUNTIME_OF.values():
        raise UserError(f"--runtime {runtime} is not known; give one of: {', '.join(RUNTIME_OF.values())}.")
    require(runtime)
    folder, config = exportable(model)
    writer = GgufWriter(folder, config, llama_cpp)
    with tempfile.TemporaryDirectory(prefix="llm-streamline-") as scratch:
        path = Path(scratch) / "model"
        writer.write(path, _EXACT)
        return writer.compare(path, _EXACT)


def exportable(model: str) -> tuple[Path, PretrainedConfig]:
    """The model folder of a run folder, or itself, and its configuration. Errors: UserError."""
    given = Path(Source(model).path)
    folder = next((place for place in (given, given / "model") if (place / "config.json").is_file()), None)
    if folder is None:
        raise UserError(f"{model} holds no config.json; give a HuggingFace model folder or a run folder.")
    if str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")).startswith(PREFIX):
        raise UserError(f"{model} carries code of its own, which no other program runs; use a stock --replace.")
    return folder, AutoConfig.from_pretrained(folder)


def _written(writer: GgufWriter, target: Path, number_format: str) -> list[Compared]:
    """`target` in a format, with what was compared. Errors: as `export`."""
    if number_format not in gguf.QUANTISED:
        writer.write(target, number_format)
        return writer.checked(target, number_format)
    whole = target.with_name("whole")
    writer.write(whole, writer.own_format)
    checks = writer.checked(whole, writer.own_format)
    gguf.quantise(whole, target, number_format)
    whole.unlink()
    return checks + writer.checked(target, number_format)


class GgufWriter:
    """Writes one model folder as GGUF, and compares what llama.cpp makes of it.

    Errors: UserError where llama.cpp would run the model otherwise than it was made, or has no converter here.
    """

    runtime = RUNTIME_OF[GGUF]

    def __init__(self, folder: Path, config: PretrainedConfig, llama_cpp: Path | None) -> None:
        if why := why_not_gguf(config):
            raise UserError(
                f"{folder} cannot be written as GGUF, as {why}; shorten the dense model again with --for gguf, which "
                "removes whole periods."
            )
        self._folder, self._converter = folder, gguf.find_converter(llama_cpp)
        self._reference = Reference(folder)
        dtype = checkpoint_dtype(Source(str(folder)), config)
        self.own_format = _SHORT[str(dtype).removeprefix("torch.")]

    def write(self, target: Path, number_format: str) -> None:
        gguf.convert(self._folder, target, self._converter, number_format)

    def compare(self, path: Path, number_format: str) -> Compared:
        runner = GgufModel(path, self._reference.context)
        try:
            return self._reference.compare(self.runtime, runner, number_format)
        finally:
            runner.close()

    def checked(self, path: Path, number_format: str) -> list[Compared]:
        """One comparison, or none where the runtime is not installed. Errors: VerificationError where it fails."""
        if not installed(self.runtime):
            say(f"{path.name} is not checked, as {self.runtime} is not installed here")
            return []
        found = self.compare(path, number_format)
        if found.problems:
            raise VerificationError(f"{self.runtime} does not compute what transformers does: {found.problems[0]}.")
        return [found]
