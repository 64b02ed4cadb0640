"""Documents of token ids -> full blocks in several parts: calibration, training, validation.

No document fills more than a 64th of a part, or two blocks, while there are others: a book is not to be all it holds.
What is left of it is taken once the text has ended, in turns with that of others; where it goes to another part than
its beginning, a block between the two is left out. But for that, no part has read another's documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

FEWEST_DOCUMENTS = 64  # in a part, where there are as many
FEWEST_BLOCKS = 2  # of a long document in a small part


class Packer:
    """Cuts one domain's documents into full blocks, one part after the other, until each has its quota."""

    def __init__(self, block: int, quota: Mapping[str, int]) -> None:
        self._block, self._quota = block, quota
        self._pieces: dict[str, list[np.ndarray]] = {part: [] for part in quota}
        self._open = [(part, blocks * block) for part, blocks in quota.items() if blocks]
        self._rests: list[tuple[np.ndarray, str]] = []  # of long documents, and the part that has what came before
        self._alone = False  # whether one document is all that is left
        self._documents: Counter[str] = Counter()

    @property
    def full(self) -> bool:
        return not self._open

    def add(self, ids: np.ndarray, before: str | None = None) -> int:
        """Take what the open parts may have of a document; how many tokens those are.

        Args: before: the part that has what came before these ids in their document.
        """
        taken = 0
        while self._open and len(ids):
            part, room = self._open[0]
            if before not in (None, part):
                ids = ids[self._block :]
                if len(ids) < self._block:
                    return taken
            piece, ids = _cut(ids, room, self._most(part))
            self._pieces[part].append(piece)
            self._documents[part] += before != part
            taken, before = taken + len(piece), part
            if len(piece) < room:
                self._open[0] = (part, room - len(piece))
                break
            del self._open[0]
        if len(ids) and before:
            self._rests.append((ids, before))
        return taken

    def add_rests(self) -> None:
        """There is no other document: take what is left of the long ones, of each in turn."""
        while self._open and self._rests:
            rests, self._rests = self._rests, []
            self._alone = len(rests) == 1
            for ids, before in rests:
                self.add(ids, before)

    def _most(self, part: str) -> int:
        """Tokens of a document that a part may take at once."""
        blocks = self._quota[part]
        return self._block * (blocks if self._alone else max(FEWEST_BLOCKS, blocks // FEWEST_DOCUMENTS))

    def blocks(self, part: str) -> np.ndarray:
        """(N, block): the full blocks of a part."""
        flat = np.concatenate([np.empty(0, dtype=np.int32), *self._pieces[part]])
        return flat[: len(flat) // self._block * self._block].reshape(-1, self._block)

    def documents(self, part: str) -> int:
        """Of how many documents a part has text."""
        return self._documents[part]

    @property
    def total(self) -> int:
        """Full blocks in all parts."""
        return sum(sum(map(len, pieces)) // self._block for pieces in self._pieces.values())


def _cut(ids: np.ndarray, room: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """A document's first tokens and the rest; where another is to follow, the first end as the whole document does."""
    if len(ids) <= most or room <= most:
        return ids[:room], ids[room:]
    return np.concatenate([ids[: most - 1], ids[-1:]]), ids[most - 1 :]
