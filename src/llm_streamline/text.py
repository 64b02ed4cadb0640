"""Text -> blocks of token ids: three disjoint, seeded parts for calibration, training and validation.

Documents are dealt to the parts whole, so that no part has read another's text; only what is left of one that is
longer than a part goes to the next, after a gap of a block. Within a part documents follow one another, ended by the
tokenizer's end token, and are cut into full blocks. Nothing is padded. A .txt is one long text: it is dealt in pieces.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_streamline.errors import UserError
from llm_streamline.files import sha256
from llm_streamline.progress import progress
from llm_streamline.recipe import Recipe
from llm_streamline.sources import Documents

DEFAULT_TOKENS = 1_000_000
CALIBRATION_TOKENS = 2**16
VALIDATION_TOKENS = 2**15
LARGEST_BLOCK = 2048
SMALL_SHARE = 0.1  # of the text, at most, for calibration and for validation each


@dataclass(frozen=True)
class Parts:
    """Token ids in full blocks, (N, T) int32 each. `calibration` chooses, `training` trains, `validation` judges."""

    calibration: Tensor
    training: Tensor
    validation: Tensor

    def summary(self) -> dict[str, Any]:
        """Blocks, tokens and the hash of each part: what a manifest says of the data."""
        parts = {"calibration": self.calibration, "training": self.training, "validation": self.validation}
        return {
            name: {"blocks": len(part), "tokens": part.numel(), "sha256": sha256(part.numpy().data)}
            for name, part in parts.items()
        }


def block_length(recipe: Recipe, context: int) -> int:
    """Tokens per block: what was asked for, or min(2048, the model's context). Errors: UserError past the context."""
    if recipe.block is not None and recipe.block > context:
        raise UserError(
            f"--block {recipe.block} is longer than the model's context of {context}; give at most {context}."
        )
    return recipe.block or min(LARGEST_BLOCK, context)


def read_parts(recipe: Recipe, tokenizer: Any, context: int, quiet: bool = False) -> Parts:
    """The three parts that `recipe` asks for. Errors: UserError where the text is unusable or too short."""
    documents = Documents.open(recipe.data, recipe.field, recipe.seed)
    block = block_length(recipe, context)
    if recipe.tokens and recipe.tokens < block:
        raise UserError(f"--tokens {recipe.tokens} is less than one block of {block}; give more, or a smaller --block.")
    stream = iter(_tokenized(documents, tokenizer))
    head = list(islice(stream, 64))
    total = _expected_tokens(head, documents)
    small = CALIBRATION_TOKENS if total is None else int(SMALL_SHARE * total)
    wanted = {
        "validation": max(block, recipe.validation_tokens or min(VALIDATION_TOKENS, small)),
        "calibration": max(2 * block, recipe.calibration_tokens or min(CALIBRATION_TOKENS, small)),
        "training": 0 if recipe.replace == "none" else recipe.tokens or DEFAULT_TOKENS,
    }
    packer, rest = _Packer(block), chain(head, stream)
    with progress("reading text", sum(wanted.values()), quiet) as advance:
        filled = {name: packer.fill(rest, tokens, advance) for name, tokens in wanted.items()}
    _check_enough(filled, recipe, block)
    return Parts(**filled)


def _tokenized(documents: Iterable[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """Each document's token ids, ended by the tokenizer's end token."""
    end = tokenizer.eos_token_id
    iterator = iter(documents)
    while batch := list(islice(iterator, 64)):
        # verbose=False: a document longer than the context is cut into blocks here, so the warning would mislead
        for ids in tokenizer(batch, verbose=False)["input_ids"]:
            if end is not None and (not ids or ids[-1] != end):
                ids = [*ids, end]
            yield np.asarray(ids, dtype=np.int32)


def _expected_tokens(head: list[np.ndarray], documents: Documents) -> float | None:
    """About how many tokens the text gives, from its first documents; None where its size is not known."""
    if documents.count is None or not head:
        return None
    return documents.count * sum(len(ids) for ids in head) / len(head)


class _Packer:
    """Cuts a stream of documents into full blocks, one part after the other."""

    def __init__(self, block: int) -> None:
        self.block = block
        self._left = np.empty(0, dtype=np.int32)

    def fill(self, documents: Iterator[np.ndarray], tokens: int, advance: Any) -> Tensor:
        """(N, block) int32 with the most full blocks that fit in `tokens`, fewer where the documents end."""
        wanted = tokens // self.block * self.block
        pieces: list[np.ndarray] = []
        have = 0
        while have < wanted and (ids := self._next(documents)) is not None:
            self._left = ids[wanted - have + self.block :]
            pieces.append(ids[: wanted - have])
            have += len(pieces[-1])
            advance(len(pieces[-1]), "tokens")
        flat = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
        full = len(flat) // self.block * self.block
        return torch.from_numpy(flat[:full].reshape(-1, self.block))

    def _next(self, documents: Iterator[np.ndarray]) -> np.ndarray | None:
        """What the part before has left of a long document, else the next one."""
        left, self._left = self._left, self._left[:0]
        return left if len(left) >= self.block else next(documents, None)


def _check_enough(filled: dict[str, Tensor], recipe: Recipe, block: int) -> None:
    """Errors: UserError where a part has too few blocks, or fewer than were asked for."""
    need = {"calibration": 2, "validation": 1, "training": 0 if recipe.replace == "none" else 1}
    for name, blocks in need.items():
        if len(filled[name]) < blocks:
            raise UserError(
                f"the text gives {len(filled[name])} blocks of {block} tokens for {name} and {blocks} are needed; "
                "give more text with --data or a smaller --block."
            )
    asked = {"calibration": "calibration_tokens", "validation": "validation_tokens"}
    asked |= {} if recipe.replace == "none" else {"training": "tokens"}
    for name, key in asked.items():
        tokens, have = getattr(recipe, key), filled[name].numel()
        if tokens and have < tokens // block * block:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(
                f"{flag} {tokens} is more than the {have} tokens that the text gives for {name}; "
                f"give more text with --data or fewer {flag}."
            )


def shuffled(blocks: Tensor, seed: int) -> Tensor:
    """The blocks in the order in which training takes them."""
    order = list(range(len(blocks)))
    random.Random(seed).shuffle(order)
    return blocks[order]
