from __future__ import annotations

import json
import re

import pytest

from llm_streamline.cli import main
from llm_streamline.demo import stories
from llm_streamline.demonstration import QUESTIONS
from llm_streamline.scoring.questions import read_questions


def test_deleting_costs_and_the_replacement_brings_it_back(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["demo", "-o", "demo-run"])
    out = capsys.readouterr().out
    found = re.search(r"^accuracy dense (\S+) deleted (\S+) replaced (\S+)$", out, re.MULTILINE)
    assert found and "validation loss" in out
    dense, deleted, replaced = map(float, found.groups())
    assert dense - deleted >= 0.15
    assert replaced - deleted >= 0.7 * (dense - deleted)
    assert re.search(r"^report +demo-run/report.html$", out, re.MULTILINE)
    page = (tmp_path / "demo-run" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "demo-run" / "report.html").unlink()
    main(["demo", "-o", "demo-run", "--json"])
    assert (tmp_path / "demo-run" / "report.html").read_text(encoding="utf-8") == page
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    assert accuracy["replaced"] == pytest.approx(replaced, abs=0.005)
    assert all(f"{value:.3f} <span>" in page for value in accuracy.values()), "a bar for each of the three"


def test_questions_have_four_choices_and_gold_in_every_place():
    questions = read_questions(QUESTIONS)
    assert len(questions) >= 200
    for question in questions:
        assert len(set(question.choices)) == 4 and question.query.endswith("Answer:")
    counts = [sum(question.gold == place for question in questions) for place in range(4)]
    assert min(counts) > 0.15 * len(questions)


def test_stories_of_another_seed_are_others_and_always_the_same(tmp_path, monkeypatch):
    def written(folder, seed):
        where = str(tmp_path / folder / "new")
        monkeypatch.setattr(
            "sys.argv", ["stories", "--out", where, "--documents", "3", "--questions", "2", "--seed", seed]
        )
        stories.main()
        return [(tmp_path / folder / "new" / f"{name}.jsonl").read_text() for name in ("stories", "questions")]

    one, again, other = written("a", "1"), written("b", "1"), written("c", "2")
    assert one == again and [len(text.splitlines()) for text in one] == [3, 2]
    assert all(mine != its for mine, its in zip(one, other, strict=True))
