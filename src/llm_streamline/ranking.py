"""What windows of one length cost, by every score: the record that the ranking stage hands to the choice."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from llm_streamline.records import Record, Window

By = Literal["cosine", "relative", "loss", "kl", "replaceability", "patched"]
RANKING = "ranking.json"
NAMES: dict[By, str] = {
    "cosine": "cosine",
    "relative": "relative change",
    "loss": "loss after deletion",
    "kl": "KL after deletion",
    "replaceability": "share that no linear map explains",
    "patched": "loss with a linear map in its place",
}
HALVINGS = 1000  # of the sequences, for each score's confidence
SHORTLIST = 4  # windows that linear maps are fitted for
SCORES: tuple[By, ...] = get_args(By)


class Score(Record):
    """A mean over sequences, or a ratio of two sums over them, with its standard error over sequences."""

    value: float
    se: float


class Candidate(Record):
    """One window's scores, in nats per token where nothing else is said; None is what was not measured for it.

    `cosine` is the paper's Eq. 1; `relative` the mean of ||x_out - x_in|| / ||x_in||, for the states x that enter and
    leave the window; `loss` and `kl` are those of the model without the window, against the text and the dense model.
    `replaceability` is the share of x_out - x_in that the best linear map of x_in leaves unexplained, and `patched`
    and `patched_kl` are the loss and KL of the model with that map in the window's place; each sequence is judged by
    a map fitted on the half of the sequences that it is not in.
    """

    window: Window
    cosine: Score
    relative: Score
    loss: Score
    kl: Score
    replaceability: Score | None = None
    patched: Score | None = None
    patched_kl: Score | None = None

    def of(self, by: By) -> Score | None:
        found: Score | None = getattr(self, by)
        return found


class Winner(Record):
    """The window that a score would take, and how surely.

    `confidence` is the share of random halves of the sequences in which the same window wins; maps are not fitted
    anew. `margin` is by how much the runner-up is worse, with the standard error of that difference.
    """

    window: Window
    confidence: float
    runner_up: Window | None = None
    margin: Score | None = None


class Ranking(Record):
    """Candidates in the order of their layers, and what each score makes of them; `by` is the one that decided."""

    by: By
    sequences: int
    tokens: int
    dense: Score
    candidates: list[Candidate]
    winners: dict[By, Winner]

    @property
    def winner(self) -> Winner:
        return self.winners[self.by]

    def of(self, window: Window) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.window == window)

    def judged(self) -> list[Candidate]:
        """The candidates that the deciding score was measured for."""
        return [candidate for candidate in self.candidates if candidate.of(self.by) is not None]

    def others(self) -> dict[By, Window]:
        """What scores that disagree with the decision would have taken."""
        chosen = self.winner.window
        return {by: found.window for by, found in self.winners.items() if found.window != chosen}


def ranking_in(folder: Path) -> Ranking | None:
    """What a run or an analysis has kept in its folder."""
    return Ranking.read(folder / RANKING) if (folder / RANKING).exists() else None


def disagreement(ranking: Ranking) -> str:
    """Which scores would have taken which other windows."""
    others = ranking.others()
    if not others:
        return "all scores take it"
    named: dict[Window, list[str]] = {}
    for by, window in others.items():
        named.setdefault(window, []).append(NAMES[by])
    parts = [f"{' and '.join(names)} would have taken {window}" for window, names in named.items()]
    return ", ".join(parts)


def table(ranking: Ranking) -> tuple[list[str], list[list[str]]]:
    """Head and rows of words: a line per candidate; * is what a score would take, empty what was not measured."""
    shown = [by for by in SCORES if by in ranking.winners]
    rows = []
    for one in ranking.candidates:
        row = [f"{one.window}{' (taken)' if one.window == ranking.winner.window else ''}"]
        for by in shown:
            score = one.of(by)
            star = " *" if ranking.winners[by].window == one.window else ""
            row.append(f"{score.value:.4f} ± {score.se:.4f}{star}" if score else "")
        rows.append(row)
    return ["window", *(NAMES[by] for by in shown)], rows


def confidences(ranking: Ranking) -> str:
    """How surely each score takes what it takes, by random halves of the sequences."""
    found = (f"{NAMES[by]} takes {one.window} in {one.confidence:.0%}" for by, one in ranking.winners.items())
    return f"Of {HALVINGS} random halves of the sequences: {', '.join(found)}"
