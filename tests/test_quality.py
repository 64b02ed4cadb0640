"""The tables that are made of measured rows."""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import pytest
import torch

from bench import continuation, control, quality, quality_table, quality_tokens
from bench import windows as bench_windows
from bench.quality import METHODS, Judge, asked, described, learns_text
from bench.quality_table import Compared, differences, read
from bench.rows import SUFFIX, judged_by, read_row, write_row
from llm_streamline.checkpoint import Source, load_model
from llm_streamline.records import Window
from tests import tiny

DOCUMENTS = ((20.0, 10), (60.0, 30))  # nats, tokens
SPREAD, EVEN = [1.0, 3.0], [1.0, 1.0]  # PPL of a question's choices: the second weighs less (Eq. 5)


def row(method: str, added: tuple[float, float], right: tuple[bool, bool], **values) -> dict:
    documents = [[nats + more, tokens] for (nats, tokens), more in zip(DOCUMENTS, added, strict=True)]
    items = [[ppl, one, one] for ppl, one in zip((SPREAD, EVEN), right, strict=True)]
    own = {"method": method, "remove": "25%", "seed": 0, "documents": documents, "items": items, "window": "1:3"}
    costs = {"cpu_seconds": 10.0, "training_seconds": 4.0, "memory": 2e6, "validation": 0.1}
    return {**own, **costs, "trained": 100, **values}


ROWS = {
    "dense": row("dense", (0, 0), (True, False)),
    "first-0": row("default", (4, 4), (True, False)),
    "first-1": row("default", (8, 8), (True, False), seed=1, cpu_seconds=8.0),
    "other-0": row("paper", (8, 8), (False, False), training_seconds=8.0),
    "other-1": row("paper", (12, 12), (False, False), seed=1, training_seconds=6.0),
    "every-0": row("healed", (0, 4), (True, True), trained=109),
    "one-0": row("control", (-2, -2), (True, False), trained=99, window=""),
    "one-1": row("control", (-6, -2), (True, False), trained=99, window="", seed=1),
    "all-0": row("control-all", (-8, -4), (True, False), trained=900, window=""),
}


@pytest.fixture
def folder(tmp_path):
    for name, values in ROWS.items():
        write_row(tmp_path / f"{name}{SUFFIX}", values)
    return tmp_path


def test_figures_are_over_all_tokens_and_seeds(folder):
    dense, found = read(folder)
    default, paper = (Compared(dense, found["25%"][name]) for name in ("default", "paper"))
    assert default.excess() == pytest.approx((8 + 16) / 2 / 40) and paper.excess() == pytest.approx((16 + 24) / 2 / 40)
    assert default.stability() == 1 and default.accuracy() == 0.5
    weight = pytest.approx(1 / (1 + 2.718281828 ** -(2**0.5)))  # of the first question, which spreads by sqrt(2)
    assert 1 - paper.stability() == weight and paper.accuracy() == 0


def test_a_constant_difference_has_no_interval_and_seeds_are_paired(folder):
    dense, found = read(folder)
    default, paper = (Compared(dense, found["25%"][name]) for name in ("default", "paper"))
    default.tokens = paper.tokens = default.tokens * 0 + 20  # so that no document weighs more
    gaps = differences(paper, default, np.random.default_rng(0))
    assert gaps["excess"] == pytest.approx((0.2, 0.2))  # seeds differ by as much, which falls out
    assert gaps["accuracy"][0] == -1 and gaps["accuracy"][1] == 0  # one of two questions is drawn twice, or never


def test_seeds_that_differ_widen_the_interval():
    default, paper = (Compared(ROWS["dense"], [ROWS[f"{name}-0"], ROWS[f"{name}-1"]]) for name in ("first", "other"))
    default.tokens = paper.tokens = default.tokens * 0 + 20
    paper.extra[1] += 8  # 4 nats more than the default with one seed, 12 with the other
    gaps = differences(paper, default, np.random.default_rng(0))
    assert gaps["excess"] == pytest.approx((4 / 20, 12 / 20))  # a quarter of the draws have but one seed


def test_each_league_has_its_own_control_and_the_same_seeds(folder):
    dense, found = read(folder)
    methods = found["25%"]
    methods["default-text"], methods["uidl"] = methods["default"], methods["healed"]
    over = quality_table.controls(dense, methods)
    assert over["default-text"].excess() == pytest.approx(((8 + 4) + (16 + 8)) / 2 / 40)
    assert over["uidl"].excess() == over["healed"].excess() == pytest.approx((4 + 12) / 40)
    assert over["default"].excess() == pytest.approx((8 + 16) / 2 / 40), (
        "the dense model has nothing to learn from itself"
    )
    del methods["control"][1]  # of a seed that the default has
    assert quality_table.controls(dense, methods)["default-text"].excess() == pytest.approx((8 + 4) / 40)
    methods["control"][0]["seed"] = 7
    assert "default-text" not in quality_table.controls(dense, methods), "no seed has both"
    del found["25%"]["control-all"]
    assert quality_table.controls(dense, found["25%"]) == {}


