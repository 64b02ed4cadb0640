"""Evaluation -> what its sections on a page show: bars in percent of their tracks, tables, samples.

The run's page and the page of `evaluate` show the same board; which models there are is the evaluation's matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from llm_streamline import tables
from llm_streamline.comparison import (
    AT_CHANCE,
    CUT,
    Scored,
    Unit,
    above_chance,
    chance,
    compared,
    dense_of,
    gathered,
    interval,
    is_share,
    mean,
    pair,
    stabilities,
    units,
)
from llm_streamline.evaluation import Evaluation, Interval, ModelScore, Timing, Written
from llm_streamline.findings import first_timing, ranking, steady
from llm_streamline.tables import Table, amount

SHOWN = 12  # samples
LONG = 1500  # characters of a prompt or a text, beyond which it is cut
COLOURS = 4  # of models besides the dense one, before they repeat
WIDEST = 20  # characters of a label, beyond which it takes several lines


@dataclass(frozen=True)
class Bar:
    """`length` and the ends of the `whisker` in percent of the track."""

    label: str
    kind: str
    length: float
    whisker: Interval | None
    value: str
    range: str


@dataclass(frozen=True)
class Row:
    """A task, or a group with its `members`; `doubt` says why it ranks nothing, `mark` is where chance or 1 lies."""

    name: str
    note: str
    doubt: str
    mark: float | None
    bars: list[Bar]
    members: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """A prompt and what each model made of it: label, kind, text, and what is odd about it."""

    name: str
    prompt: str
    written: list[tuple[str, str, str, list[str]]]


@dataclass(frozen=True)
class Board:
    """Everything that an evaluation shows; what was not measured is empty or None."""

    against: str | None
    legend: list[tuple[str, str]]
    width: int
    accuracy: list[Row]
    figures: Table | None
    stability: list[Row]
    answers: Table | None
    flips: Table | None
    texts: Table | None
    windows: str
    speed: list[Row]
    timings: Table | None
    sizes: Table | None
    writing: Table | None
    samples: list[Sample]
    more_samples: int


def board(found: Evaluation) -> Board:
    kinds = colours(found)
    shown = samples(found, kinds)
    return Board(
        against=found.against,
        legend=list(kinds.items()),
        width=min(WIDEST, max(map(len, kinds), default=0)),
        accuracy=accuracy_rows(found, kinds),
        figures=tables.figures(found),
        stability=stability_rows(found, kinds),
        answers=tables.answers(found),
        flips=tables.flips(found),
        texts=tables.texts(found),
        windows=windows(found),
        speed=speed_rows(found, kinds),
        timings=tables.timings(found),
        sizes=tables.sizes(found),
        writing=tables.writing(found),
        samples=shown[:SHOWN],
        more_samples=len(shown[SHOWN:]),
    )


def colours(found: Evaluation) -> dict[str, str]:
    """By label: the dense model and the merely cut one look the same on every page."""
    rest = [one.label for one in found.models if one.label not in (found.against, CUT)]
    others = {label: f"m{number % COLOURS}" for number, label in enumerate(rest)}
    return {one.label: others.get(one.label, "cut" if one.label == CUT else "dense") for one in found.models}


def accuracy_rows(found: Evaluation, kinds: dict[str, str]) -> list[Row]:
    """Every task whose figure is a share of right answers, by group where it has one."""
    first = dense_of(found) or next(iter(found.models), None)
    asked = gathered([one for one in first.tasks if is_share([one])]) if first else {}
    rows = []
    for name, tasks in asked.items():
        row = _accuracy_row(found, kinds, name, [one.task for one in tasks])
        if tasks[0].group:
            row.members.extend(_accuracy_row(found, kinds, one.task, [one.task]) for one in tasks)
        rows.append(row)
    return rows


def _accuracy_row(found: Evaluation, kinds: dict[str, str], name: str, tasks: Sequence[str]) -> Row:
    scores = {model.label: [one for one in model.tasks if one.task in tasks] for model in found.models}
    scores = {label: scored for label, scored in scores.items() if len(scored) == len(tasks)}
    dense = scores.get(found.against or "")
    known = next((s for model in found.models if (s := stabilities(model, tasks))), ())
    guess = chance(dense or next(iter(scores.values())), known)
    guessed = bool(dense) and guess is not None and not above_chance(dense or (), guess)
    bars = [_bar(label, kinds[label], mean(scored), interval(scored)) for label, scored in scores.items()]
    mark = round(100 * guess, 2) if guess else None
    return Row(name, _note(next(iter(scores.values()))), AT_CHANCE if guessed else "", mark, bars)


def _note(scores: Scored) -> str:
    """What the figure is of."""
    items = f"{sum(one.items for one in scores):,} items"
    several = f"mean of {len(scores)} tasks, " if len(scores) > 1 else ""
    metric = "" if scores[0].metric == "accuracy" else f", {scores[0].metric}"
    lost = sum(one.cut or 0 for one in scores)
    cut = f", {lost:,} cut at the front" if lost else ""
    otherwise = f"; {scores[0].note}" if len(scores) == 1 and scores[0].note else ""
    return f"{several}{items}{metric}{cut}{otherwise}"


def _bar(label: str, kind: str, value: float, ends: Interval | None, longest: float = 1.0, unit: str = "") -> Bar:
    """A bar of a value between 0 and `longest`."""
    at = lambda number: round(100 * min(max(number / longest, 0.0), 1.0), 2)  # noqa: E731
    digits = 2 if unit else 3
    told = f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else ""
    whisker = (at(ends[0]), at(ends[1])) if ends else None
    return Bar(label, kind, at(value), whisker, f"{value:.{digits}f}{unit}", told)


def stability_rows(found: Evaluation, kinds: dict[str, str]) -> list[Row]:
    """Every task whose answers are chosen, by group where it has one."""
    dense = dense_of(found)
    asked = gathered([one for one in dense.tasks if one.measure]) if dense else {}
    rows = []
    for name, tasks in asked.items():
        row = _stability_row(found, kinds, name, tasks)
        if row and tasks[0].group:
            row.members.extend(member for one in tasks if (member := _stability_row(found, kinds, one.task, [one])))
        rows += [row] if row else []
    return rows


def _stability_row(found: Evaluation, kinds: dict[str, str], name: str, tasks: Scored) -> Row | None:
    pairs = {model.label: pair(name, tasks, model) for model in compared(found)}
    pairs = {label: unit for label, unit in pairs.items() if len(unit.stability) == len(tasks)}
    if not pairs:
        return None
    bars = [_bar(label, kinds[label], unit.stable, _stable_ends(unit)) for label, unit in pairs.items()]
    unit = next(iter(pairs.values()))
    note = f"{sum(one.effective_items for one in unit.stability):,.0f} effective of {unit.items:,} items"
    return Row(name, note, unit.doubt, None, bars)


def _stable_ends(unit: Unit) -> Interval:
    """Of one task its own interval; of several, what their widths make of the mean's."""
    widths = [(one.stability_interval[1] - one.stability_interval[0]) / 2 for one in unit.stability]
    if len(widths) == 1:
        return unit.stability[0].stability_interval
    around = math.hypot(*widths) / len(widths)
    return max(0.0, unit.stable - around), min(1.0, unit.stable + around)


