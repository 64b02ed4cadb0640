"""Evaluation -> tables of words for its page: a line per task and model, in the evaluation's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TypeVar

from llm_streamline import verdict
from llm_streamline.answers import Stability
from llm_streamline.comparison import compared, dense_of, is_share, units
from llm_streamline.evaluation import Chain, Evaluation, Flips, Interval, ModelScore, TextScore
from llm_streamline.findings import (
    perplexities,
    ranking,
    retained,
    speed,
    steadiness,
    times,
    weight,
)

FOLD = 16  # lines beyond which a table opens on request
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Table:
    """Words in columns, of which the first `names` are read from the left; `faint` are lines that rank nothing."""

    head: list[str]
    rows: list[list[str]]
    faint: frozenset[int] = frozenset()
    names: int = 2

    @property
    def folded(self) -> bool:
        return len(self.rows) > FOLD


def _table(head: str, rows: list[list[str]], faint: Sequence[int] = (), names: int = 2) -> Table | None:
    """Without the columns in which nothing stands; None where there are no lines."""
    kept = [any(values) for values in zip(*rows, strict=True)]
    lines = [list(compress(row, kept)) for row in rows]
    return Table(list(compress(head.split("|"), kept)), lines, frozenset(faint), names) if rows else None


def overview(found: Evaluation) -> Table | None:
    """Several models at a glance, by what ranks; None where there are not several."""
    several = compared(found)
    rows = [[one.label, *_glance(found, one)] for one in several] if len(several) > 1 else []
    return _table("model|accuracy|kept|stability|flipped|decode|bytes", rows, names=1)


def _glance(found: Evaluation, model: ModelScore) -> list[str]:
    asked, dense = units(found, model), dense_of(found)
    counted, share = ranking(asked), retained(asked)
    after = sum(one.after for one in counted) / len(counted) if counted else None
    stable, flipped = [*steadiness(asked), "", ""][:2]
    return [
        "" if after is None else f"{after:.3f}",
        "" if share is None else f"{share:.0%}",
        stable.removeprefix("stability "),
        flipped.partition(" ")[0],
        "".join(speed(model)).removeprefix("decode ").partition(" ")[0],
        "".join(weight(dense, model)).removesuffix(" bytes") if dense else "",
    ]


def chain(found: Chain) -> Table:
    """What each step of dense -> shortened -> quantised leaves of the size and of the answers."""
    dense = found.links[0].bytes
    rows = [
        [
            one.name,
            "" if one.bytes is None else f"{one.bytes / 1e6:,.1f}",
            f"{one.bytes / dense:.0%}" if one.bytes and dense else "",
            verdict.perplexity(one.nats),
            *("" if value is None else f"{value:.3f}" for value in (one.accuracy, one.stability)),
        ]
        for one in found.links
    ]
    return Table(["model", "MB", "of dense", "perplexity", "accuracy", "stability"], rows, names=1)


def figures(found: Evaluation) -> Table | None:
    """What is no share of right answers, and of which more is not always better: a column per model."""
    values: dict[tuple[str, str], dict[str, str]] = {}
    for model in found.models:
        for one in model.tasks:
            others = {name: f"{value:.4g}" for name, value in (one.others or {}).items()}
            own = {} if is_share([one]) else {one.metric: f"{one.value:.4g} {_range(one.interval)}".strip()}
            for name, value in (own | others).items():
                values.setdefault((one.task, name), {})[model.label] = value
    labels = [model.label for model in found.models]
    rows = [[*keys, *(by_label.get(label, "") for label in labels)] for keys, by_label in values.items()]
    return _table("|".join(["task", "figure", *labels]), rows)


def answers(found: Evaluation) -> Table | None:
    """What became of each answer that was chosen, against the dense model."""
    pairs = by_task([(one, model) for model in compared(found) for one in model.stability or ()])
    head = "task|model|accuracy by PPL|difference|kept|above chance|same answer|flipped|p"
    faint = [number for number, (one, _) in enumerate(pairs) if not one.ranks]
    return _table(head, [[one.task, model.label, *_answers(one)] for one, model in pairs], faint)


P = TypeVar("P", Stability, Flips)


def by_task(pairs: list[tuple[P, ModelScore]]) -> list[tuple[P, ModelScore]]:
    """The same in the order of tasks, so that models stand below one another."""
    order = list(dict.fromkeys(one.task for one, _ in pairs))
    return sorted(pairs, key=lambda pair: order.index(pair[0].task))


def _answers(one: Stability) -> list[str]:
    return [
        f"{one.accuracy_before:.3f} → {one.accuracy_after:.3f}",
        _signed(one.difference_interval),
        _share(one.retained),
        _share(one.retained_above_chance),
        f"{one.same_answer:.1%}",
        f"{one.flips:.1%}",
        f"{one.mcnemar_p:.2g}",
    ]


def flips(found: Evaluation) -> Table | None:
    """What became of each answer that was written, against the dense model."""
    rows = [
        [
            *(one.task, model.label, f"{one.both + one.lost} → {one.both + one.gained} of {one.items}"),
            *(_signed(one.difference_interval), str(one.lost), str(one.gained), f"{one.flips:.1%}"),
            f"{one.mcnemar_p:.2g}",
        ]
        for one, model in by_task([(one, model) for model in compared(found) for one in model.flips or ()])
    ]
    return _table("task|model|right|difference|lost|gained|flipped|p", rows)


def texts(found: Evaluation) -> Table | None:
    names = dict.fromkeys(one.text for model in found.models for one in model.texts)
    rows = [
        _text(found, model, one) for name in names for model in found.models for one in model.texts if one.text == name
    ]
    return _table("text|model|perplexity|to dense|nats per token|bits per byte|tokens", rows)


def _text(found: Evaluation, model: ModelScore, one: TextScore) -> list[str]:
    dense = dense_of(found)
    ratios = {} if dense is None or dense is model else {row[0]: times(row[3]) for row in perplexities(dense, model)}
    loss = f"{one.nats:.4f}" + ("" if one.se is None else f" ± {one.se:.4f}")
    rest = [loss, f"{one.bits_per_byte:.4f}", f"{one.tokens:,}"]
    return [one.text, model.label, verdict.perplexity(one.nats), ratios.get(one.text, ""), *rest]


def timings(found: Evaluation) -> Table | None:
    timed = [(one.batch, model.label, one) for model in found.models for one in model.timings]
    rows = [
        [
            *(label, str(batch), f"{one.prompt} + {one.new}"),
            *(_rate(one.prefill), _ratio(one.prefill_ratio, one.prefill_interval)),
            *(_rate(one.decode), _ratio(one.decode_ratio, one.decode_interval)),
        ]
        for batch, label, one in sorted(timed, key=lambda row: row[0])
    ]
    return _table("model|batch|prompt + new|prefill, tokens/s|to dense|decode, tokens/s|to dense", rows, names=1)


def sizes(found: Evaluation) -> Table | None:
    rows = [
        [
            *(model.label, f"{model.size.parameters:,}", amount(model.size.weights)),
            "" if model.size.cache_per_token is None else amount(model.size.cache_per_token),
            "" if model.size.peak is None else amount(model.size.peak),
        ]
        for model in found.models
        if model.size
    ]
    return _table("model|parameters|weights|KV cache per token|peak memory", rows, names=1)


def writing(found: Evaluation) -> Table | None:
    rows = [
        [model.label, str(one.samples), f"{one.tokens:,}", *(f"{share:.0%}" for share in shares)]
        for model in found.models
        if (one := model.writing)
        for shares in [(one.looping, one.repeated, one.early, one.unended)]
    ]
    return _table("model|samples|tokens|go round in circles|repeated 4-grams|end at once|do not end", rows, names=1)


def amount(number: float) -> str:
    """Bytes as people say them, in steps of a thousand."""
    step = 0
    while number >= 999.5 and step < len(_UNITS) - 1:
        number, step = number / 1000, step + 1
    return f"{number:.3g} {_UNITS[step]}"


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _ratio(ratio: float | None, interval: Interval | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x {_range(interval, 2)}".strip()


def _range(interval: Interval | None, digits: int = 3) -> str:
    return "" if interval is None else f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _signed(interval: Interval) -> str:
    return f"[{interval[0]:+.3f}, {interval[1]:+.3f}]"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
