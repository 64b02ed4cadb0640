"""Questions enough to tell methods apart that are close: `python -m bench.continuation OUT.jsonl TEXT [TEXT ...]`.

Every 64 words of a text are one question, and no word is in two: which of four pieces of 14 words follows the 50? The
wrong ones follow elsewhere, in three other documents of the same file, for what tells files apart is no question. A
text file that is one document falls apart at its titles (` = Title = `, as WikiText has them).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from llm_streamline.scoring.texts import read_text

QUERY, CHOICE, CHOICES = 50, 14, 4  # words, words, pieces
DRAWS = 10_000  # for the wrong choices of one question, at most
TITLE = re.compile(r"^ = [^=].* = $", re.MULTILINE)


class Piece(NamedTuple):
    document: int
    query: str
    choice: str


def pieces(path: Path) -> list[Piece]:
    documents = read_text(path).documents
    documents = TITLE.split(documents[0]) if len(documents) == 1 else documents
    found = []
    for number, document in enumerate(documents):
        words = document.split()
        for start in range(0, len(words) - QUERY - CHOICE + 1, QUERY + CHOICE):
            middle = start + QUERY
            found.append(Piece(number, " ".join(words[start:middle]), " ".join(words[middle : middle + CHOICE])))
    return found


def questions(path: Path, draw: random.Random) -> list[dict[str, Any]]:
    found = pieces(path)
    if len({piece.document for piece in found}) < CHOICES:
        sys.exit(f"{path} has fewer than {CHOICES} documents of {QUERY + CHOICE} words; give one that has more.")
    return [question(piece, found, draw) for piece in found]


def question(piece: Piece, others: list[Piece], draw: random.Random) -> dict[str, Any]:
    choices, documents, draws = [piece.choice], {piece.document}, 0
    while len(choices) < CHOICES:
        other, draws = draw.choice(others), draws + 1
        if draws > DRAWS:
            sys.exit("too few documents differ in their words; give a text with more of them.")
        if other.document not in documents and other.choice not in choices:
            choices.append(other.choice)
            documents.add(other.document)
    draw.shuffle(choices)
    return {"query": piece.query, "choices": choices, "gold": choices.index(piece.choice)}


def main(*words: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    options, draw = parser.parse_args(words), random.Random(0)
    found = [one for text in options.texts for one in questions(text, draw)]
    lines = [json.dumps({"id": number, **one}, ensure_ascii=False) for number, one in enumerate(found)]
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{options.out}: {len(lines)} questions")


if __name__ == "__main__":
    main(*sys.argv[1:])
