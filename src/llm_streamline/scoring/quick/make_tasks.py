"""Passages, facts and sentence patterns -> the tasks of the suite quick; `python make_tasks.py` writes them anew."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent
CUTS, NEXT = (30, 44), 12  # words
PER_PATTERN = 16
Pair = tuple[str, str, str]  # what comes before, the right ending, the wrong one
Raw = tuple[str, list[str]]  # the query and its choices, the right one first


def continuations() -> list[Raw]:
    """Each passage cut in two places, with what follows there and what follows in three other passages."""
    passages = [text.split() for text in (HERE / "passages.txt").read_text(encoding="utf-8").strip().split("\n\n")]
    draw, found = random.Random(0), []
    for number, words in enumerate(passages):
        for cut in CUTS:
            others = draw.sample([other for other in range(len(passages)) if other != number], 3)
            ends = [" ".join(passages[one][cut : cut + NEXT]) for one in (number, *others)]
            found.append((" ".join(words[:cut]), ends))
    return found


def facts() -> list[Raw]:
    lines = (HERE / "facts.txt").read_text(encoding="utf-8").splitlines()
    rows = [[part.strip() for part in line.split("|")] for line in lines]
    return [(row[0], [f"{choice}." for choice in row[1:]]) for row in rows]


def agreement() -> Iterator[Pair]:
    """The verb agrees with its subject, not with the noun beside it."""
    subjects = [
        (("key", "keys"), "to the", ("cabinet", "cabinets")),
        (("picture", "pictures"), "of the", ("child", "children")),
        (("letter", "letters"), "from the", ("lawyer", "lawyers")),
        (("road", "roads"), "behind the", ("house", "houses")),
    ]
    verbs = [
        (("was", "were"), "lost for many years."),
        (("is", "are"), "older than the others."),
        (("has", "have"), "been there for a long time."),
    ]
    for (subject, between, other), (verb, rest) in product(subjects, verbs):
        for number in (0, 1):
            query = f"The {subject[number]} {between} {other[1 - number]}"
            yield query, f"{verb[number]} {rest}", f"{verb[1 - number]} {rest}"


def determiners() -> Iterator[Pair]:
    """A determiner goes with nouns of its number."""
    nouns = [("book", "books"), ("apple", "apples"), ("chair", "chairs"), ("horse", "horses"), ("map", "maps")]
    starts = ["She wanted to buy", "They asked the man about", "We talked for an hour about"]
    words = [("this", "these"), ("that", "those"), ("every", "several"), ("one", "three"), ("another", "many")]
    for start, (noun, word) in product(starts, product(nouns, words)):
        for number in (0, 1):
            yield f"{start} {word[number]}", f"{noun[number]} on the table.", f"{noun[1 - number]} on the table."


def anaphora() -> Iterator[Pair]:
    """A pronoun has the gender and number of what it stands for."""
    people = [
        ("My sister", "herself"),
        ("The old king", "himself"),
        ("The two girls", "themselves"),
        ("We", "ourselves"),
    ]
    people += [("His mother", "herself"), ("Her uncle", "himself"), ("The soldiers", "themselves"), ("I", "myself")]
    verbs = [("looked at", "in the mirror."), ("blamed", "for the accident."), ("made a cake for", "on Sunday.")]
    reflexives = ("herself", "himself", "themselves", "ourselves", "myself")
    for number, ((who, right), (verb, rest)) in enumerate(product(people, verbs)):
        wrong = [word for word in reflexives if word != right][number % 4]
        yield f"{who} {verb}", f"{right} {rest}", f"{wrong} {rest}"


def order() -> Iterator[Pair]:
    """Words stand in their places."""
    yield from [
        ("She asked the policeman where", "the station was.", "the was station."),
        ("They lived for years in a", "small white house.", "house small white."),
        ("He did not know what", "to say next.", "say to next."),
        ("I have never seen", "such a big dog.", "such big a dog."),
        ("The children went", "to bed early.", "early bed to."),
        ("We could not find", "the door of the room.", "door the of the room."),
        ("My father has always", "been a quiet man.", "a been quiet man."),
        ("On Sunday the shops", "are not open.", "not are open."),
        ("You should give", "the book back to her.", "back the to her book."),
        ("The train will arrive", "in a few minutes.", "a in few minutes."),
        ("Nobody knew how much", "money he had lost.", "had he money lost."),
        ("She was too tired", "to read the letter.", "the letter read to."),
        ("There was nothing", "left to eat.", "eat to left."),
        ("He wanted to know whether", "she had seen him.", "seen she had him."),
        ("The garden behind", "the house was full of flowers.", "house the was full of flowers."),
        ("It was the first time that", "they had met.", "met they had."),
    ]


def tense() -> Iterator[Pair]:
    """A verb has the form and time that what comes before it asks for."""
    times = [
        ("Yesterday my brother", ("went home early.", "will go home early.")),
        ("Tomorrow the two of us", ("will meet again.", "met again.")),
        ("By the time we arrived, they", ("had left.", "will leave.")),
        ("Last year the company", ("lost a lot of money.", "will lose a lot of money.")),
        ("When she was young, she often", ("played the piano.", "plays the piano.")),
        ("The letter was", ("written in French.", "wrote in French.")),
        ("He has already", ("eaten his breakfast.", "ate his breakfast.")),
        ("They are", ("waiting for the bus.", "waited for the bus.")),
        ("She did not", ("come to the party.", "came to the party.")),
        ("You must", ("be careful.", "been careful.")),
        ("The window has been", ("broken for weeks.", "break for weeks.")),
        ("I am going to", ("tell him the truth.", "told him the truth.")),
        ("We enjoyed", ("walking in the hills.", "walk in the hills.")),
        ("He wants", ("to become a doctor.", "becoming a doctor.")),
        ("Two weeks ago we", ("saw him in the town.", "have seen him in the town.")),
        ("If I were you, I", ("would go home.", "went home.")),
    ]
    for query, (right, wrong) in times:
        yield query, right, wrong


def grammar() -> list[Raw]:
    patterns: list[Callable[[], Iterator[Pair]]] = [agreement, determiners, anaphora, order, tense]
    draw, found = random.Random(0), []
    for pattern in patterns:
        for query, right, wrong in draw.sample(list(pattern()), PER_PATTERN):
            found.append((query, [right, wrong]))
    return found


def lines(raw: Sequence[Raw]) -> str:
    """As JSONL, the right answer in each place equally often."""
    draw, count = random.Random(0), len(raw[0][1])
    places = [number % count for number in range(len(raw))]
    draw.shuffle(places)
    rows = []
    for number, ((query, choices), gold) in enumerate(zip(raw, places, strict=True)):
        wrong = draw.sample(choices[1:], count - 1)
        row = {"id": number, "query": query, "choices": [*wrong[:gold], choices[0], *wrong[gold:]], "gold": gold}
        rows.append(json.dumps(row) + "\n")
    return "".join(rows)


def tasks() -> dict[str, str]:
    """The text of each task's file, by the file's name."""
    made = {"continuation": continuations(), "grammar": grammar(), "facts": facts()}
    return {f"quick-{name}.jsonl": lines(raw) for name, raw in made.items()}


if __name__ == "__main__":
    for name, text in tasks().items():
        (HERE / name).write_text(text, encoding="utf-8")
