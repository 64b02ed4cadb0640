"""Evaluations made by hand, whose figures agree with one another."""

from __future__ import annotations

from scipy import stats

from llm_streamline.answers import Stability
from llm_streamline.evaluation import (
    EXACT,
    Evaluation,
    Flips,
    ModelScore,
    Size,
    TaskScore,
    TextScore,
    Timing,
    Writing,
    Written,
)


def task(name="questions", right=90, items=100, metric="accuracy", group=None) -> TaskScore:
    ends = stats.binomtest(right, items).proportion_ci(method="wilson")
    chosen = metric == "accuracy"
    return TaskScore(
        task=name,
        metric=metric,
        value=right / items,
        interval=(float(ends.low), float(ends.high)),
        items=items,
        right_by_ppl=right / items if chosen else None,
        measure="whole" if chosen else None,
        cut=0 if chosen else None,
        group=group,
    )


def stability(name="questions", both=85, lost=5, gained=1, neither=9, chance=0.25, effective=None) -> Stability:
    items = both + lost + gained + neither
    before, after = (both + lost) / items, (both + gained) / items
    p = float(stats.binomtest(both + lost, items, chance, alternative="greater").pvalue)
    effective = items if effective is None else effective
    return Stability(
        task=name,
        measure="whole",
        items=items,
        TP=both,
        FN=lost,
        FP=gained,
        TN=neither,
        stability=(both + neither) / items,
        stability_interval=((both + neither) / items - 0.04, min(1.0, (both + neither) / items + 0.04)),
        effective_items=effective,
        agreement=(both + neither) / items,
        same_answer=(both + neither) / items - 0.01,
        flips=(lost + gained) / items,
        mcnemar_p=float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0,
        accuracy_before=before,
        accuracy_after=after,
        difference_interval=(after - before - 0.02, after - before + 0.02),
        chance=chance,
        above_chance_p=p,
        retained=after / before,
        retained_above_chance=(after - chance) / (before - chance) if p < 0.05 else None,
        ranks=p < 0.05 and effective >= 0.2 * items,
    )


def text(nats=2.0, name="stories") -> TextScore:
    counts = {"tokens": 1000, "bytes": 4000, "documents": 10, "block": 256, "stride": 256, "blocked": True}
    return TextScore(text=name, nats=nats, se=0.01, perplexity=7.0, bits_per_byte=0.9, **counts)


def writing(looping=0.0, early=0.0, repeated=0.1, samples=12) -> Writing:
    return Writing(samples=samples, tokens=200, repeated=repeated, looping=looping, early=early, unended=0.5)


def written(words="the end", name="a", **changes) -> Written:
    values = {"task": "samples", "prompt": "Once <b>upon</b>", "tokens": 20, "ended": True, "repeated": 0.1}
    return Written(id=name, text=words, **{**values, **changes})


def timing(batch=1, ratio=None) -> Timing:
    speeds = {"prompt": 128, "new": 32, "rounds": 5, "prefill": 5000.0, "decode": 80.0}
    if ratio is None:
        return Timing(batch=batch, **speeds)
    ends = (ratio - 0.1, ratio + 0.1)
    found = {"prefill_ratio": ratio, "prefill_interval": ends, "decode_ratio": ratio, "decode_interval": ends}
    return Timing(batch=batch, **speeds, **found)


def size(weights=4_000_000) -> Size:
    return Size(parameters=weights // 4, weights=weights, cache_per_token=2048, peak=600_000_000)


def model(label: str, tasks=(), texts=(), **more) -> ModelScore:
    return ModelScore(
        label=label,
        model=f"folder/{label}",
        fingerprint="ab" * 32,
        compute="float32 on cpu",
        tasks=list(tasks),
        texts=list(texts),
        **more,
    )


def pair(lost=5, gained=1, before: dict | None = None, after: dict | None = None) -> Evaluation:
    """A dense model, right on 90 of 100 questions, and a saved one; `before` and `after` is what else they have."""
    dense = model("dense", [task(right=90)], **(before or {}))
    both = stability(both=90 - lost, lost=lost, gained=gained, neither=10 - gained)
    saved = model("saved", [task(right=90 - lost + gained)], stability=[both], **(after or {}))
    return Evaluation(against="dense", models=[dense, saved])


def of_a_run() -> Evaluation:
    """What a run finds: three models, of which the cut one was only asked, and one task at chance."""
    guessed, wrote = stability("guessed", 10, 12, 12, 16, 0.5), EXACT
    few = stability("few", 70, 5, 5, 20, effective=6)
    flips = Flips(
        task="recall", items=50, both=15, lost=15, gained=3, neither=17, flips=0.36, mcnemar_p=0.0075,
        difference_interval=(-0.4, -0.1),
    )  # fmt: skip
    asked = {"dense": (90, 22, 75, 30), "cut": (70, 20, 60, 10), "saved": (86, 22, 75, 18)}
    tasks = {
        label: [task(right=a), task("guessed", b, 50), task("few", c), task("recall", d, 50, wrote)]
        for label, (a, b, c, d) in asked.items()
    }
    dense = model(
        "dense", tasks["dense"], [text()], writing=writing(), written=(written(),), timings=(timing(),), size=size()
    )
    cut = model("cut", tasks["cut"], stability=[stability(both=68, lost=22, gained=2, neither=8)])
    saved = model(
        "saved",
        tasks["saved"],
        [text(2.5)],
        stability=[stability(), guessed, few],
        flips=[flips],
        writing=writing(looping=0.75),
        written=(written("on and on and on and on", repeated=0.8),),
        timings=(timing(ratio=1.31),),
        size=size(3_000_000),
    )
    warning = "The saved model keeps 96% of the accuracy, but <i>loops</i>."
    made = {"command": "llm-streamline compress <b>x</b>", "versions": {"torch": "9.9"}}
    return Evaluation(against="dense", models=[dense, cut, saved], warnings=(warning,), **made)


def of_groups() -> Evaluation:
    """Two models against a dense one on a group of three small tasks."""
    names = ("law", "art", "music")
    models = [model("big", [task(name, 30, 50, group="exam") for name in names])]
    for label, right in (("one", 29), ("two", 20)):
        both = [stability(name, right, 30 - right, 0, 20) for name in names]
        models.append(model(label, [task(name, right, 50, group="exam") for name in names], stability=both))
    return Evaluation(against="big", models=models)
