"""One question as one model answered it, and two models' answers compared."""

from __future__ import annotations

from typing import Literal

from llm_streamline.records import Record

Measure = Literal["whole", "choice"]  # what an item's PPL is of: query and choice, or the choice alone
SIGNIFICANCE = 0.05
FEWEST_EFFECTIVE = 0.2  # of the items: below this a few of them decide a stability


class Item(Record):
    """One question as one model answered it; `ppl` per choice, `prediction` and `gold` named as the file names them.

    `right`, which stability counts, is by `prediction`: in our items, the choice of the lowest PPL. `likeliest_right`,
    which accuracy counts as lm-eval's `acc` does, is by `log_likelihoods`: of each choice given the query, summed, in
    nats. Items from files of other tools may lack these.
    """

    task: str
    id: str
    measure: Measure
    ppl: list[float]
    prediction: str
    gold: str
    log_likelihoods: list[float] | None = None
    choice_bytes: list[int] | None = None

    @property
    def right(self) -> bool:
        return self.prediction == self.gold

    @property
    def likeliest_right(self) -> bool | None:
        scores = self.log_likelihoods
        return None if scores is None else str(scores.index(max(scores))) == self.gold


class Stability(Record):
    """One task. Shares lie in 0..1; intervals are 95 %, by paired bootstrap over items.

    `effective_items` is 1 / sum(w^2) of the weights; `ranks` is False where it is below a fifth of the items, or where
    the first model is not significantly above chance: such figures are shown and decide nothing.
    """

    task: str
    measure: Measure
    items: int
    TP: int
    FN: int
    FP: int
    TN: int
    stability: float
    stability_interval: tuple[float, float]
    effective_items: float
    agreement: float
    same_answer: float
    flips: float
    mcnemar_p: float
    accuracy_before: float
    accuracy_after: float
    difference_interval: tuple[float, float]
    chance: float
    above_chance_p: float
    retained: float | None
    retained_above_chance: float | None
    ranks: bool
