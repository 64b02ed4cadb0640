from __future__ import annotations

import json
import re

import pytest
import torch

from llm_streamline.checkpoint import BUNDLED, Source, load_model, load_tokenizer
from llm_streamline.cli import main
from llm_streamline.demonstration import QUESTIONS
from llm_streamline.evaluate.questions import choice_scores, read_questions


def test_deleting_costs_and_the_replacement_brings_it_back(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["demo", "-o", "demo-run"])
    out = capsys.readouterr().out
    found = re.search(r"^accuracy dense (\S+) deleted (\S+) replaced (\S+)$", out, re.MULTILINE)
    assert found and "held-out loss" in out
    dense, deleted, replaced = map(float, found.groups())
    assert dense - deleted >= 0.15
    assert replaced - deleted >= 0.7 * (dense - deleted)
    assert re.search(r"^report +demo-run/report.html$", out, re.MULTILINE)
    page = (tmp_path / "demo-run" / "report.html").read_text(encoding="utf-8")
    assert f"{dense:.2f} → {replaced:.2f}" in page and f"{deleted:.2f} merely cut" in page
    (tmp_path / "demo-run" / "report.html").unlink()
    main(["demo", "-o", "demo-run", "--json"])
    assert (tmp_path / "demo-run" / "report.html").read_text(encoding="utf-8") == page
    assert json.loads(capsys.readouterr().out)["accuracy"]["replaced"] == pytest.approx(replaced, abs=0.005)


def test_questions_have_four_choices_and_gold_in_every_place():
    questions = read_questions(QUESTIONS)
    assert len(questions) >= 200
    for question in questions:
        assert len(set(question["choices"])) == 4 and question["query"].endswith("Answer:")
    counts = [sum(q["gold"] == place for q in questions) for place in range(4)]
    assert min(counts) > 0.15 * len(questions)


def test_a_choice_is_scored_by_its_own_tokens_whatever_stands_beside_it():
    source = Source(BUNDLED)
    model = load_model(source, torch.float32)
    tokenizer = load_tokenizer(source, model.config.vocab_size)
    pairs = [(q["query"], choice) for q in read_questions(QUESTIONS)[:3] for choice in q["choices"]]
    together = choice_scores(model, tokenizer, pairs)
    for (query, choice), score in zip(pairs, together, strict=True):
        before, whole = (tokenizer(text)["input_ids"] for text in (query, query + choice))
        with torch.no_grad():
            log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        by_hand = sum(log_p[place - 1, whole[place]].item() for place in range(len(before), len(whole)))
        assert score == pytest.approx(by_hand, abs=1e-4)
