"""A small made-up world: seeded stories, and multiple-choice questions about them.

Two dozen people with fixed jobs, homes, pets and favourite foods walk between
twelve places, carry coloured objects about and hand them to each other.  Every
document is one such story with questions and their answers woven in.  Some
questions take one step ("Where is Anna?"), some take several ("What is the job
of the one who has the kite?"), and those about a person's job, home, pet or
food can be answered only by knowing the world by heart.

``python -m llm_streamline.demo.stories`` writes the two files shipped beside
this module.  Only the standard library is used.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


def words(text: str) -> list[str]:
    """Split a list of words written as one string."""
    return text.split()


NAMES = words(
    "Adam Alice Anna Ben Clara Dan Emma Felix Grace Henry Iris Jack Kate Leo Lucy Mark Nina Oscar Paul Rosa Sam Tom "
    "Vera Will"
)
PLACES = words("garden kitchen library market school station park harbour bakery museum")
OBJECTS = words("kite ball book lamp drum cup hat key box bell rope map")
COLOURS = words("red blue green yellow black white")
FACTS: dict[str, list[str]] = {
    "job": words("baker doctor teacher farmer painter sailor tailor singer"),
    "home": words("Milltown Oakham Redford Westport Ashby Lakeside"),
    "pet": words("cat dog parrot rabbit pony turtle"),
    "food": words("soup bread cheese rice cake salad"),
}
FACT_LINES = {
    "job": "{name} works as a {value}",
    "home": "{name} lives in {value}",
    "pet": "{name} keeps a {value}",
    "food": "{name} likes {value}",
}

TEXT_SEED = 20_001
QUESTION_SEED = 30_001
WORLD_SEED = 7


def build_world() -> dict[str, dict[str, str]]:
    """Return the fixed facts: ``world[kind][name]``, every value used about equally often."""
    rng = random.Random(WORLD_SEED)
    world: dict[str, dict[str, str]] = {}
    for kind, values in FACTS.items():
        pool = [values[i % len(values)] for i in range(len(NAMES))]
        rng.shuffle(pool)
        world[kind] = dict(zip(NAMES, pool, strict=True))
    return world


def build_friends() -> dict[str, str]:
    """Return everybody's best friend: the next one around a shuffled circle."""
    circle = random.Random(WORLD_SEED).sample(NAMES, len(NAMES))
    return dict(zip(circle, circle[1:] + circle[:1], strict=True))


WORLD = build_world()
FRIENDS = build_friends()


@dataclass(frozen=True)
class Question:
    """A question, the sentence that answers it, and the values that could fill that sentence."""

    text: str
    frame: str
    """The answering sentence, with ``{}`` where the value belongs."""
    answer: str
    others: tuple[str, ...]
    """Wrong values, the more tempting ones first."""

    def prompt(self) -> str:
        """Return the line up to where the answer begins."""
        return f"Question: {self.text} Answer:"

    def choice(self, value: str) -> str:
        """Return an answer as it follows the prompt."""
        return " " + self.frame.format(value)

    def line(self) -> str:
        """Return the full line, answer included."""
        return f"{self.prompt()}{self.choice(self.answer)}."


