"""Losses of many questions' choices where the choices of one share a forward of their query: a third of the time.

A question's choices follow its query in one sequence, and none sees another (a mask of four dimensions, which layers
with attention over all tokens take). Tests hold it against `scoring.questions.answers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from llm_streamline.scoring.perplexity import FORWARD_TOKENS
from llm_streamline.scoring.questions import Row


class Packed(NamedTuple):
    """A query's tokens and what each choice adds; token by token its place in the text and the choice it is of."""

    shared: list[int]
    added: list[list[int]]
    ids: list[int]
    places: list[int]
    choices: list[int]  # 0 for the query


class Answer(NamedTuple):
    """The mean loss of query and choice in nats per token, and the choice's log-likelihood."""

    ppl: float
    log_likelihood: float


def verdict(choices: Sequence[Answer], gold: int) -> list[Any]:
    """The choices' PPL, and whether the lowest of them and the likeliest choice are the right one."""
    ppl, likely = ([one[place] for one in choices] for place in (0, 1))
    return [ppl, ppl.index(min(ppl)) == gold, likely.index(max(likely)) == gold]


def shared_length(rows: Sequence[Row]) -> int:
    """How many tokens all choices' texts begin with, but for the last of the shortest."""
    texts = [row.ids for row in rows]
    same = takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    return min(sum(1 for _ in same), min(map(len, texts)) - 1)


def packable(rows: Sequence[Row]) -> bool:
    """Whether there is something to share, and nothing was cut to fit the context."""
    return shared_length(rows) > 1 and not any(row.cut for row in rows)


def pack(rows: Sequence[Row]) -> Packed:
    texts, length = [row.ids for row in rows], shared_length(rows)
    shared, added = texts[0][:length], [ids[length:] for ids in texts]
    ids, places, choices = list(shared), list(range(length)), [0] * length
    for number, own in enumerate(added, start=1):
        ids += own[:-1]
        places += range(length, length + len(own) - 1)
        choices += [number] * (len(own) - 1)
    return Packed(shared, added, ids, places, choices)


@torch.no_grad()
def packed_answers(model: PreTrainedModel, questions: Sequence[Sequence[Row]]) -> list[list[Answer]]:
    """Per question and choice what stability and accuracy look at."""
    packs = [pack(rows) for rows in questions]
    order = sorted(range(len(packs)), key=lambda number: len(packs[number].ids))
    found: dict[int, list[Answer]] = {}
    while order:
        count = max(1, FORWARD_TOKENS // len(packs[order[-1]].ids))
        taken, order = order[-count:], order[:-count]
        some = [packs[number] for number in taken]
        for number, one, logits in zip(taken, some, _forward(model, some).float(), strict=True):
            found[number] = [
                _answer(losses, row) for losses, row in zip(_losses(one, logits), questions[number], strict=True)
            ]
    return [found[number] for number in range(len(packs))]


def _answer(losses: Tensor, row: Row) -> Answer:
    return Answer(float(losses.double().mean()), -float(losses[-row.choice :].double().sum()))


def _forward(model: PreTrainedModel, some: Sequence[Packed]) -> Tensor:
    """Logits (B, T, V) of sequences padded on the right; what pads sees itself alone."""
    ids, places = (
        pad_sequence([torch.tensor(own) for own in part], True)
        for part in ([p.ids for p in some], [p.places for p in some])
    )
    choices = pad_sequence([torch.tensor(one.choices) for one in some], True, padding_value=-1)
    of, by = choices[:, None, :], choices[:, :, None]
    seen = ((of == 0) | (of == by)) & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    seen |= torch.eye(ids.shape[1]).bool()
    return model(input_ids=ids, position_ids=places, attention_mask=seen[:, None], use_cache=False).logits


def _losses(one: Packed, logits: Tensor) -> list[Tensor]:
    length, losses = len(one.shared), []
    query = torch.nn.functional.cross_entropy(logits[: length - 1], torch.tensor(one.shared[1:]), reduction="none")
    start = length
    for own in one.added:
        told = torch.cat([logits[length - 1 : length], logits[start : start + len(own) - 1]])
        losses.append(torch.cat([query, torch.nn.functional.cross_entropy(told, torch.tensor(own), reduction="none")]))
        start += len(own) - 1
    return losses
