"""Shares of the tokens by domain -> a quota of blocks for each domain in each part, and how it came out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llm_streamline.errors import UserError

# The paper's proportions. It samples by document and divides some of them to make up for longer documents; ours are
# shares of the tokens, which need no divisors.
SLIMPAJAMA = {
    "RedPajamaC4": 0.492,
    "RedPajamaCommonCrawl": 0.361,
    "RedPajamaBook": 0.091,
    "RedPajamaWikipedia": 0.031,
    "RedPajamaStackExchange": 0.010,
    "RedPajamaGithub": 0.008,
    "RedPajamaArXiv": 0.007,
}
PRESETS = {"slimpajama": SLIMPAJAMA}
Quotas = dict[str, dict[str, int]]  # domain -> part -> blocks


def parse_mixture(given: str) -> dict[str, float]:
    """A named mixture, or the shares in NAME=SHARE,NAME=SHARE. Errors: UserError."""
    if given in PRESETS:
        return PRESETS[given]
    shares: dict[str, float] = {}
    for item in given.split(","):
        name, _, share = (word.strip() for word in item.rpartition("="))
        if not name or name in shares or not _positive(share):
            raise UserError(
                f"--mixture {given} has {item.strip()!r}; give {' or '.join(PRESETS)}, or every domain once "
                "with a share above 0, such as web=0.7,code=0.3."
            )
        shares[name] = float(share)
    return shares


def _positive(share: str) -> bool:
    try:
        return math.isfinite(float(share)) and float(share) > 0
    except ValueError:
        return False


def largest_remainder(total: int, weights: list[float]) -> list[int]:
    """`total` in whole numbers in proportion to the weights, each less than one away from its exact part."""
    if not weights or sum(weights) <= 0:
        return [0] * len(weights)
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(weights)), key=lambda place: (counts[place] - exact[place], place))
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    return counts


def share_out(sizes: Mapping[str, int], weights: Mapping[str, float], caps: Mapping[str, int]) -> Quotas:
    """Blocks of each domain in each part; a domain in `caps` has no more than that many in all its parts.

    What it lacks goes to the others by their weights; where all are capped, the last parts become smaller.
    """
    free = [name for name in weights if name not in caps]
    sizes = sizes if free else _within(sizes, sum(caps.values()))
    effective = _effective(sum(sizes.values()), weights, caps)
    *firsts, last = sizes
    quotas: Quotas = {name: {} for name in weights}
    for part in firsts:
        counts = largest_remainder(sizes[part], list(effective.values()))
        for name, count in zip(effective, counts, strict=True):
            quotas[name][part] = count
    for name, cap in caps.items():
        quotas[name][last] = max(0, cap - sum(quotas[name].values()))
    left = max(0, sizes[last] - sum(quotas[name][last] for name in caps))
    for name, count in zip(free, largest_remainder(left, [weights[name] for name in free]), strict=True):
        quotas[name][last] = count
    return quotas


def _within(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """The parts' sizes where no more than `total` is to be had: the first ones get theirs first."""
    found: dict[str, int] = {}
    for part, size in sizes.items():
        found[part] = min(size, total - sum(found.values()))
    return found


def _effective(total: int, weights: Mapping[str, float], caps: Mapping[str, int]) -> dict[str, float]:
    """The share that each domain can have of all blocks."""
    left = max(0, total - sum(caps.values()))
    free = sum(weight for name, weight in weights.items() if name not in caps)
    return {name: float(caps[name]) if name in caps else left * weight / free for name, weight in weights.items()}


@dataclass(frozen=True)
class Share:
    """What a domain was to give to a part and what it gave: shares of the part's tokens, tokens, documents."""

    asked: float
    got: float
    tokens: int
    documents: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def draw_shares(part: str, shares: Mapping[str, Share]) -> None:
    """A table on stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"domains in the {part} part", title_justify="left")
    table.add_column("domain", overflow="fold")
    for heading in ("asked", "got", "tokens", "documents"):
        table.add_column(heading, justify="right")
    for name, share in shares.items():
        table.add_row(name, f"{share.asked:.1%}", f"{share.got:.1%}", f"{share.tokens:,}", f"{share.documents:,}")
    Console(stderr=True, highlight=False, markup=False).print(table)


def shortage(name: str, asked: int, got: int, others: bool) -> str:
    """A sentence on a domain that has too little text; `others` is whether any domain has more than its share."""
    rest = "the others take what is missing, in proportion to their shares" if others else "no other has more"
    return f"{name} gives {got:,} of the {asked:,} blocks that its share asks for; {rest}."


def left_out(others: Mapping[str, int]) -> str:
    return (
        f"documents of other domains are left out: {_listed(f'{_short(name)} ({others[name]:,})' for name in others)}"
    )


def none_occurs(mixture: str, domain: str, others: Iterable[str]) -> UserError:
    return UserError(
        f"--mixture {mixture} names no domain that occurs; the text's {domain} is {_listed(map(_short, others))}: "
        "give shares of those, or the field that names the domain with --domain."
    )


def _listed(names: Iterable[str]) -> str:
    """The first few in alphabetical order: a wrong field can have as many values as there are documents."""
    several = sorted(names)
    return ", ".join(several[:8]) + (f" and {len(several) - 8} more" if len(several) > 8 else "")


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= 40 else f"{name[:37]}..."