@dataclass
class Story:
    """The state of one story, and the sentences told so far."""

    rng: random.Random
    lines: list[str] = field(default_factory=list)
    place: dict[str, str] = field(default_factory=dict)
    """Where each person is."""
    spot: dict[str, str] = field(default_factory=dict)
    """Where each object lies that nobody holds."""
    holder: dict[str, str] = field(default_factory=dict)
    """Who holds each object that is held."""
    colour: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """Return the story told so far as one paragraph."""
        return " ".join(["Story:", *self.lines])

    def begin(self, people: int, objects: int) -> None:
        """Introduce the people and the objects."""
        places = self.rng.sample(PLACES, people + 1)
        colours = self.rng.sample(COLOURS, objects)
        for name, place in zip(self.rng.sample(NAMES, people), places, strict=False):
            self.place[name] = place
            self.lines.append(f"{name} is in the {place}.")
        for thing, colour in zip(self.rng.sample(OBJECTS, objects), colours, strict=True):
            self.colour[thing] = colour
            self.spot[thing] = self.rng.choice(places)
            self.lines += [f"The {thing} is {colour}.", f"The {thing} is in the {self.spot[thing]}."]

    def location(self, thing: str) -> str:
        """Return where an object is, in somebody's hands or not."""
        return self.place[self.holder[thing]] if thing in self.holder else self.spot[thing]

    def step(self) -> None:
        """Let one thing happen."""
        events = (self.go, self.take, self.take, self.give, self.drop)
        self.rng.choice(events)()

    def go(self) -> None:
        """Somebody walks to another place."""
        name = self.rng.choice(list(self.place))
        self.place[name] = self.rng.choice([p for p in PLACES if p != self.place[name]])
        self.lines.append(f"{name} went to the {self.place[name]}.")

    def take(self) -> None:
        """Somebody walks to an object that lies about and takes it."""
        free = [n for n in self.place if n not in self.holder.values()]
        if not self.spot or not free:
            self.go()
            return
        thing = self.rng.choice(list(self.spot))
        name = self.rng.choice(free)
        spot = self.spot.pop(thing)
        if self.place[name] != spot:
            self.place[name] = spot
            self.lines.append(f"{name} went to the {spot}.")
        self.holder[thing] = name
        self.lines.append(f"The {thing} went to {name}.")

    def give(self) -> None:
        """Somebody hands an object to another, who comes to the same place."""
        free = [n for n in self.place if n not in self.holder.values()]
        if not self.holder or not free:
            self.take()
            return
        thing = self.rng.choice(list(self.holder))
        giver, taker = self.holder[thing], self.rng.choice(free)
        if self.place[taker] != self.place[giver]:
            self.place[taker] = self.place[giver]
            self.lines.append(f"{taker} went to the {self.place[taker]}.")
        self.holder[thing] = taker
        self.lines.append(f"The {thing} went to {taker}.")

    def drop(self) -> None:
        """Somebody leaves an object where they are."""
        if not self.holder:
            self.take()
            return
        thing = self.rng.choice(list(self.holder))
        name = self.holder.pop(thing)
        self.spot[thing] = self.place[name]
        self.lines.append(f"The {thing} fell in the {self.spot[thing]}.")


def ask(rng: random.Random, text: str, frame: str, answer: str, values: tuple[list[str], list[str]]) -> Question:
    """Return a question; ``values`` are those of the story, to be preferred as wrong answers, and all there are."""
    near = list(dict.fromkeys(v for v in values[0] if v != answer))
    far = [v for v in values[1] if v != answer and v not in near]
    rng.shuffle(near)
    rng.shuffle(far)
    return Question(text, frame, answer, tuple(near + far))


def ask_person(story: Story) -> Question:
    """Where is a person?"""
    name = story.rng.choice(list(story.place))
    near = [*story.place.values(), *story.spot.values()]
    return ask(story.rng, f"Where is {name}?", f"{name} is in the {{}}", story.place[name], (near, PLACES))


def ask_thing(story: Story) -> Question:
    """Where is an object?  When somebody carries it, where that person is."""
    thing = story.rng.choice(list(story.holder) or list(story.spot))
    near = [*story.place.values(), *story.spot.values()]
    frame = f"the {thing} is in the {{}}"
    return ask(story.rng, f"Where is the {thing}?", frame, story.location(thing), (near, PLACES))


def ask_holder(story: Story) -> Question:
    """Who holds an object?"""
    if not story.holder:
        return ask_person(story)
    thing = story.rng.choice(list(story.holder))
    frame = f"the {thing} is with {{}}"
    return ask(story.rng, f"Who has the {thing}?", frame, story.holder[thing], (list(story.place), NAMES))


def ask_colour(story: Story) -> Question:
    """What colour is an object, or the object that somebody holds?"""
    thing = story.rng.choice(list(story.holder) or list(story.spot))
    text, frame = f"What colour is the {thing}?", f"the {thing} is {{}}"
    if thing in story.holder and story.rng.random() < 0.5:
        text, frame = f"What colour is the thing that {story.holder[thing]} has?", "that thing is {}"
    return ask(story.rng, text, frame, story.colour[thing], (list(story.colour.values()), COLOURS))


