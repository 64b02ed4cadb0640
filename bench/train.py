"""Training's tokens per second, against what its parts allow when each is timed alone.

The parts: the frozen layers below the window's end, forward; the replacement, forward and backward; the optimizer's
step. Training does besides them: loading the batch, clipping, the schedule, and keeping the curve. Validation is not
part of either.
"""

from __future__ import annotations

from statistics import median

import torch

from bench.common import Finding, interleaved, load, random_blocks
from llm_streamline.forward import run_window
from llm_streamline.losses import LOSSES
from llm_streamline.records import Window
from llm_streamline.replacement import build_replacement
from llm_streamline.train import Settings, Trainer

BATCH = 15  # what the default gives for a million tokens in blocks of 256
STEPS = 4
WINDOW = Window(start=7, stop=11)


def run(compute: str) -> list[Finding]:
    model = load(compute)
    settings = Settings("nmse", BATCH, 1, 1e-3, 1e-4, 1e-3, 0.01, 5.0, autocast=compute == "bfloat16")
    trainer = WithoutValidation(
        model, WINDOW, build_replacement(model, [WINDOW.start], "inherited", 0), settings, quiet=True
    )
    blocks = random_blocks(model, BATCH * STEPS)
    rounds = interleaved({**parts(trainer, blocks), "training": lambda: trainer.fit(blocks, blocks[:0])}, rounds=7)
    ratio = median((s["frozen"] + s["replacement"] + s["optimizer"]) / s["training"] for s in rounds)
    return [Finding(f"training speed / what its parts allow, {compute}", ratio, "at least 0.85", ratio >= 0.85)]


class WithoutValidation(Trainer):
    """Training as it is, but for the validation, which is on neither side of the ratio."""

    def validate(self, blocks: torch.Tensor) -> float:
        return 0.0


def parts(trainer: Trainer, blocks: torch.Tensor) -> dict[str, object]:
    """The parts of STEPS training steps, each alone."""
    optimizer, autocast = trainer.optimizer(), trainer.settings.autocast
    precision = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    ids = blocks[:BATCH].long()
    with precision:
        passage = run_window(trainer.model, WINDOW, ids)

    def frozen() -> None:
        for part in blocks.split(BATCH):
            with precision:
                run_window(trainer.model, WINDOW, part.long())

    def replacement() -> None:
        for _ in range(STEPS):
            with precision:
                prediction = trainer.replacement.run(passage.entering.float(), passage.calls)
            LOSSES["nmse"](prediction.float(), passage.leaving.float()).backward()

    def step() -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-6
        for _ in range(STEPS):
            optimizer.step()

    return {"frozen": frozen, "replacement": replacement, "optimizer": step}
