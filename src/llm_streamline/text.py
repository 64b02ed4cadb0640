"""Text -> blocks of token ids: three disjoint, seeded parts for calibration, training and validation.

Every domain is packed for itself, to a quota of blocks in each part, so that shares hold by tokens whatever the
documents' lengths; text without weights or a mixture is one domain. Documents are dealt to the parts, each of which
takes but a little of a long one until there is no other text (`packing.py`). Within a part documents follow one
another, ended by the tokenizer's end token, and are cut into full blocks.
Nothing is padded. A .txt is one long text: it is dealt in pieces.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_streamline.errors import UserError
from llm_streamline.files import sha256
from llm_streamline.mixture import Quotas, Share, draw_shares, left_out, none_occurs, parse_mixture, share_out, shortage
from llm_streamline.packing import Packer
from llm_streamline.progress import Advance, progress, say
from llm_streamline.readers import Document, Schema
from llm_streamline.recipe import Recipe
from llm_streamline.sources import Pool, is_new, open_pools

DEFAULT_TOKENS = 1_000_000
CALIBRATION_TOKENS = 2**16
VALIDATION_TOKENS = 2**15
LARGEST_BLOCK = 2048
SMALL_SHARE = 0.1  # of the text, at most, for calibration and for validation each
_AT_ONCE = 64  # documents that are tokenized together
_TOO_LARGE = 1.5  # times a tenth of the text: then calibration or validation is made smaller
_PATIENCE = 1600  # times as many of a stream in vain: then what is missing is taken not to be there


@dataclass(frozen=True)
class Parts:
    """Token ids in full blocks, (N, T) int32 each. `calibration` chooses, `training` trains, `validation` judges."""

    calibration: Tensor
    training: Tensor
    validation: Tensor
    shares: Mapping[str, Share] = field(default_factory=dict)  # by domain, where there are several

    def summary(self) -> dict[str, Any]:
        """Blocks, tokens and the hash of each part, and the domains' shares: what a manifest says of the data."""
        parts = {"calibration": self.calibration, "training": self.training, "validation": self.validation}
        found: dict[str, Any] = {
            name: {"blocks": len(part), "tokens": part.numel(), "sha256": sha256(part.numpy().data)}
            for name, part in parts.items()
        }
        return found | (
            {"domains": {name: share.as_json() for name, share in self.shares.items()}} if self.shares else {}
        )


def block_length(recipe: Recipe, context: int) -> int:
    """Tokens per block: what was asked for, or min(2048, the model's context). Errors: UserError past the context."""
    if recipe.block is not None and recipe.block > context:
        raise UserError(
            f"--block {recipe.block} is longer than the model's context of {context}; give at most {context}."
        )
    return recipe.block or min(LARGEST_BLOCK, context)


def read_parts(recipe: Recipe, tokenizer: Any, context: int, quiet: bool = False) -> Parts:
    """The three parts that `recipe` asks for. Errors: UserError where the text is unusable or too short."""
    mixture = None if recipe.mixture is None else parse_mixture(recipe.mixture)
    schema = Schema(recipe.field, recipe.domain if mixture else None, _chat_template(tokenizer))
    pools = open_pools(recipe.data, schema, recipe.seed)
    block = block_length(recipe, context)
    if recipe.tokens and recipe.tokens < block:
        raise UserError(f"--tokens {recipe.tokens} is less than one block of {block}; give more, or a smaller --block.")
    weights = mixture or {pool.name: pool.weight for pool in pools}
    sizes = _sizes(recipe, block, _expected_tokens(pools, weights, tokenizer))
    reading = _Reading(pools, weights, tokenizer, block, quiet)
    packers = reading.fill(sizes)
    if reading.exhausted and (resized := _resized(sizes, recipe, block, reading)):
        sizes = resized
        packers = reading.fill(sizes)
    if mixture and reading.others and not any(reading.held.values()):
        raise none_occurs(recipe.mixture or "", recipe.domain, reading.others)
    filled = {part: _interleaved([packer.blocks(part) for packer in packers.values()], recipe.seed) for part in sizes}
    _check_enough(filled, recipe, block)
    shares = _tell(reading, packers, sizes, quiet) if len(weights) > 1 or mixture else {}
    return Parts(**filled, shares=shares)


