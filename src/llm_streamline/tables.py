"""Evaluation -> tables of words for its page: a line per task and model, in the evaluation's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_streamline import verdict
from llm_streamline.comparison import compared, dense_of, is_share, units
from llm_streamline.evaluation import Evaluation, Interval, ModelScore
from llm_streamline.findings import (
    perplexities,
    ranking,
    retained,
    speed,
    steadiness,
    times,
    weight,
)
from llm_streamline.records import Stability

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
    return Table(head.split("|"), rows, frozenset(faint), names) if rows else None


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


def figures(found: Evaluation) -> Table | None:
    """What lm-eval measures in its own way, of which more is not always better."""
    rows = []
    for model in found.models:
        for one in model.tasks:
            if not is_share([one]):
                rows.append(
                    [one.task, model.label, one.metric, f"{one.value:.4g}", _range(one.interval), f"{one.items:,}"]
                )
            for name, value in (one.others or {}).items():
                rows.append([one.task, model.label, name, f"{value:.4g}", "", f"{one.items:,}"])
    return _table("task|model|figure|value|95 %|items", rows, names=3)


def answers(found: Evaluation) -> Table | None:
    """What became of each answer that was chosen, against the dense model."""
    pairs = [(one, model) for model in compared(found) for one in model.stability or ()]
    head = "task|model|accuracy by PPL|difference|kept|above chance|same answer|flipped|McNemar p|right before / after"
    faint = [number for number, (one, _) in enumerate(pairs) if not one.ranks]
    return _table(head, [[one.task, model.label, *_answers(one)] for one, model in pairs], faint)


def _answers(one: Stability) -> list[str]:
    return [
        f"{one.accuracy_before:.3f} → {one.accuracy_after:.3f}",
        _signed(one.difference_interval),
        _share(one.retained),
        _share(one.retained_above_chance),
        f"{one.same_answer:.1%}",
        f"{one.flips:.1%}",
        f"{one.mcnemar_p:.2g}",
        f"{one.TP} / {one.FN} lost / {one.FP} gained",
    ]


def flips(found: Evaluation) -> Table | None:
    """What became of each answer that was written, against the dense model."""
    rows = [
        [
            *(one.task, model.label, f"{one.both + one.lost} → {one.both + one.gained} of {one.items}"),
            *(_signed(one.difference_interval), str(one.lost), str(one.gained), f"{one.flips:.1%}"),
            f"{one.mcnemar_p:.2g}",
        ]
        for model in compared(found)
        for one in model.flips or ()
    ]
    return _table("task|model|right|difference|lost|gained|flipped|McNemar p", rows)


def texts(found: Evaluation) -> Table | None:
    dense = dense_of(found)
    rows = []
    for model in found.models:
        against = {name: times(ratio) for name, _, _, ratio in perplexities(dense, model)} if dense else {}
        for one in model.texts:
            error = "" if one.se is None else f" ± {one.se:.4f}"
            ratio = "" if model is dense else against.get(one.text, "")
            loss = f"{one.nats:.4f}{error}"
            rest = [f"{one.bits_per_byte:.4f}", f"{one.tokens:,}"]
            rows.append([one.text, model.label, verdict.perplexity(one.nats), ratio, loss, *rest])
    return _table("text|model|perplexity|the dense one's|nats per token|bits per byte|tokens", rows)


def timings(found: Evaluation) -> Table | None:
    rows = [
        [
            *(model.label, str(one.batch), f"{one.prompt} + {one.new}"),
            *(_rate(one.prefill), _ratio(one.prefill_ratio, one.prefill_interval)),
            *(_rate(one.decode), _ratio(one.decode_ratio, one.decode_interval)),
        ]
        for model in found.models
        for one in sorted(model.timings, key=lambda one: one.batch)
    ]
    return _table(
        "model|batch|tokens read + written|reading, tokens/s|to dense|writing, tokens/s|to dense", rows, names=1
    )


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
