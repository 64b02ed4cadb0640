"""Excess loss against the training tokens: a table and a figure of rows of `bench.quality` at several budgets.

`python -m bench.quality_tokens 5k=ROWS 50k=ROWS 500k=ROWS [--remove 25%] [--figure FILE]`
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

from bench.quality_table import Compared, read
from llm_streamline.quantities import parse_count

OURS = {"default": "black", "healed": "crimson"}
FAR = 1.75  # times the median at the largest budget: a method beyond that would flatten the others' lines
TOP = 2  # times that median, of the figure


def excesses(folders: dict[str, Path], remove: str) -> dict[str, dict[int, float]]:
    """By method, by tokens: nats per held-out token over the dense model, the mean of the seeds that are there.

    What has been measured at one of several budgets alone has no course, and is left out.
    """
    found: dict[str, dict[int, float]] = {}
    for tokens, folder in folders.items():
        dense, rows = read(folder)
        for name, own in rows.get(remove, {}).items():
            found.setdefault(name, {})[parse_count(tokens)] = Compared(dense, own).excess()
    return {name: own for name, own in found.items() if len(own) >= min(2, len(folders))}


def table(found: dict[str, dict[int, float]]) -> None:
    budgets = sorted({tokens for own in found.values() for tokens in own})
    print("| method |" + "".join(f" {tokens:,} tokens |" for tokens in budgets))
    print("|---|" + "---|" * len(budgets))
    for name in sorted(found, key=lambda name: found[name].get(budgets[-1], float("inf"))):
        cells = (f" {found[name][tokens]:.4f} |" if tokens in found[name] else " |" for tokens in budgets)
        print(f"| `{name}` |" + "".join(cells))


def draw(found: dict[str, dict[int, float]], file: Path) -> None:
    from matplotlib import pyplot

    last = {name: own[max(own)] for name, own in found.items()}
    far = [name for name, excess in last.items() if excess > FAR * median(last.values())]
    figure, axes = pyplot.subplots(figsize=(7.5, 4.4), layout="constrained")
    axes.set_prop_cycle(color=pyplot.colormaps["tab20"].colors)
    for name in sorted(set(last) - set(far), key=lambda name: -last[name]):
        tokens, others = sorted(found[name]), {"linewidth": 1.2, "marker": ".", "linestyle": "--"}
        style = {"linewidth": 2.6, "marker": "o", "color": OURS[name]} if name in OURS else others
        axes.plot(tokens, [found[name][one] for one in tokens], label=name, **style)
    axes.set(
        xscale="log",
        ylim=(0, TOP * median(last.values())),
        xlabel=_label(far, last),
        ylabel="excess loss, nats per held-out token",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def _label(far: list[str], last: dict[str, float]) -> str:
    beyond = ", ".join(f"{name} {last[name]:.1f}" for name in far)
    return "training tokens" + (f"\nbeyond the figure: {beyond}" if far else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="TOKENS=ROWS")
    parser.add_argument("--remove", default="25%")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    pairs = (pair.partition("=") for pair in options.folders)
    found = excesses({tokens: Path(folder) for tokens, _, folder in pairs}, options.remove)
    table(found)
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
