"""What a replacement is trained to lower: one loss, or a curriculum of several by their share of the training tokens.

    loss       = part | part ":" share *("," part ":" share)
    part       = "nmse" | "mse" | "cosine" | "lm" | ("kl" | "kl:" K) ["+" [weight] "lm"]
    share, K   = a number above 0 and below 1; a whole number of 2 or more. All shares add up to 1.
    weight     = a number above 0, 1 where it is left out: how many times the second loss counts

Nothing here needs torch, so that a recipe can be read without it. `losses.py` computes the losses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

from llm_streamline.errors import UserError

STATES = ("nmse", "mse", "cosine")  # of the hidden states at the window's end
ABOVE = ("kl", "lm")  # of the logits, through the frozen layers above the window
# defaults, as measured (docs/decisions/0009-losses.md, 0010-healing.md)
LOSS, STATES_ONLY = "nmse:0.3,kl:0.7", "nmse"
HEALING, LOGITS_HEALING = "nmse:0.3,kl+0.1lm:0.7", "kl+0.1lm"
WHOLE = Fraction(1)
TURNS = 5  # passes after the first
_SHARE = re.compile(r"(.+):(0?\.\d+)")
_KL = re.compile(r"kl(?::(\d+))?(?:(\+)(\d+|\d*\.\d+)?lm)?")


@dataclass(frozen=True)
class Part:
    """One loss: its kind; for `kl:K` how many of the dense model's likeliest tokens it looks at (0: all).

    With `text` the loss of the text's next token counts beside KL, so many times.
    """

    kind: str
    top: int = 0
    text: float = 0.0

    @property
    def above(self) -> bool:
        """Whether it needs the layers above the window."""
        return self.kind in ABOVE

    def __str__(self) -> str:
        named = f"{self.kind}:{self.top}" if self.top else self.kind
        weight = "" if self.text == 1 else f"{self.text:g}"
        return f"{named}+{weight}lm" if self.text else named


@dataclass(frozen=True)
class Objective:
    """The losses in their order, with the share of the training tokens at which each ends."""

    parts: tuple[Part, ...]
    ends: tuple[Fraction, ...] = (WHOLE,)

    def at(self, done: int, total: int) -> Part:
        """The loss of the next step, after `done` of `total` training tokens."""
        return next(part for part, end in zip(self.parts, self.ends, strict=True) if done < end * total)

    @property
    def measure(self) -> Part:
        """The last loss: what training is to end with, and so what every validation is measured by."""
        return self.parts[-1]

    @property
    def above(self) -> bool:
        return any(part.above for part in self.parts)

    def schedule(self, tokens: Sequence[int]) -> list[Part]:
        """The loss of each step, of which the number of tokens is given."""
        *before, total = accumulate(tokens, initial=0)
        return [self.at(done, total) for done in before]

    def describe(self, tokens: Sequence[int]) -> str:
        """Which steps each loss has, for people."""
        *before, total = accumulate(tokens, initial=0)
        ends = [sum(done < end * total for done in before) for end in self.ends]
        spans = [_span(*span) for span in pairwise([0, *ends])]
        said = ", ".join(f"{part} {span}" for part, span in zip(self.parts, spans, strict=True))
        return f"the loss is {said}; every validation is by {self.measure}"

    def check(self, vocabulary: int, flag: str = "--loss") -> None:
        """Errors: UserError for a kl:K of more tokens than there are."""
        for part in self.parts:
            if part.top > vocabulary:
                raise UserError(f"{flag} {part} is over more tokens than the model's {vocabulary}; give kl, or fewer.")


def _span(begin: int, end: int) -> str:
    return f"in steps {begin + 1} to {end}" if end > begin else "in no step, as its share is too small"


def parse_objective(text: str) -> Objective:
    """'mse:0.6,kl:0.4' -> its parts. Errors: ValueError, which says what is wrong."""
    pieces = text.split(",")
    if len(pieces) == 1:
        if _SHARE.fullmatch(text):
            raise ValueError("a share is for one of several losses; write the loss alone")
        return Objective((_part(text),))
    parts, ends = [], [Fraction(0)]
    for piece in pieces:
        match = _SHARE.fullmatch(piece)
        if not match or not Fraction(match[2]):
            raise ValueError(f"{piece!r} has no share between 0 and 1; write for example {_named(piece)}:0.5")
        parts.append(_part(match[1]))
        ends.append(ends[-1] + Fraction(match[2]))
    if ends[-1] != WHOLE:
        raise ValueError(f"the shares add up to {float(ends[-1]):g}; they have to add up to 1")
    return Objective(tuple(parts), tuple(ends[1:]))


def _named(piece: str) -> str:
    """The loss that a part of a curriculum seems to name."""
    try:
        _part(piece)
    except ValueError:
        return piece.partition(":")[0] or "kl"
    return piece


def _part(text: str) -> Part:
    if text in (*STATES, *ABOVE):
        return Part(text)
    match = _KL.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no loss; there are {', '.join((*STATES, *ABOVE))}, kl:100 and kl+lm")
    top, beside, weight = match.groups()
    if top is not None and int(top) < 2:
        raise ValueError(f"{text} compares fewer than two tokens; write kl:2 or more, or kl for all")
    if weight is not None and not float(weight):
        raise ValueError(f"{text} gives the text no weight; write kl, or a number above 0")
    return Part("kl", int(top or 0), float(weight or 1) if beside else 0.0)


def passes_to_solve(loss: str) -> int:
    """How often the text is read for the linear map of a loss of states, which all but cosines give in closed form."""
    return 1 + TURNS if loss == "cosine" else 1


def check_loss(text: str | None) -> str | None:
    """Errors: ValueError for what is no loss."""
    if text is not None:
        parse_objective(text)
    return text
