"""A model folder in another program's format, held against transformers in that program before it has its name."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import PretrainedConfig

from llm_streamline.checkpoint import Source, read_config
from llm_streamline.custom_code import has_own_code
from llm_streamline.errors import UserError, VerificationError
from llm_streamline.files import atomic
from llm_streamline.progress import say
from llm_streamline.runtimes.check import Reference, installed, require
from llm_streamline.runtimes.records import Compared, Exported
from llm_streamline.runtimes.writers import EXACT, RUNTIMES, WRITERS, Writer


def export(
    model: str, to: str, output: Path, number_format: str | None = None, llama_cpp: Path | None = None
) -> Exported:
    """Write `output`, which must not be there, of the model in a folder or run folder.

    What the format's own program computes is compared with transformers where it is installed; a lossy format is made
    of one that is not, which is compared too. Errors: UserError for what cannot be written; VerificationError, with
    nothing written, for what differs.
    """
    if to not in WRITERS:
        raise UserError(f"--to {to} is not known; give one of: {', '.join(WRITERS)}.")
    folder, config = exportable(model)
    writer = WRITERS[to](folder, config, llama_cpp)
    wanted = number_format or writer.default
    if wanted not in (*writer.formats, *writer.lossy):
        raise UserError(
            f"--type {wanted} is not known for {to}; give one of: {', '.join(writer.formats + writer.lossy)}."
        )
    if output.exists():
        raise UserError(f"-o {output} is there already; give a name that is new.")
    with atomic(output) as temporary:
        checks = _written(writer, temporary, wanted)
        size = sum(file.stat().st_size for file in [temporary, *temporary.rglob("*")] if file.is_file())
    return Exported(to=to, path=str(output), number_format=wanted, bytes=size, checks=checks)


def compare_runtime(model: str, runtime: str, llama_cpp: Path | None = None) -> Compared:
    """What a runtime computes of a model folder, in float32, against transformers.

    Errors: UserError where it is not installed, or cannot take the model.
    """
    if runtime not in RUNTIMES:
        raise UserError(f"--runtime {runtime} is not known; give one of: {', '.join(RUNTIMES)}.")
    require(runtime)
    folder, config = exportable(model)
    writer = RUNTIMES[runtime](folder, config, llama_cpp)
    with tempfile.TemporaryDirectory(prefix="llm-streamline-") as scratch:
        path = Path(scratch) / "model"
        writer.write(path, EXACT)
        return _compared(writer, Reference(folder, config), path, EXACT)


def exportable(model: str) -> tuple[Path, PretrainedConfig]:
    """The model folder of a run folder, or itself, and its configuration. Errors: UserError."""
    given = Path(Source(model).path)
    folder = next((place for place in (given, given / "model") if (place / "config.json").is_file()), None)
    if folder is None:
        raise UserError(f"{model} holds no config.json; give a HuggingFace model folder or a run folder.")
    if has_own_code(folder):
        raise UserError(f"{model} carries code of its own, which no other program runs; use a stock --replace.")
    return folder, read_config(Source(str(folder)))


def _written(writer: Writer, target: Path, number_format: str) -> list[Compared]:
    """`target` in a format, with what was compared. Errors: as `export`."""
    reference = Reference(writer.folder, writer.config)
    if number_format in writer.formats:
        writer.write(target, number_format)
        return _checked(writer, reference, target, number_format)
    whole = target.with_name("whole")
    writer.write(whole, writer.default)
    checks = _checked(writer, reference, whole, writer.default)
    writer.lessen(whole, target, number_format)
    whole.unlink()
    return checks + _checked(writer, reference, target, number_format)


def _compared(writer: Writer, reference: Reference, path: Path, number_format: str) -> Compared:
    runner = writer.runner(path, reference.context)
    try:
        return reference.compare(writer.runtime, runner, number_format)
    finally:
        runner.close()


def _checked(writer: Writer, reference: Reference, path: Path, number_format: str) -> list[Compared]:
    """One comparison, or none where the runtime is not installed. Errors: VerificationError where it fails."""
    if not installed(writer.runtime):
        say(f"{path.name} is not checked, as {writer.runtime} is not installed here")
        return []
    found = _compared(writer, reference, path, number_format)
    if found.problems:
        raise VerificationError(f"{writer.runtime} does not compute what transformers does: {found.problems[0]}.")
    return [found]