def test_excess_over_the_control_has_its_own_interval(folder, capsys):
    dense, found = read(folder)
    methods = found["25%"]
    methods["default-text"] = [{**one, "method": "default-text"} for one in methods["default"]]
    quality_table.table(dense, methods, "default")
    line = next(line for line in capsys.readouterr().out.splitlines() if "`default-text`" in line)
    cells = [cell.strip() for cell in line.split("|")][1:-1]
    assert cells[3:5] == ["0.3000", "[+0.0000, +0.0000]"] and cells[5] == "0.4500"
    low, high = (float(end) for end in cells[6].strip("[]").split(","))
    assert (low, high) == pytest.approx((4 / 60, 12 / 20), abs=1e-4), "the controls' -4 to -8 of 40 tokens"


def test_the_tables_show_them(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quality_table", str(folder), "--costs"])
    quality_table.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| `default` (2) | 1:3 | 100 | 0.3000 |  | 0.3000 |  | 1.0000 |  | 0.5000 |  | 9 |" in lines
    assert "| `paper` (2) | 100 | 6 | 1.50 | 10 | 1.25 | 2 | 1.00 |" in lines
    widths = [[line.count("|") for line in lines[at : at + 3]] for at, line in enumerate(lines) if "| method" in line]
    assert len(widths) == 3 and all(min(width) == max(width) for width in widths)


def test_budgets_stand_beside_each_other_and_are_drawn(folder, tmp_path, capsys, monkeypatch):
    figure = tmp_path / "tokens.png"
    asked = ["quality_tokens", f"5k={folder}", f"500k={folder}", "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", asked)
    quality_tokens.main()
    assert "| `default` | 0.3000 | 0.3000 |" in capsys.readouterr().out.splitlines()
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_what_one_budget_alone_has_is_no_course(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("dense", "first-0"):
        write_row(other / f"{name}{SUFFIX}", ROWS[name])
    assert set(quality_tokens.excesses({"5k": other, "500k": folder}, "25%")) == {"default"}
    assert "paper" in quality_tokens.excesses({"500k": folder}, "25%")


def test_a_control_trains_a_layer_or_all_of_the_dense_model_and_removes_nothing(
    llama_folder, text_file, tmp_path, monkeypatch
):
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(text_file.read_text(encoding="utf-8").splitlines(keepends=True)[:20]), encoding="utf-8")
    words = ["control", str(tmp_path), "--model", str(llama_folder), "--data", str(text_file), "--heldout"]
    monkeypatch.setattr(sys, "argv", [*words, str(heldout), "--seeds", "0", "--tokens", "4000", "--remove", "2"])
    control.main()
    one, every = (read_row(tmp_path / f"{name}-2-0{SUFFIX}") for name in ("control", "control-all"))
    assert every["trained"] == tiny.LAYERS * one["trained"] > 0 and one["tokens"] == every["tokens"] > 0
    assert every["validation"] < one["validation"] < 0, "both learn, all layers more"
    dense = Judge(str(llama_folder), heldout, None).row(load_model(Source(str(llama_folder)), torch.float32))
    total = [sum(nats for nats, _ in row["documents"]) for row in (dense, one, every)]
    assert total[0] > total[1] > total[2], "what has been trained is what is judged"


@pytest.mark.parametrize(
    ("name", "given"), [("default", "25%"), ("none", "25%"), ("ghost", "2"), ("linearpatch-kl", "2")]
)
def test_a_map_between_two_layers_is_no_layer_that_is_kept(name, given):
    assert asked(name, "25%", 12) == given


def test_shares_are_rounded_as_the_tool_rounds_them():
    assert [asked("ghost", remove, 10) for remove in ("25%", "35%", "3")] == ["2", "3", "2"]


def options(rows, model, **changes):
    values = {"rows": rows, "model": str(model), "data": "a/text.jsonl", "tokens": ["500k"], "heldout": None}
    asked = {"questions": None, "methods": ["default", "paper"], "remove": ["2"], "seeds": [0, 1]}
    return argparse.Namespace(**{**values, **asked, **changes})


def test_rows_are_added_one_by_one_and_those_there_are_not_measured_again(llama_folder, tmp_path, monkeypatch, capsys):
    measured = []

    def shortened(values, scratch, judge):
        measured.append((values.get("preset"), values["seed"]))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return {"validation": 0.1, "seconds": 7200.0}

    monkeypatch.setattr(quality, "shortened", shortened)
    monkeypatch.setattr(quality, "remember", lambda: None)
    monkeypatch.setattr(Judge, "row", lambda *_: {"documents": [], "items": []})
    way = options(tmp_path / "rows", llama_folder, tokens="500k")
    with pytest.raises(KeyboardInterrupt):
        quality.add_rows(way)
    assert capsys.readouterr().err.splitlines()[-1] == "3 rows to go, about 6.0 h"
    quality.add_rows(way)
    assert measured == [(None, 0), ("paper", 0), ("paper", 0), (None, 1), ("paper", 1)]
    row = read_row(tmp_path / "rows" / f"paper-2-1{SUFFIX}")
    assert row["method"] == "paper" and row["asked"]["data"] == "text.jsonl" and row["asked"]["tokens"] == "500000"


@pytest.mark.parametrize(
    ("changes", "told"), [({"tokens": "5k"}, "another tokens;"), ({"data": "b/other.jsonl"}, "another data;")]
)
def test_a_row_is_not_taken_for_that_of_another_text_or_budget(llama_folder, tmp_path, changes, told):
    way = options(tmp_path, llama_folder, tokens="500k", methods=["paper"], seeds=[0])
    first = quality.missing(way, {})[0]
    write_row(first.file, {"method": "paper", "asked": described(first.values)})
    assert quality.missing(way, {}) == []
    with pytest.raises(SystemExit, match=told):
        quality.missing(argparse.Namespace(**{**vars(way), **changes}), {})


def test_rows_say_by_which_text_and_questions_and_take_no_others(llama_folder, tmp_path, monkeypatch):
    texts = [tmp_path / name / "heldout.jsonl" for name in ("one", "other")]
    for number, file in enumerate(texts):
        file.parent.mkdir()
        file.write_text(json.dumps({"text": f"some words {number}"}) + "\n", encoding="utf-8")
    monkeypatch.setattr(quality, "remember", lambda: None)
    found = {"validation": 0.1, "seconds": 1.0}
    monkeypatch.setattr(quality, "shortened", lambda _, __, judge: {**found, **judge.row(None)})
    monkeypatch.setattr(Judge, "_row", lambda *_: {"documents": [], "items": []})
    monkeypatch.setattr(control, "controlled", lambda _, __, judge: {**found, **judge.row(None)})
    way = options(tmp_path / "rows", llama_folder, tokens="500k", heldout=texts[0], methods=["paper"], seeds=[0])
    for add in (quality.add_rows, control.add_controls):
        add(way)
    for name in ("dense", "paper-2-0", "control-2-0", "control-all-2-0"):
        row = read_row(way.rows / f"{name}{SUFFIX}")
        assert row["judged_by"] == judged_by(heldout=texts[0], questions=None), name
        assert row["asked"]["model"] == llama_folder.name, name
    assert read_row(way.rows / f"control-2-0{SUFFIX}")["asked"]["loss"] == "lm"
    other = argparse.Namespace(**{**vars(way), "heldout": texts[1]})
    for add in (quality.add_rows, control.add_controls):
        with pytest.raises(SystemExit, match="another heldout;"):
            add(other)
    with pytest.raises(SystemExit, match=r"dense.*another heldout;"):
        quality.add_rows(argparse.Namespace(**{**vars(other), "methods": []}))
    (way.rows / f"dense{SUFFIX}").unlink()
    with pytest.raises(SystemExit, match=r"paper-2-0.*another heldout;"):
        quality.add_rows(other)
    assert not (way.rows / f"dense{SUFFIX}").exists()
    quality.add_dense(other, Judge(str(llama_folder), texts[1], None))
    with pytest.raises(SystemExit, match=r"rows judged by different files: .*; keep one folder for each"):
        read(way.rows)


def test_rows_of_a_second_budget_lie_beside(tmp_path):
    found = list(quality.budgets(options(tmp_path / "rows", "m", tokens=["500k", "5k"])))
    assert [(one.tokens, one.rows.name) for one in found] == [("500k", "rows"), ("5k", "rows-5k")]


def several(*words):
    given = ["rows", "--model", "a/one", "b/two", "--tokens", "5k", "50k", "--data", *words]
    return list(quality.leagues(quality.flags(None).parse_args(given)))


def test_each_model_has_its_own_text_and_rows_for_each_budget():
    found = several("a.jsonl", "b.jsonl", "--heldout", "c.jsonl", "d.jsonl")
    assert [(one.model, one.tokens, str(one.rows)) for one in found] == [
        (model, tokens, f"rows/{model[2:]}{more}")
        for model in ("a/one", "b/two")
        for tokens, more in (("5k", ""), ("50k", "-50k"))
    ]
    assert [(one.data, str(one.heldout), one.questions) for one in found[::2]] == [
        ("a.jsonl", "c.jsonl", None),
        ("b.jsonl", "d.jsonl", None),
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a.jsonl"], "--data has to be given once for each of the 2 models"),
        (["a.jsonl", "b.jsonl", "--questions", "c.jsonl"], "--questions has to be"),
        (["a.jsonl", "b.jsonl", "--model", "a/one", "b/one"], "two have the same name"),
    ],
)
def test_texts_that_are_not_one_for_each_model_are_refused(words, told):
    with pytest.raises(SystemExit, match=told):
        several(*words)


