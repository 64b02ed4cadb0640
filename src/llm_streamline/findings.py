"""What an Evaluation says, in words: a sentence per model, and where its figures contradict one another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

from scipy import stats

from llm_streamline import verdict
from llm_streamline.answers import SIGNIFICANCE
from llm_streamline.comparison import CUT, SAVED, Unit, compared, dense_of, is_chosen, units
from llm_streamline.evaluation import Evaluation, ModelScore, Timing

FINE = 0.95  # share of the accuracy that has to be kept to pass for undamaged
WORSE_TEXT = 1.2  # times the dense model's perplexity
FLIPPED = 0.1  # share of the answers
_OVERFLOWS = 700  # nats
HIDDEN = 0.5  # of the flips: accuracy that moves by less hides them


def called(label: str) -> str:
    """A model's label as the subject of a sentence."""
    return f"the {label} model" if label in (CUT, SAVED) else label


def capital(text: str) -> str:
    """A model's own name keeps its case."""
    return "T" + text[1:] if text.startswith("the ") else text


def sentences(found: Evaluation) -> list[str]:
    """What each model keeps of the dense one, in one sentence each."""
    return [sentence(found, model) for model in compared(found)]


def sentence(found: Evaluation, model: ModelScore) -> str:
    """One model against the dense one, by the figures that rank. Errors: ValueError without a dense model."""
    dense = dense_of(found)
    if dense is None:
        raise ValueError("nothing to compare with")
    asked = units(found, model)
    parts = [
        kept_accuracy(asked) or kept_text(dense, model) or unknown(asked),
        *steadiness(asked),
        *written(asked),
        *speed(model),
        *weight(dense, model),
    ]
    return f"{capital(called(model.label))} {', '.join(parts)}."


def ranking(asked: Sequence[Unit]) -> list[Unit]:
    """Multiple choice in which the dense model is above chance: what people mean by accuracy."""
    return [unit for unit in asked if is_chosen(unit.dense) and unit.ranks]


def steady(asked: Sequence[Unit]) -> list[Unit]:
    """Tasks whose stability ranks."""
    return [unit for unit in asked if unit.stability and not unit.doubt]


def retained(asked: Sequence[Unit]) -> float | None:
    """Share of the dense model's accuracy that is kept, of the means over what ranks."""
    counted = ranking(asked)
    return fmean(u.after for u in counted) / fmean(u.before for u in counted) if counted else None


def kept_accuracy(asked: Sequence[Unit]) -> str:
    """Empty where no task ranks."""
    counted = ranking(asked)
    if not counted:
        return ""
    before, after = fmean(u.before for u in counted), fmean(u.after for u in counted)
    chance = fmean(u.chance or 0.0 for u in counted)
    over = f" over {len(counted)} tasks" if len(counted) > 1 else ""
    above = f"; {(after - chance) / (before - chance):.0%} above chance" if chance else ""
    return f"keeps {after / before:.0%} of the dense model's accuracy ({after:.2f} of {before:.2f}{over}{above})"


def unknown(asked: Sequence[Unit]) -> str:
    """What is said where neither accuracy nor perplexity says anything."""
    guessed = any(is_chosen(unit.dense) for unit in asked)
    return "cannot be judged by accuracy (the dense model is at chance)" if guessed else "was asked nothing that ranks"


def kept_text(dense: ModelScore, model: ModelScore) -> str:
    """Perplexity, where accuracy says nothing."""
    pairs = [(name, ratio) for name, _, _, ratio in perplexities(dense, model)]
    told = " and ".join(f"{times(ratio)} the perplexity on {name}" for name, ratio in pairs[:2])
    return f"has {told}" if told else ""


def times(ratio: float) -> str:
    return f"{ratio:.2f} times" if ratio < 100 else "over 100 times"


def steadiness(asked: Sequence[Unit]) -> Iterator[str]:
    counted = steady(asked)
    if counted:
        yield f"stability {fmean(u.stable for u in counted):.2f}"
        yield f"{sum(u.flipped for u in counted) / sum(u.items for u in counted):.0%} of answers flipped"


def written(asked: Sequence[Unit]) -> Iterator[str]:
    counted = [unit for unit in asked if unit.ranks and not is_chosen(unit.dense)]
    if counted:
        yield f"written answers right {fmean(u.after for u in counted):.2f} of {fmean(u.before for u in counted):.2f}"


