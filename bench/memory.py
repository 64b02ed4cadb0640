"""Peak memory of training at a million tokens, against a quarter of them; each in a process of its own.

Run `python -m bench.memory TOKENS COMPUTE` for one of them.
"""

from __future__ import annotations

import subprocess
import sys

from bench.common import Finding

FEW, MANY, BOUND = 250_000, 1_000_000, 1.05


def run(compute: str) -> list[Finding]:
    few, many = (peak_in_a_process(tokens, compute) for tokens in (FEW, MANY))
    ratio = many / few
    what = (
        f"peak memory of training at {MANY} / at {FEW} tokens, {compute} ({many / 2**20:.0f} / {few / 2**20:.0f} MiB)"
    )
    return [Finding(what, ratio, f"at most {BOUND}", ratio <= BOUND)]


def peak_in_a_process(tokens: int, compute: str) -> int:
    command = [sys.executable, "-m", "bench.memory", str(tokens), compute]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(tokens: int, compute: str) -> int:
    """Bytes of the process's peak resident set after training on `tokens` random tokens."""
    from bench.common import load, random_blocks
    from bench.train import BATCH, WINDOW
    from llm_streamline.replacement import build_replacement
    from llm_streamline.scoring.peak import own_peak
    from llm_streamline.train import Settings, Trainer

    model = load(compute)
    settings = Settings("nmse", BATCH, 1, 1e-3, 1e-4, 1e-3, 0.01, 5.0, autocast=compute == "bfloat16")
    trainer = Trainer(model, WINDOW, build_replacement(model, [WINDOW.start], "inherited", 0), settings)
    trainer.fit(random_blocks(model, tokens // 256), random_blocks(model, 16))
    return own_peak()


if __name__ == "__main__":
    print(peak(int(sys.argv[1]), sys.argv[2]))
