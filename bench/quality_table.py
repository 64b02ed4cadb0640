"""The rows of `bench.quality` as a table: every method beside one of them, with paired bootstrap intervals.

`python -m bench.quality_table ROWS [--against default] [--costs]`. Documents (or questions) and seeds are drawn
together, the same for both methods of a pair, so that what is common to them falls out. Rows of `bench.control` add
what each method that learns from the text keeps over the dense model trained on it. --costs adds what each took:
memory is told right by a row that a process of its own has measured.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.quality import DENSE, METHODS, learns_text
from bench.rows import SUFFIX, read_row

DRAWS = 2000
ONE_LAYER = 1.1  # what trains at most, in sizes of a decoder layer, where one layer is to stand for several
Values = NDArray[np.float64]
Row = dict[str, Any]


def read(folder: Path) -> tuple[Row, dict[str, dict[str, list[Row]]]]:
    """The dense model's row; and by share removed, by method, the rows of the seeds in order.

    Stops where rows were judged by different texts or questions, which no interval would tell.
    """
    judges: set[str] = set()
    found: dict[str, dict[str, list[Row]]] = {}
    dense: Row = {}
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        row = read_row(file)
        if "judged_by" in row:
            judges.add(str(row["judged_by"]))
        if row["method"] == DENSE:
            dense = row
        else:
            found.setdefault(row["remove"], {}).setdefault(row["method"], []).append(row)
    if len(judges) > 1:
        sys.exit(
            f"{folder} has rows judged by different files: {' and '.join(sorted(judges))}; keep one folder for each."
        )
    for methods in found.values():
        for rows in methods.values():
            rows.sort(key=lambda row: row["seed"])
    return dense, found


class Compared:
    """Rows of one share removed as arrays: (seeds, documents) of losses, (seeds, questions) of verdicts."""

    def __init__(self, dense: Row, rows: list[Row]) -> None:
        self.seeds = [row["seed"] for row in rows]
        self.tokens = np.array([count for _, count in dense["documents"]], dtype=float)
        base = np.array([total for total, _ in dense["documents"]])
        self.extra = np.array([[total for total, _ in row["documents"]] for row in rows]) - base
        spread = np.array([np.std(ppl, ddof=1) for ppl, _, _ in dense["items"]])
        self.weights = np.exp(spread - spread.max()) if len(spread) else spread  # Eq. 5
        first = np.array([right for _, right, _ in dense["items"]], dtype=bool)
        self.agree = np.array([[right for _, right, _ in row["items"]] for row in rows], dtype=bool) == first
        self.right = np.array([[likeliest for _, _, likeliest in row["items"]] for row in rows], dtype=float)

    def of(self, seeds: list[int]) -> Compared:
        """The same with those of its seeds alone."""
        rows = [number for number, seed in enumerate(self.seeds) if seed in seeds]
        few = copy.copy(self)
        few.seeds = [self.seeds[number] for number in rows]
        few.extra, few.agree, few.right = self.extra[rows], self.agree[rows], self.right[rows]
        return few

    def excess(self) -> float:
        """Nats per token over the dense model."""
        return float(self.extra.sum(axis=1).mean() / self.tokens.sum())

    def stability(self) -> float:
        """Eq. 6, the mean over seeds."""
        return float((self.agree * self.weights).sum(axis=1).mean() / self.weights.sum())

    def accuracy(self) -> float:
        return float(self.right.mean())


def differences(one: Compared, other: Compared, generator: np.random.Generator) -> dict[str, tuple[float, float]]:
    """95 % intervals of one minus other, by figure, over the seeds that both have."""
    one, other = one.of(other.seeds), other.of(one.seeds)
    seeds = generator.integers(len(one.seeds), size=(DRAWS, len(one.seeds)))
    return {
        "excess": _interval(one.extra - other.extra, one.tokens, seeds, generator),
        "stability": _interval((one.agree.astype(float) - other.agree) * one.weights, one.weights, seeds, generator),
        "accuracy": _interval(one.right - other.right, np.ones(one.right.shape[1]), seeds, generator),
    }


def _interval(
    values: Values, weights: Values, seeds: NDArray[np.int64], generator: np.random.Generator
) -> tuple[float, float]:
    """Of sum(values) / sum(weights) over drawn units, the mean over drawn seeds."""
    if not values.size:
        return (float("nan"), float("nan"))
    found = []
    for drawn in seeds:
        units = generator.integers(values.shape[1], size=values.shape[1])
        found.append(values[drawn].mean(axis=0)[units].sum() / weights[units].sum())
    return (float(np.percentile(found, 2.5)), float(np.percentile(found, 97.5)))


def controls(dense: Row, methods: dict[str, list[Row]]) -> dict[str, Compared]:
    """By method, its rows with excess over the dense model that had as much of it trained on the text, by seed.

    A loss of the dense model's own states and distribution leaves it as it is; so does none. Of a loss that has the
    text for a part the control still has it for the whole, which takes off more than that loss teaches. Empty without
    such rows.
    """
    if not {"control", "control-all"} <= methods.keys():
        return {}
    layer = methods["control"][0]["trained"]
    known = {name: rows for name, rows in methods.items() if name in METHODS}  # of others no one knows the loss
    found = {name: Compared(dense, rows) for name, rows in known.items()}
    for name in filter(learns_text, list(found)):
        other = "control" if methods[name][0]["trained"] <= ONE_LAYER * layer else "control-all"
        base = Compared(dense, methods[other])
        own, base = found[name].of(base.seeds), base.of(found[name].seeds)
        own.extra = own.extra - base.extra
        found[name] = own
    return {name: rows for name, rows in found.items() if rows.seeds}


def _above(over: dict[str, Compared], name: str, against: str) -> str:
    """The excess over the control, and the interval of what it is more than the first's."""
    if name not in over or not over[name].seeds:
        return " | "
    gap = differences(over[name], over[against], np.random.default_rng(0))["excess"] if against in over else None
    return f"{over[name].excess():.4f} | {_shown(gap) if name != against else ''}"


