"""A small compress run in a process of its own, and what must hold of a run folder at any moment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import yaml
from safetensors import SafetensorError, safe_open

from llm_streamline.files import TEMPORARY
from llm_streamline.lock import LOCK
from llm_streamline.oracle import weight_hashes

SMALL = ("--replace", "layer", "--calibration-tokens", "4k", "--validation-tokens", "2k", "--batch", "1")
CHECKPOINT = "checkpoint.safetensors"


def start(out: Path, compute: str, *options: str, module: str = "llm_streamline") -> subprocess.Popen[str]:
    """The run in a process group of its own; `options` are flags of `compress` and go after these."""
    command = [sys.executable, "-m", module, "compress", "bundled", "--data", "bundled", "-o", str(out)]
    command += [*SMALL, "--threads", "1", "--compute", compute, *options]
    pipes: dict[str, int] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes)


def lines_of(stream: IO[str] | None) -> Iterator[str]:
    assert stream is not None
    for line in stream:
        yield line.rstrip("\n")


def whole(path: Path) -> bool:
    """Whether a file can be read to its end as what its name says it is."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        elif path.suffix == ".yaml":
            yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                [tensors.get_tensor(key) for key in tensors.keys()]  # noqa: SIM118
        elif path.suffix == ".png":
            return path.read_bytes().endswith(b"IEND\xaeB`\x82")
        elif path.suffix == ".html":
            return path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    except (ValueError, OSError, TypeError, KeyError, SafetensorError):
        return False
    return path.stat().st_size > 0


def broken(out: Path, expected: dict[str, str]) -> list[str]:
    """What lies half-written under a final name, and a model that does not load or is another than `expected`."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and not is_temporary(path.relative_to(out))]
    found = [str(path.relative_to(out)) for path in files if not whole(path)]
    if (out / "model").exists():
        found += [] if weight_hashes(out / "model") == expected else ["model: other weights"]
        found += [] if loads(out / "model") else ["model: does not load"]
    return found


def loads(folder: Path) -> bool:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        print(f"{folder}: {error}")
        return False
    return model.num_parameters() > 0 and not any(loading.values())


def is_temporary(path: Path) -> bool:
    """What a killed run may leave: half-written, or the lock that died with it, which the next one takes over."""
    return any(part.startswith((TEMPORARY, LOCK)) for part in path.parts)


def leftovers(out: Path) -> list[str]:
    """Hidden files and folders, which no run that has ended leaves."""
    return [str(path.relative_to(out)) for path in sorted(out.rglob(".*"))]