def ask_about(story: Story, name: str, who: str, subject: str) -> Question:
    """What is the job, home, pet or food of a person, spoken of as ``who``?"""
    kind = story.rng.choice(list(FACTS))
    near = [WORLD[kind][other] for other in story.place]
    frame = FACT_LINES[kind].format(name=subject, value="{}")
    return ask(story.rng, f"What is the {kind} of {who}?", frame, WORLD[kind][name], (near, FACTS[kind]))


def ask_fact(story: Story) -> Question:
    """What is known of a person in the story?"""
    name = story.rng.choice(list(story.place))
    return ask_about(story, name, name, name)


def ask_friend(story: Story) -> Question:
    """What is known of the best friend of a person in the story?"""
    name = story.rng.choice(list(story.place))
    return ask_about(story, FRIENDS[name], f"the friend of {name}", "that friend")


def ask_keeper(story: Story) -> Question:
    """What is known of the one who holds an object?"""
    if not story.holder:
        return ask_friend(story)
    thing = story.rng.choice(list(story.holder))
    return ask_about(story, story.holder[thing], f"the one who has the {thing}", "that one")


ASKERS: tuple[Callable[[Story], Question], ...] = (
    ask_person,
    ask_thing,
    ask_holder,
    ask_colour,
    ask_fact,
    ask_fact,
    ask_friend,
    ask_friend,
    ask_keeper,
)


def tell(rng: random.Random) -> Story:
    """Return a story of one or two people, one or two objects and up to three events."""
    story = Story(rng)
    story.begin(rng.randint(1, 2), rng.randint(1, 2))
    for _ in range(rng.randint(0, 3)):
        story.step()
    return story


def document(rng: random.Random, questions: int = 7) -> str:
    """Return one document: a story with one fact in it, then questions with their answers."""
    story = tell(rng)
    asked = [rng.choice(ASKERS)(story).line() for _ in range(questions)]
    name, kind = rng.choice(list(story.place)), rng.choice(list(FACTS))
    story.lines.append(FACT_LINES[kind].format(name=name, value=WORLD[kind][name]) + ".")
    story.lines.append(f"The friend of {name} is {FRIENDS[name]}.")
    return "\n".join([story.text(), *asked]) + "\n"


def documents(seed: int) -> Iterator[str]:
    """Yield documents without end; the same seed gives the same documents."""
    rng = random.Random(seed)
    while True:
        yield document(rng)


def multiple_choice(seed: int, count: int) -> list[dict[str, object]]:
    """Return ``count`` questions with four choices each, the right one in every place equally often."""
    rng = random.Random(seed)
    items: list[dict[str, object]] = []
    for number in range(count):
        story = tell(rng)
        question = ASKERS[number // 4 % len(ASKERS)](story)
        gold = number % 4
        choices = rng.sample(question.others[:3], 3)
        choices.insert(gold, question.answer)
        items.append(
            {
                "id": f"story-{number:03d}",
                "query": f"{story.text()}\n{question.prompt()}",
                "choices": [question.choice(value) for value in choices],
                "gold": gold,
            }
        )
    return items


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write ``stories.jsonl`` and ``questions.jsonl``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--documents", type=int, default=2000, help="how many stories")
    parser.add_argument("--questions", type=int, default=300, help="how many questions")
    parser.add_argument("--seed", type=int, help="of other stories and questions than the shipped ones")
    args = parser.parse_args()
    text, asked = (TEXT_SEED, QUESTION_SEED) if args.seed is None else (args.seed, args.seed + 1)
    args.out.mkdir(parents=True, exist_ok=True)
    stream = documents(text)
    stories: list[dict[str, object]] = [{"text": next(stream)} for _ in range(args.documents)]
    write_jsonl(args.out / "stories.jsonl", stories)
    write_jsonl(args.out / "questions.jsonl", multiple_choice(asked, args.questions))


if __name__ == "__main__":
    main()
