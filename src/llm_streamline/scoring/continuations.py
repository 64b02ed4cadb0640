"""Token blocks -> questions about their text, in any language: which of four pieces follows?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_streamline.scoring.questions import Question

CHOICES = 4
QUESTIONS = 100  # at most
QUERY, CHOICE = 48, 12  # tokens, where the blocks are long enough
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # of a token that holds part of a letter


@dataclass(frozen=True)
class _Piece:
    query: str
    choice: str


def continuation_questions(blocks: Tensor, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Question]:
    """Questions from blocks (N, T) of token ids, evenly spread; the wrong choices are what follows other queries.

    Empty where the text gives fewer than four pieces.
    """
    pieces = _pieces(blocks, tokenizer)
    draw = random.Random(seed)
    return [_question(number, piece, pieces, draw) for number, piece in enumerate(pieces)] if _enough(pieces) else []


def _enough(pieces: Sequence[_Piece]) -> bool:
    return len({piece.choice.strip() for piece in pieces}) >= CHOICES


def _pieces(blocks: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[_Piece]:
    """Non-overlapping pieces of the blocks, or of as many of them, evenly spread, as are needed."""
    query = min(QUERY, blocks.shape[1] * 3 // 4)
    length = query + min(CHOICE, blocks.shape[1] - query)
    starts = range(0, blocks.shape[1] - length + 1, length)
    places = [(row, start) for start in starts for row in range(len(blocks))]
    count = min(QUESTIONS, len(places))
    found = []
    for row, start in (places[index * len(places) // count] for index in range(count)):
        ids = blocks[row, start : start + length].tolist()
        texts = [tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:query], ids[query:])]
        if all(text.strip() and _BROKEN not in text for text in texts):
            found.append(_Piece(*texts))
    return found


def _question(number: int, piece: _Piece, pieces: Sequence[_Piece], draw: random.Random) -> Question:
    choices = [piece.choice]
    for other in draw.sample(pieces, len(pieces)):
        if len(choices) < CHOICES and other.choice.strip() not in {choice.strip() for choice in choices}:
            choices.append(other.choice)
    draw.shuffle(choices)
    return Question(str(number), piece.query, tuple(choices), choices.index(piece.choice))