def _sizes(recipe: Recipe, block: int, expected: float | None) -> dict[str, int]:
    """Blocks that each part should have, in the order in which they are filled."""
    small = CALIBRATION_TOKENS if expected is None else int(SMALL_SHARE * expected)
    wanted = {
        "validation": max(block, recipe.validation_tokens or min(VALIDATION_TOKENS, small)),
        "calibration": max(2 * block, recipe.calibration_tokens or min(CALIBRATION_TOKENS, small)),
        "training": (recipe.tokens or DEFAULT_TOKENS) if recipe.trains else 0,
    }
    return {part: tokens // block for part, tokens in wanted.items()}


def _resized(sizes: Mapping[str, int], recipe: Recipe, block: int, reading: _Reading) -> dict[str, int] | None:
    """The parts' sizes for all the text there is, now that it is known; None where they may stay as they are.

    Several domains are trained on as far as the scarcest goes, where no number of tokens was asked for: taking all
    there is would leave nothing of the shares.
    """
    usable = reading.in_shares
    better = _sizes(recipe, block, usable)
    small = ("validation", "calibration")
    if len(reading.held) > 1 and recipe.tokens is None and better["training"]:
        better["training"] = max(1, int(usable) // block - sum(better[part] for part in small))
        reading.say(
            f"the text gives {better['training'] * block:,} training tokens in these shares; with --tokens for more, "
            "other domains make up for those that are short."
        )
        return better
    # an estimate from a few documents can be far off where a few others hold most of the text
    return better if any(sizes[part] > _TOO_LARGE * better[part] for part in small) else None


def _expected_tokens(pools: list[Pool], weights: Mapping[str, float], tokenizer: Any) -> float | None:
    """About how many tokens the pools give in their shares, from their first documents; None where one is a stream."""
    found: list[float] = []
    for pool in pools:
        if pool.count is None:
            return None
        seen: set[bytes] = set()
        head = list(islice((document for document in pool if is_new(document, seen)), _AT_ONCE))
        lengths = [len(ids) for ids in _tokenized([one for one in head if one.domain in weights], tokenizer)]
        share = pool.weight / sum(pool.weight for pool in pools)
        found.append(pool.count * sum(lengths) / max(1, len(head)) / share)
    return min(found)


def _chat_template(tokenizer: Any) -> Callable[[list[dict[str, str]]], str] | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    return lambda turns: tokenizer.apply_chat_template(turns, tokenize=False)


def _tokenized(documents: Iterable[Document], tokenizer: Any) -> Iterator[np.ndarray]:
    """Each document's token ids, ended by the tokenizer's end token; a chat's template has put in the others."""
    end = tokenizer.eos_token_id
    for chat, group in groupby(documents, key=lambda document: document.chat):
        texts = [document.text for document in group]
        # verbose=False: a document longer than the context is cut into blocks here, so the warning would mislead
        encoded = tokenizer(texts, add_special_tokens=not chat, verbose=False)["input_ids"]
        for text, ids in zip(texts, encoded, strict=True):
            ended = (bool(ids) and ids[-1] == end) or (chat and text.rstrip().endswith(tokenizer.eos_token or "\0"))
            yield np.asarray(ids if end is None or ended else [*ids, end], dtype=np.int32)


class _Reading:
    """Passes over the pools that read no further than the quotas need, and skip the domains that have theirs."""

    def __init__(
        self, pools: list[Pool], weights: Mapping[str, float], tokenizer: Any, block: int, quiet: bool
    ) -> None:
        self._pools, self._weights, self._tokenizer = pools, weights, tokenizer
        self._block, self._quiet = block, quiet
        self.held: dict[str, list[np.ndarray]] = {name: [] for name in weights}
        self.short: dict[str, tuple[int, int]] = {}  # blocks asked and got, of the domains that ran out
        self.others: Counter[str] = Counter()
        self._ended: set[str] = set()

    def say(self, sentence: str) -> None:
        say(sentence, self._quiet)

    @property
    def exhausted(self) -> bool:
        """Whether every domain was read to its end and had too little."""
        return len(self.short) == len(self.held)

    @property
    def in_shares(self) -> float:
        """Tokens that the text read so far gives in the asked shares of those domains that occur in it."""
        found = {name: sum(map(len, ids)) for name, ids in self.held.items() if ids}
        whole = sum(self._weights[name] for name in found)
        return min((count * whole / self._weights[name] for name, count in found.items()), default=0.0)

    def fill(self, sizes: Mapping[str, int]) -> dict[str, Packer]:
        """A packer per domain. What one cannot supply goes to the others, which then are read again from the start."""
        caps: dict[str, int] = {}
        self.short.clear()
        while True:
            quotas = share_out(sizes, self._weights, caps)
            packers = {name: self._packed(name, quotas) for name in self._weights}
            lacking = {name: packer for name, packer in packers.items() if not packer.full}
            if not lacking:
                return packers
            if not lacking.keys() <= self._ended:
                self._read(quotas)
                continue
            for name, packer in lacking.items():
                asked = sum(quotas[name].values())
                caps[name] = min(packer.total, caps.get(name, asked) - 1)
                self.short[name] = (self.short.get(name, (asked, 0))[0], caps[name])

    def shares(self, packers: Mapping[str, Packer], part: str) -> dict[str, Share]:
        """What each domain was to give to a part, and gave."""
        weight, blocks = sum(self._weights.values()), {name: len(one.blocks(part)) for name, one in packers.items()}
        whole = max(1, sum(blocks.values()))
        return {
            name: Share(
                asked=self._weights[name] / weight,
                got=count / whole,
                tokens=count * self._block,
                documents=packers[name].documents(part),
            )
            for name, count in blocks.items()
        }

    def _packed(self, name: str, quotas: Quotas) -> Packer:
        packer = Packer(self._block, quotas[name])
        for ids in self.held[name]:
            packer.add(ids)
        if name in self._ended:
            packer.add_rests()
        return packer

    def _read(self, quotas: Quotas) -> None:
        """One pass from the start: hold each domain's documents until its quotas are full or the text ends."""
        packers = {name: Packer(self._block, quota) for name, quota in quotas.items()}
        self.held, self._ended, seen = {name: [] for name in packers}, set(), set[bytes]()
        self.others.clear()
        total = sum(sum(quota.values()) for quota in quotas.values()) * self._block
        with progress("reading text", total, self._quiet) as advance:
            for pool in self._pools:
                own = [name for name in packers if pool.schema.domain or name == pool.name]
                self._read_pool(pool, {name: packers[name] for name in own}, seen, advance)

    def _read_pool(self, pool: Pool, packers: dict[str, Packer], seen: set[bytes], advance: Advance) -> None:
        stream, in_vain = iter(pool), 0
        while any(not packer.full for packer in packers.values()):
            batch = list(islice(stream, _AT_ONCE))
            self.others.update(document.domain for document in batch if document.domain not in packers)
            wanted = [one for one in batch if one.domain in packers and not packers[one.domain].full]
            wanted = [document for document in wanted if is_new(document, seen)]
            in_vain = 0 if wanted else in_vain + 1
            if not batch or (pool.count is None and in_vain > _PATIENCE):
                self._ended |= {name for name, packer in packers.items() if not packer.full}
                return
            for document, ids in zip(wanted, _tokenized(wanted, self._tokenizer), strict=True):
                if not packers[document.domain].full:
                    self.held[document.domain].append(ids)
                    advance(packers[document.domain].add(ids), "tokens")


def _interleaved(domains: list[np.ndarray], seed: int) -> Tensor:
    """(N, T): the blocks of all domains in seeded order, each domain's in its own order."""
    if len(domains) == 1:
        return torch.from_numpy(domains[0])
    owners = [number for number, blocks in enumerate(domains) for _ in blocks]
    random.Random(seed).shuffle(owners)
    places = np.argsort(np.asarray(owners, dtype=np.int64), kind="stable")  # where each domain's blocks go, in turn
    found = np.empty_like(np.concatenate(domains))
    found[places] = np.concatenate(domains)
    return torch.from_numpy(found)


def _tell(reading: _Reading, packers: Mapping[str, Packer], sizes: Mapping[str, int], quiet: bool) -> dict[str, Share]:
    """Say what was left out and what is missing, and draw the shares of the part that is trained or measured on."""
    for name, (asked, got) in reading.short.items():
        say(shortage(name, asked, got, others=len(reading.short) < len(packers)), quiet)
    if reading.others:
        say(left_out(reading.others), quiet)
    part = "training" if sizes["training"] else "calibration"
    shares = reading.shares(packers, part)
    if not quiet:
        draw_shares(part, shares)
    return shares


def _check_enough(filled: dict[str, Tensor], recipe: Recipe, block: int) -> None:
    """Errors: UserError where a part has too few blocks, or fewer than were asked for."""
    need = {"calibration": 2, "validation": 1, "training": int(recipe.trains)}
    for name, blocks in need.items():
        if len(filled[name]) < blocks:
            raise UserError(
                f"the text gives {len(filled[name])} blocks of {block} tokens for {name} and {blocks} are needed; "
                "give more text with --data or a smaller --block."
            )
    asked = {"calibration": "calibration_tokens", "validation": "validation_tokens"}
    asked |= {"training": "tokens"} if recipe.trains else {}
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