def test_a_ranking_is_of_one_model(llama_folder, tmp_path, monkeypatch):
    asked = []
    for stage in ("rank", "survey"):
        monkeypatch.setattr(quality.selection, stage, lambda model, *_: asked.append(model.name_or_path))
    monkeypatch.setattr(quality.run, "measure", quality.run.measure)
    quality.remember()
    model, blocks = load_model(Source(str(llama_folder)), torch.float32), torch.zeros(1, 4, dtype=torch.long)
    for name in ("one", "one", "two"):
        model.name_or_path = name
        quality.selection.rank(model, blocks, 1, [], "loss")
        quality.selection.survey(model, blocks, 1, [], "loss")
    assert asked == ["one", "one", "two", "two"]


def test_questions_are_of_every_piece_and_its_wrong_choices_of_other_documents(tmp_path):
    words = {name: [f"{name}{number}" for number in range(130)] for name in "abcd"}
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": " ".join(own)}) + "\n" for own in words.values()), encoding="utf-8")
    continuation.main(str(tmp_path / "out.jsonl"), str(text))
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(found) == 8 and found[1]["query"].split() == words["a"][64:114]
    assert found[1]["choices"][found[1]["gold"]].split() == words["a"][114:128]
    assert all(sorted(choice[0] for choice in one["choices"]) == list("abcd") for one in found)
    text.write_text(json.dumps({"text": " ".join(words["a"])}) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="fewer than 4 documents"):
        continuation.main(str(tmp_path / "out.jsonl"), str(text))