def speed(model: ModelScore) -> Iterator[str]:
    """Writing at the smallest batch, which is what one reader waits for."""
    one = first_timing(model)
    if one and one.decode_ratio is not None:
        low, high = one.decode_interval or (one.decode_ratio, one.decode_ratio)
        unsure = " (no measurable difference)" if low <= 1 <= high else ""
        yield f"decode {one.decode_ratio:.2f}x as fast{unsure}"


def first_timing(model: ModelScore) -> Timing | None:
    return min(model.timings, key=lambda one: one.batch, default=None)


def weight(dense: ModelScore, model: ModelScore) -> Iterator[str]:
    if dense.size and model.size:
        fewer = 1 - model.size.weights / dense.size.weights
        if abs(fewer) >= 0.005:
            yield f"{abs(fewer):.0%} {'fewer' if fewer > 0 else 'more'} bytes"


def perplexities(dense: ModelScore, model: ModelScore) -> Iterator[tuple[str, float, float, float]]:
    """Of each text both have read: its name, the two losses, and how many times the perplexity is the dense one's."""
    before = {one.text: one.nats for one in dense.texts}
    for one in model.texts:
        if one.text in before:
            excess = one.nats - before[one.text]
            ratio = math.exp(excess) if excess < _OVERFLOWS else math.inf  # of nan too
            yield one.text, before[one.text], one.nats, ratio


def warnings(found: Evaluation) -> tuple[str, ...]:
    """A line for each model that accuracy calls fine while something else does not, which it names."""
    dense = dense_of(found)
    if dense is None:
        return ()
    lines = []
    for model in compared(found):
        asked = units(found, model)
        fine, reasons = seems_fine(asked), [*objections(dense, model, asked)]
        if fine and reasons:
            lines.append(f"{capital(called(model.label))} {fine}, but {'; '.join(reasons)}.")
    return tuple(lines)


def seems_fine(asked: Sequence[Unit]) -> str:
    """Why one who sees accuracy alone would take the model; empty where it ranks nothing or tells of damage."""
    share = retained(asked)
    if share is not None and share >= FINE:
        return f"keeps {share:.0%} of the accuracy"
    counted = [unit for unit in ranking(asked) if unit.stability]
    if counted and len(counted) == len(ranking(asked)) and all(unit.within_chance for unit in counted):
        return "loses no accuracy that can be told from chance"
    return ""


def objections(dense: ModelScore, model: ModelScore, asked: Sequence[Unit]) -> Iterator[str]:
    for name, before, after, ratio in perplexities(dense, model):
        if ratio > WORSE_TEXT:
            figures = f"{verdict.perplexity(after)} against {verdict.perplexity(before)}"
            yield f"its perplexity on {name} is {times(ratio)} the dense model's ({figures})"
    yield from writing(dense, model)
    for one in model.flips or ():
        if one.lost > one.gained and one.mcnemar_p < SIGNIFICANCE:
            answers = f"{one.lost} of {one.items} written answers on {one.task} and gains {one.gained}"
            yield f"it loses {answers} (McNemar p {one.mcnemar_p:.2g})"
    for unit in steady(asked):
        share = unit.flipped / unit.items
        if share >= FLIPPED and abs(unit.moved) < HIDDEN * share:
            yield f"{share:.0%} of its answers on {unit.name} flipped while accuracy moved by {abs(unit.moved):.1%}"


def writing(dense: ModelScore, model: ModelScore) -> Iterator[str]:
    before, after = dense.writing, model.writing
    if before is None or after is None:
        return
    for then, now, words in (
        (before.looping, after.looping, "of its samples go round in circles"),
        (before.early, after.early, "of its samples end at once"),
    ):
        if _more((then, before.samples), (now, after.samples)):
            yield f"{now:.0%} {words} (dense: {then:.0%})"


def _more(then: tuple[float, int], now: tuple[float, int]) -> bool:
    """Whether the second share, of so many, is significantly above the first: Fisher's exact test, one-sided."""
    (share, count), (later, of) = then, now
    odd, even = round(later * of), round(share * count)
    return bool(stats.fisher_exact([[odd, of - odd], [even, count - even]], "greater").pvalue < SIGNIFICANCE)
