"""Training by two one-thread processes together, against what two reach that know nothing of one another.

`python -m bench.processes links` (as root) has the two in network namespaces joined by one cable, and cuts it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from bench.common import Finding, load, model_name, random_blocks
from bench.train import WINDOW, WithoutValidation
from llm_streamline.parallel import ALONE, World
from llm_streamline.replacement import build_replacement
from llm_streamline.train import Settings

BATCH = 16  # sequences in a step, of all processes: about what the default gives
STEPS, ROUNDS = 4, 7
SPACES, ENDS, PLACES = ("streamline-a", "streamline-b"), ("slv-a", "slv-b"), ("10.77.0.1", "10.77.0.2")
TIMEOUT = 10


def run(compute: str) -> list[Finding]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    pair = [start(["bench.processes", "worker", compute], rank, place) for rank in range(2)]
    said, _ = [process.communicate()[0] for process in pair]
    ratio, rate = json.loads(said)
    what = f"two processes / two independent ones, tokens per second, {compute} ({rate:,.0f} together)"
    return [Finding(what, ratio, "at least 0.85", ratio >= 0.85)]


def start(arguments: list[str], rank: int, place: dict[str, str], before: tuple[str, ...] = ()) -> subprocess.Popen:
    known = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1", **place}
    command = [*before, sys.executable, "-m", *arguments]
    return subprocess.Popen(command, env={**os.environ, **known}, stdout=subprocess.PIPE, text=True)


def worker(compute: str) -> None:
    """Both ways in turn, in the same two processes, so that drift hits both alike."""
    torch.set_num_threads(1)
    model = load(compute)
    blocks, found = random_blocks(model, BATCH * STEPS), []
    settings = Settings("nmse", BATCH, 1, 1e-3, 1e-4, 1e-3, 0.01, 5.0, autocast=compute == "bfloat16")
    with World.opened(600) as world:

        def rate(of: World) -> float:
            trainer = WithoutValidation(
                model, WINDOW, build_replacement(model, [WINDOW.start], "inherited", 0), settings, True
            )
            trainer.world = of
            world.sum_(torch.zeros(1))  # both begin together
            began = time.perf_counter()
            trainer.fit(blocks, blocks[:0])
            return blocks.numel() / (time.perf_counter() - began)

        rate(world)
        for _ in range(ROUNDS):
            alone = float(world.sum_(torch.tensor(rate(ALONE), dtype=torch.float64)))
            found.append((rate(world), alone))
    if world.first:
        print(json.dumps([median(one / other for one, other in found), median(one for one, _ in found)]))


def links() -> None:
    """The same result over a cable; both end where it is cut, and go on once it is mended."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        alone = [sys.executable, "-m", *command(folder / "alone")]
        subprocess.run(alone, check=True, capture_output=True, env={**plain, "OMP_NUM_THREADS": "1"})
        try:
            join()
            pair = over_the_cable(folder / "whole")
            print("whole:", [process.wait() for process in pair], difference(folder / "alone", folder / "whole"))
            pair = over_the_cable(folder / "cut")
            while not (folder / "cut" / "checkpoint.safetensors").exists():
                time.sleep(0.02)
            ip("-n", SPACES[1], "link", "set", ENDS[1], "down")
            began = time.monotonic()
            codes = [process.wait() for process in pair]
            print(f"cut: {codes} within {time.monotonic() - began:.1f} s, --worker-timeout {TIMEOUT}s", flush=True)
            ip("-n", SPACES[1], "link", "set", ENDS[1], "up")
            time.sleep(2)
            pair = over_the_cable(folder / "cut")
            print("mended:", [process.wait() for process in pair], difference(folder / "alone", folder / "cut"))
        finally:
            for space in SPACES:
                subprocess.run(["ip", "netns", "del", space], check=False)


def command(out: Path) -> list[str]:
    sizes = [
        "--tokens",
        "30k",
        "--calibration-tokens",
        "8k",
        "--validation-tokens",
        "4k",
        "--batch",
        "8",
        "--block",
        "128",
        "--compute",
        "float32",
        "--tasks",
        "none",
    ]
    often = ["--checkpoint-every", "1s", "--worker-timeout", f"{TIMEOUT}s"]
    return ["llm_streamline", "compress", model_name(), "--data", "bundled", "-o", str(out), *sizes, *often]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def join() -> None:
    for space in SPACES:
        ip("netns", "add", space)
    ip("link", "add", ENDS[0], "netns", SPACES[0], "type", "veth", "peer", "name", ENDS[1], "netns", SPACES[1])
    for space, end, place in zip(SPACES, ENDS, PLACES, strict=True):
        ip("-n", space, "addr", "add", f"{place}/24", "dev", end)
        ip("-n", space, "link", "set", end, "up")
        ip("-n", space, "link", "set", "lo", "up")


def over_the_cable(out: Path) -> list[subprocess.Popen]:
    """Only the first's folder is used; the second is given another to show that."""
    pair = []
    for rank, (space, end) in enumerate(zip(SPACES, ENDS, strict=True)):
        place = {"MASTER_ADDR": PLACES[0], "MASTER_PORT": "29533", "GLOO_SOCKET_IFNAME": end}
        own = out if rank == 0 else out.with_name("nowhere")
        pair.append(start(command(own), rank, place, ("ip", "netns", "exec", space)))
    return pair


def difference(one: Path, other: Path) -> str:
    """The largest relative difference of training and validation losses, and whether the windows are the same."""
    plans, fits = (
        [json.loads((folder / name).read_text()) for folder in (one, other)]
        for name in ("plan.json", "replacement/fit.json")
    )
    pairs = [
        (a["loss"], b["loss"])
        for key in ("curve", "validation")
        for a, b in zip(fits[0][key], fits[1][key], strict=True)
    ]
    worst = max(abs(a - b) / a for a, b in pairs)
    return f"window same: {plans[0]['window'] == plans[1]['window']}, losses within {worst:.1e} of one process's"


if __name__ == "__main__":
    worker(sys.argv[2]) if sys.argv[1] == "worker" else links()