def _shown(interval: tuple[float, float] | None) -> str:
    return "[{:+.4f}, {:+.4f}]".format(*interval) if interval else ""


def table(dense: Row, methods: dict[str, list[Row]], against: str) -> None:
    judged = {name: rows for name, rows in methods.items() if rows[0].get("documents")}
    heads = ["method", "window", "trained", "excess, nats", "minus the first", "over the control", "minus"]
    heads += ["stability", "minus", "accuracy", "minus", "CPU s"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    first = Compared(dense, judged[against])
    over = {name: rows.of(first.seeds) for name, rows in controls(dense, judged).items()}
    found = {name: Compared(dense, rows) for name, rows in judged.items()}
    for name, rows in sorted(judged.items(), key=lambda pair: found[pair[0]].excess()):
        one = found[name].of(first.seeds)
        gaps = differences(one, first, np.random.default_rng(0))
        shown = {key: _shown(gap) if name != against else "" for key, gap in gaps.items()}
        places = "/".join(dict.fromkeys(row["window"] for row in rows))
        seconds = np.mean([row["cpu_seconds"] for row in rows])
        print(
            f"| `{name}` ({len(one.seeds)}) | {places} | {rows[0]['trained']:,} "
            f"| {one.excess():.4f} | {shown['excess']} | {_above(over, name, against)} "
            f"| {one.stability():.4f} | {shown['stability']} "
            f"| {one.accuracy():.4f} | {shown['accuracy']} | {seconds:.0f} |"
        )


def validation(methods: dict[str, list[Row]]) -> None:
    """What settings are chosen by: excess loss on the validation part, the mean over seeds and each."""
    print("| method | window | trained | excess on validation | by seed | CPU s |")
    print("|---|---|---|---|---|---|")
    for name in sorted(methods, key=lambda name: np.mean([row["validation"] for row in methods[name]])):
        rows = methods[name]
        each = " ".join(f"{row['validation']:.4f}" for row in rows)
        windows = "/".join(dict.fromkeys(row["window"] for row in rows))
        mean, seconds = (np.mean([row[key] for row in rows]) for key in ("validation", "cpu_seconds"))
        print(f"| `{name}` | {windows} | {rows[0]['trained']:,} | {mean:.4f} | {each} | {seconds:.0f} |")


def costs(methods: dict[str, list[Row]], against: str) -> None:
    """Seconds and memory, also as so many times what the first takes, as in the paper's Table 6.

    Of seconds the fewest of all seeds, to which others' work on a machine only adds; of memory the most, as what a
    process holds of rows before is not counted again.
    """
    print("\n| method | trained | training, s | times | all stages, CPU s | times | memory, MB | times |")
    print("|---|---|---|---|---|---|---|---|")
    keys = (("training_seconds", min), ("cpu_seconds", min), ("memory", max))
    taken = {name: [of(row[key] for row in rows) for key, of in keys] for name, rows in methods.items()}
    for name in sorted(taken, key=lambda name: taken[name][1]):
        pairs = zip(taken[name], taken[against], strict=True)
        ratios = [own / first if first else float("nan") for own, first in pairs]  # what trains nothing takes 0 s
        training, cpu, memory = taken[name]
        shown = zip((training, cpu, memory / 1e6), ratios, strict=True)
        cells = "".join(f" {value:.0f} | {ratio:.2f} |" for value, ratio in shown)
        print(f"| `{name}` ({len(methods[name])}) | {methods[name][0]['trained']:,} |{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--against", default="default")
    parser.add_argument("--costs", action="store_true")
    options = parser.parse_args()
    dense, found = read(options.rows)
    for remove, methods in found.items():
        print(f"\n{remove} removed\n")
        validation(methods)
        if dense.get("documents") and options.against in methods:
            print()
            table(dense, methods, options.against)
        if options.costs and options.against in methods:
            costs(methods, options.against)


if __name__ == "__main__":
    main()