def speed_rows(found: Evaluation, kinds: dict[str, str]) -> list[Row]:
    """How many times as fast as the dense model, reading and writing, at every batch size."""
    timed = [(model, one) for model in compared(found) for one in model.timings if one.decode_ratio is not None]
    ends = [end for _, one in timed for end in (*_reading(one)[1], *_writing(one)[1])]
    longest = max([*ends, 1.0]) * 1.05
    rows = []
    for batch in sorted({one.batch for _, one in timed}):
        for what, figure in (("decode", _writing), ("prefill", _reading)):
            bars = [
                _bar(model.label, kinds[model.label], *figure(one), longest, "x")
                for model, one in timed
                if one.batch == batch
            ]
            rows.append(Row(f"{what}, {at_once(batch)}", "", "", round(100 / longest, 2), bars))
    return rows


def at_once(batch: int) -> str:
    return f"{batch} sequences at once" if batch > 1 else "one sequence"


def _reading(one: Timing) -> tuple[float, Interval]:
    ratio = one.prefill_ratio or 0.0
    return ratio, one.prefill_interval or (ratio, ratio)


def _writing(one: Timing) -> tuple[float, Interval]:
    ratio = one.decode_ratio or 0.0
    return ratio, one.decode_interval or (ratio, ratio)


def windows(found: Evaluation) -> str:
    """How texts were read."""
    steps = {(one.block, one.stride, one.blocked): None for model in found.models for one in model.texts}
    return "; ".join(
        f"{block} tokens at once, {'blocked' if blocked else f'sliding by {stride}'}"
        for block, stride, blocked in steps
    )


