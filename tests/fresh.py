"""Fresh processes without ten seconds of imports each: forked from one that has only imported, and computed nothing."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm_streamline import assemble, oracle

LIBRARIES = ["torch", "transformers.models.llama.modeling_llama", "transformers.generation.utils"]
OWN = ["llm_streamline.cli", "llm_streamline.commands", "llm_streamline.run", "llm_streamline.oracle"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*LIBRARIES, *OWN])


class Fresh:
    """`python -m arguments` with the interface of `subprocess.Popen`, its output read once, by `communicate`."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fresh-"))
        self._texts = [self._folder / name for name in ("stdout", "stderr")]
        told = (list(arguments), dict(environment or os.environ), self._texts)
        self._process = FORKS.Process(target=_main, args=told)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.pid is not None and self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a fresh process", timeout or 0)
        out, err = (path.read_text(encoding="utf-8") for path in self._texts)
        shutil.rmtree(self._folder)
        return out, err


def run(command: Sequence[str], env: Mapping[str, str] | None = None, **_: object) -> subprocess.CompletedProcess[str]:
    """In the place of `subprocess.run` for `[sys.executable, "-m", ...]`, whose output is wanted as text."""
    assert command[:2] == [sys.executable, "-m"], command
    process = Fresh(command[2:], env)
    out, err = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _main(arguments: list[str], environment: dict[str, str], texts: list[Path]) -> None:
    gc.freeze()  # what is imported stays, and is not looked through by each collection
    for number, path in enumerate(texts, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    assemble.verify = oracle.check  # which else begins a process that does import
    sys.argv = arguments
    sys.modules.pop(arguments[0], None)  # runpy would tell of it
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
