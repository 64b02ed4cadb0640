"""The bundled suite: its questions, and that they can be answered. Those of lm-eval are in test_paper."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from scipy import stats

from llm_streamline.checkpoint import Source, context_length, load_config, load_model, load_tokenizer
from llm_streamline.scoring import suites
from llm_streamline.scoring.given import open_tasks
from llm_streamline.scoring.questions import Question, answers, encode, read_questions

QUICK = [Path(name) for name in suites.SUITES["quick"]]
MAKER = suites.HERE / "quick" / "make_tasks.py"


@pytest.fixture(scope="module")
def quick() -> dict[str, list[Question]]:
    return {path.stem: read_questions(path) for path in QUICK}


def test_the_bundled_tasks_are_what_their_script_makes():
    made = runpy.run_path(str(MAKER))["tasks"]()
    assert made.keys() == {path.name for path in QUICK}
    for path in QUICK:
        assert path.read_text(encoding="utf-8") == made[path.name], f"run python {MAKER}"


def test_bundled_questions_are_sound(quick):
    assert {name: len(asked) for name, asked in quick.items()} == {
        "quick-continuation": 84,
        "quick-grammar": 80,
        "quick-facts": 60,
    }
    for name, asked in quick.items():
        size = 2 if name == "quick-grammar" else 4
        assert all(len(set(question.choices)) == len(question.choices) == size for question in asked)
        assert len({(question.query, question.choices) for question in asked}) == len(asked)
        places = Counter(question.gold for question in asked)
        assert len(places) == size and max(places.values()) - min(places.values()) <= 1, name


def test_the_right_continuation_is_the_passages_own_and_the_others_are_not(quick):
    passages = [" ".join(text.split()) for text in (MAKER.parent / "passages.txt").read_text().split("\n\n")]
    for question in quick["quick-continuation"]:
        (passage,) = (passage for passage in passages if passage.startswith(question.query + " "))
        assert [choice in passage for choice in question.choices].index(True) == question.gold
        assert sum(choice in passage for choice in question.choices) == 1
        assert all(len(choice.split()) == 12 for choice in question.choices)


def test_a_right_fact_is_the_first_of_its_line(quick):
    lines = (MAKER.parent / "facts.txt").read_text().splitlines()
    for line, question in zip(lines, quick["quick-facts"], strict=True):
        query, right, *wrong = (part.strip() for part in line.split("|"))
        assert question.query == query and question.choices[question.gold] == f"{right}."
        assert {*question.choices} == {f"{one}." for one in (right, *wrong)}


def test_bundled_openings_are_several_and_not_short():
    rows = [json.loads(line) for line in (MAKER.parent / "prompts.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 6
    assert all(20 <= len(row["prompt"].split()) <= 40 for row in rows)


def test_the_bundled_suites_name_stands_for_its_tasks(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # which it does not need
    found = open_tasks(["quick"], 2)
    assert [task.name for task in found] == ["quick-continuation", "quick-grammar", "quick-facts"]
    assert [len(task.questions) for task in found] == [2, 2, 2]


@pytest.mark.slow
def test_a_small_model_answers_the_bundled_suite_better_than_by_guessing(shared, quick):
    source = Source(str(shared / "models" / "prose-llama-10m"))
    model, tokenizer = load_model(source, torch.float32), load_tokenizer(source, load_config(source).vocab_size)
    for name, chance in (("quick-continuation", 0.25), ("quick-grammar", 0.5)):
        rows = encode(tokenizer, quick[name], context_length(model.config))
        right = sum(item.likeliest_right for item in answers(model, quick[name], rows, name, quiet=True))
        assert stats.binomtest(right, len(rows)).proportion_ci().low > chance