def samples(found: Evaluation, kinds: dict[str, str]) -> list[Sample]:
    """Prompts in their order, each with what every model that was given it wrote."""
    prompts = {(one.task, one.id): one.prompt for model in found.models for one in model.written}
    texts = {(model.label, one.task, one.id): one for model in found.models for one in model.written}
    return [
        Sample(
            name,
            _short(prompt),
            [
                (label, kind, _short(texts[label, task, name].text.strip()), oddities(texts[label, task, name]))
                for label, kind in kinds.items()
                if (label, task, name) in texts
            ],
        )
        for (task, name), prompt in prompts.items()
    ]


def _short(text: str) -> str:
    return text if len(text) <= LONG else f"{text[:LONG]}…"


def oddities(one: Written) -> list[str]:
    """What a reader should see at once."""
    marks = {"goes round in circles": one.loops, "ends at once": one.early, "wrong": one.exact is False}
    return [words for words, true in marks.items() if true]


def tiles(found: Evaluation, model: ModelScore) -> list[tuple[str, str, str]]:
    """What, how much, and what that is: the first task that ranks, speed and size against the dense model."""
    asked, dense = units(found, model), dense_of(found)
    told = [accuracy_tile(found, unit) for unit in ranking(asked)[:1]]
    told += [("stability", f"{unit.stable:.2f}", _stability_words(unit)) for unit in steady(asked)[:1]]
    one = first_timing(model)
    if one and one.decode_ratio is not None:
        reading = f"; prefill {one.prefill_ratio:.2f}x" if one.prefill_ratio is not None else ""
        told.append(("speed", f"{one.decode_ratio:.2f}x", f"decode, {at_once(one.batch)}{reading}"))
    if dense and dense.size and model.size:
        change = model.size.weights / dense.size.weights - 1
        told.append(("weights", f"{change:+.1%}", f"{amount(dense.size.weights)} → {amount(model.size.weights)}"))
    return told


def accuracy_tile(found: Evaluation, unit: Unit) -> tuple[str, str, str]:
    cut = cut_value(found, unit)
    merely = "" if cut is None else f"; {cut:.2f} merely cut"
    return "accuracy", f"{unit.before:.2f} → {unit.after:.2f}", f"on {unit.name}{merely}"


def cut_value(found: Evaluation, unit: Unit) -> float | None:
    """What a run's merely cut model has in the same task; None where there is none, or no such task."""
    others = [other for model in found.models if model.label == CUT for other in units(found, model)]
    return next((other.after for other in others if other.name == unit.name), None)


def _stability_words(unit: Unit) -> str:
    return f"on {unit.name}; {unit.flipped / unit.items:.0%} of answers flipped"
