"""The most memory that a process holds which loads one model and writes with it: run as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from llm_streamline.recipe import Runtime

_KEPT = {"device", "compute", "threads", "allow_pickle", "trust_remote_code"}


def process_peak(model: str, runtime: Runtime) -> int | None:
    """Bytes, of this interpreter's libraries too; None where that process fails, as for want of memory."""
    settings = runtime.model_dump_json(include=_KEPT)
    command = [sys.executable, "-m", "llm_streamline.scoring.peak", model, settings]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def own_peak() -> int:
    """Bytes of this process's largest resident set."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with what the parent held: Linux hands that on to its children
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(model: str, settings: str) -> None:
    from llm_streamline.scoring.speed import loads, one_round
    from llm_streamline.scoring.subject import Subject

    one = Subject(model, Runtime(quiet=True, **json.loads(settings)))
    one_round(one.model, loads(one.context)[0])
    print(own_peak())


if __name__ == "__main__":
    main(*sys.argv[1:])