def test_how_questions_are_made_is_explained(capsys):
    with pytest.raises(SystemExit, match="0"):
        continuation.main("--help")
    assert "no word is in two" in capsys.readouterr().out


def test_the_defaults_window_is_held_against_the_best_one():
    losses = {Window(start=start, stop=start + 2): loss for start, loss in ((1, 3.5), (2, 3.2), (3, 3.25))}
    told = bench_windows.beside_best(Window(start=3, stop=5), 3.0, losses)
    assert told.endswith("3:5: 0.2500 nats over the dense model's 3.0000; the best is 2:4: 0.2000; 1.250 times")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_choices_that_share_a_forward_are_answered_as_alone(name, tmp_path, monkeypatch):
    folder, path = tiny.make_folder(tmp_path / "model", name), tmp_path / "questions.jsonl"
    asked = [
        {"id": 0, "query": "one two three", "choices": ["four", "five six", "three two one", "five"], "gold": 1},
        {"id": 1, "query": "a", "choices": ["b c d e", "c"], "gold": 0},
        {"id": 2, "query": "x y z x y z x y", "choices": ["z", "y", "x x"], "gold": 2},
        {"id": 3, "query": " ".join(["a", "b"] * 100), "choices": ["c", "d " * 9, "e"], "gold": 0},  # cut at the front
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in asked), encoding="utf-8")
    monkeypatch.setattr(quality, "multiplies_bfloat16", lambda device: False)  # which rounds by shapes
    judge, model = Judge(str(folder), None, path), load_model(Source(str(folder)), torch.float32).eval()
    alone = judge.row(model)["items"]
    monkeypatch.setattr(quality, "MANY", 0)
    for one, other in zip(alone, judge.row(model)["items"], strict=True):
        assert other[0] == pytest.approx(one[0], abs=1e-5) and other[1:] == one[1:]


def test_what_learns_from_the_text_is_told_by_its_losses():
    told = {name for name in METHODS if learns_text(name)}
    assert told == {"lora", "uidl", "last-n-head", "default-text", "healed", "healed-text"}
