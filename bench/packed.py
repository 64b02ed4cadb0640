"""Answers to many questions where the choices of one share a forward of their query: half the time.

A question's choices follow its query in one sequence, and none sees another (a mask of four dimensions, which layers
with attention over all tokens take). Tests hold it against `scoring.questions.answers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from llm_streamline.answers import Item
from llm_streamline.scoring.perplexity import FORWARD_TOKENS
from llm_streamline.scoring.questions import Question, Row, item_of


class Packed(NamedTuple):
    """The tokens that all choices' texts begin with, and those that each adds."""

    shared: list[int]
    added: list[list[int]]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Packed:
        length = shared_length(rows)
        return cls(rows[0].ids[:length], [row.ids[length:] for row in rows])

    def laid_out(self) -> Tensor:
        """(T, 3): ids, the place of each in its text, and the choice it is of, 0 for what is shared."""
        length = len(self.shared)
        parts = [(self.shared, 0, 0), *((own[:-1], length, number) for number, own in enumerate(self.added, start=1))]
        return torch.tensor([(token, start + at, of) for ids, start, of in parts for at, token in enumerate(ids)])

    def losses(self, logits: Tensor) -> list[Tensor]:
        """Per choice those of all tokens of its text but the first, in nats, from logits (T, V)."""
        start = length = len(self.shared)
        found, before = [], cross_entropy(logits[: length - 1], torch.tensor(self.shared[1:]), reduction="none")
        for own in self.added:
            told = torch.cat([logits[length - 1 : length], logits[start : start + len(own) - 1]])
            found.append(torch.cat([before, cross_entropy(told, torch.tensor(own), reduction="none")]))
            start += len(own) - 1
        return found


def shared_length(rows: Sequence[Row]) -> int:
    """How many tokens all choices' texts begin with, but for the last of the shortest."""
    texts = [row.ids for row in rows]
    same = takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    return min(sum(1 for _ in same), min(map(len, texts)) - 1)


def packable(rows: Sequence[Row]) -> bool:
    """Whether there is something to share, and nothing was cut to fit the context."""
    return shared_length(rows) > 1 and not any(row.cut for row in rows)


@torch.no_grad()
def packed_answers(
    model: PreTrainedModel, questions: Sequence[Question], rows: Sequence[Sequence[Row]], task: str
) -> list[Item]:
    """As `scoring.questions.answers`, of questions that are packable. Items are made at once: see `token_losses`."""
    packs = [Packed.of(own) for own in rows]
    laid = [pack.laid_out() for pack in packs]
    order = sorted(range(len(packs)), key=lambda number: len(laid[number]))
    found: dict[int, Item] = {}
    while order:
        count = max(1, FORWARD_TOKENS // len(laid[order[-1]]))
        taken, order = order[-count:], order[:-count]
        for number, logits in zip(taken, _forward(model, [laid[number] for number in taken]).float(), strict=True):
            found[number] = item_of(questions[number], rows[number], packs[number].losses(logits), task)
    return [found[number] for number in range(len(packs))]


def _forward(model: PreTrainedModel, laid: Sequence[Tensor]) -> Tensor:
    """Logits (B, T, V) of sequences padded on the right; what pads sees itself alone."""
    ids, places, choices = pad_sequence(list(laid), True, padding_value=-1).unbind(dim=-1)
    of, by = choices[:, None, :], choices[:, :, None]
    seen = ((of == 0) | (of == by)) & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    seen |= torch.eye(ids.shape[1]).bool()
    ids, places = ids.clamp_min(0), places.clamp_min(0)
    return model(input_ids=ids, position_ids=places, attention_mask=seen[:, None], use_cache=False).logits
