"""Peak anonymous memory of every stage, layers on the disk, at four depths, and at three times the tokens.

`python -m bench.depths [--figure FILE]`; `python -m bench.depths LAYERS TOKENS` measures one, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import Finding

DEPTHS, TOKENS, BOUND = (8, 16, 32, 64), 16_384, 1.15  # modules without weights take a little each
WORK = DEPTHS[-1] * TOKENS  # layers times tokens of a case: a brief peak is as likely to be seen in each
FEWER, MORE = 65_536, 196_608  # in two readings of the weights, and in six: the second finds what the first left


def run(compute: str) -> list[Finding]:
    return findings(measured())


def measured(depths: tuple[int, ...] = DEPTHS) -> dict[str, dict[str, int]]:
    """Bytes by stage, for each depth, and for the first with more tokens."""
    cases = {f"{depth} layers": (depth, TOKENS) for depth in depths}
    cases |= {f"{tokens} tokens": (DEPTHS[0], tokens) for tokens in (FEWER, MORE)}
    found = {}
    for name, case in cases.items():
        command = [sys.executable, "-m", "bench.depths", *map(str, case)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, {stage: f"{value / 1e6:.0f} MB" for stage, value in found[name].items()}, flush=True)
    return found


def findings(peaks: dict[str, dict[str, int]]) -> list[Finding]:
    rows = []
    pairs = [(f"{depth} layers", f"{DEPTHS[0]} layers") for depth in DEPTHS[1:]]
    for name, base in [*pairs, (f"{MORE} tokens", f"{FEWER} tokens")]:
        if name in peaks and base in peaks:
            worst = max(peaks[name][stage] / peaks[base][stage] for stage in peaks[base])
            rows.append(Finding(f"peak memory, {name} / {base}", worst, f"at most {BOUND}", worst <= BOUND))
    return rows


class Peak:
    """The most anonymous memory while a block ran, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        from llm_streamline.memory import held

        while not self._stop.is_set():
            self.bytes = max(self.bytes, held())
            time.sleep(0.003)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def one(layers: int, tokens: int) -> dict[str, int]:
    """Every stage of a random model on random tokens."""
    from bench.large import write_model
    from llm_streamline.scoring.perplexity import next_token_loss

    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "model", layers=layers, width=512, inner=1536, vocabulary=4096)
        peaks = {}
        for name, stage in stages(path, tokens, next_token_loss).items():
            with Peak() as peak:
                for _ in range(max(1, WORK // (layers * tokens))):
                    stage()
            peaks[name] = peak.bytes
    return peaks


def stages(path: Path, tokens: int, loss: Callable[..., Any]) -> dict[str, Callable[[], object]]:
    import torch

    from llm_streamline.analyze import analyze
    from llm_streamline.assemble import Parts, build
    from llm_streamline.checkpoint import Source, load_model
    from llm_streamline.offload import save_lent
    from llm_streamline.records import LayerPlan, Window
    from llm_streamline.replacement import build_replacement
    from llm_streamline.train import Settings, Trainer

    model = load_model(Source(str(path)), torch.bfloat16, offload=path.parent / "rewritten")
    layers = model.config.num_hidden_layers
    window = Window(start=layers - 6, stop=layers - 1)
    blocks = torch.randint(4096, (tokens // 256, 256), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    replacement = build_replacement(model, [window.start], "inherited", 0)
    settings = Settings("nmse", 4, 1, 1e-3, 1e-4, 1e-3, 0.01, 5.0, autocast=True)
    counts = {"parameters_before": 0, "parameters_after": 0, "similarity": 0, "similarity_se": 0, "plain_parameters": 0}
    plan = LayerPlan(
        model="",
        model_type=model.config.model_type,
        num_layers=layers,
        window=window,
        replace="layer",
        occupied=1,
        plain_window=window,
        why="",
        **counts,
    )

    def write() -> None:
        source = load_model(Source(str(path)), torch.float32, offload=path.parent / "rewritten")
        built, _ = build(Parts(source, plan, replacement, None), torch.bfloat16)
        save_lent(built, path.parent / "out", 10**8)

    return {
        "analysis": lambda: analyze(model, blocks, 4, quiet=True, scratch=path.parent),
        "training": lambda: Trainer(model, window, replacement, settings, quiet=True).fit(blocks, blocks[:8]),
        "scores": lambda: loss(model, blocks, 4, "", quiet=True),
        "assembly": write,
    }


def draw(peaks: dict[str, dict[str, int]], file: Path) -> None:
    """Peak memory against depth, a line per stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for stage in next(iter(peaks.values())):
        axes.plot(DEPTHS, [peaks[f"{depth} layers"][stage] / 1e6 for depth in DEPTHS], marker="o", label=stage)
    axes.set(xlabel="decoder layers", ylabel="peak anonymous memory, MB", ylim=(0, None), xticks=DEPTHS)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.depths", description=__doc__)
    parser.add_argument("case", nargs="*", type=int)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--depths", type=int, nargs="*", default=DEPTHS, help="measure these alone")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(one(*options.case)))
        return
    peaks = measured(tuple(options.depths))
    print(*findings(peaks), sep="\n")
    if options.figure and tuple(options.depths) == DEPTHS:
        draw(peaks, options.figure)


if __name__ == "__main__":
    main()
