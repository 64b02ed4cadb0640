from __future__ import annotations

import pytest

from llm_streamline import scoreboard, tables
from llm_streamline.evaluation import Evaluation
from tests.evaluations import model, of_a_run, of_groups, pair, stability, task, text, timing, written


def test_bars_lie_where_their_figures_are():
    (row,) = scoreboard.board(pair()).accuracy
    dense, saved = row.bars
    assert row.mark == 25 and (dense.length, saved.length) == (90, 86) and dense.value == "0.900"
    low, high = dense.whisker
    assert low == pytest.approx(82.56, abs=0.01) and high == pytest.approx(94.48, abs=0.01)
    assert dense.range == "[0.826, 0.945]" and row.note == "100 items" and row.doubt == ""
    (row,) = scoreboard.board(pair()).stability
    assert [bar.label for bar in row.bars] == ["saved"] and row.bars[0].whisker == pytest.approx((90, 98))
    assert row.note == "100 effective of 100 items"


def test_what_ranks_nothing_says_why():
    found = scoreboard.board(of_a_run())
    assert {row.name: row.doubt for row in found.accuracy} == {
        "questions": "",
        "guessed": "at chance",
        "few": "",
        "recall": "",
    }
    assert {row.name: row.doubt for row in found.stability} == {
        "questions": "",
        "guessed": "at chance",
        "few": "a few items decide",
    }
    table = found.answers
    assert [table.rows[number][:2] for number in sorted(table.faint)] == [["guessed", "saved"], ["few", "saved"]]
    assert [row[:2] for row in table.rows][:2] == [["questions", "cut"], ["questions", "saved"]]


def test_a_model_that_was_not_asked_has_no_bar():
    found = scoreboard.board(of_a_run())
    assert [bar.label for bar in found.stability[1].bars] == ["saved"]
    assert [len(row.bars) for row in found.accuracy] == [3, 3, 3, 3]
    assert [(one.name, [label for label, *_ in one.written]) for one in found.samples] == [("a", ["dense", "saved"])]


def test_the_dense_and_the_cut_model_look_the_same_everywhere():
    assert scoreboard.colours(of_a_run()) == {"dense": "dense", "cut": "cut", "saved": "m0"}
    many = Evaluation(against="a", models=[model(label) for label in "bacdefg"])
    assert list(scoreboard.colours(many).values()) == ["m0", "dense", "m1", "m2", "m3", "m0", "m1"]
    assert "dense" not in scoreboard.colours(many.model_copy(update={"against": None})).values()


def test_groups_hold_their_tasks():
    (row,) = scoreboard.board(of_groups()).accuracy
    assert row.name == "exam" and row.note == "mean of 3 tasks, 150 items"
    assert [member.name for member in row.members] == ["law", "art", "music"]
    widths = [bar.whisker[1] - bar.whisker[0] for bar in (row.bars[0], row.members[0].bars[0])]
    assert widths[0] < 0.7 * widths[1]  # the mean of three is surer than each
    (row,) = scoreboard.board(of_groups()).stability
    assert len(row.members) == 3 and row.bars[0].whisker[0] > row.members[0].bars[0].whisker[0]


def test_a_group_of_two_metrics_is_two_and_notes_are_told():
    both = [task("a", group="suite"), task("b", metric="exact match", group="suite").model_copy(update={"note": "new"})]
    rows = scoreboard.board(Evaluation(against=None, models=[model("x", both)])).accuracy
    assert [row.name for row in rows] == ["suite (accuracy)", "suite (exact match)"]
    assert [member.note for row in rows for member in row.members] == ["100 items", "100 items, exact match; new"]


def test_speed_bars_share_one_scale_and_the_dense_model_is_the_mark():
    found = pair(after={"timings": (timing(8, 0.9), timing(1, 1.3))}, before={"timings": (timing(1), timing(8))})
    rows = scoreboard.board(found).speed
    assert [row.name for row in rows] == [
        *("decode, one sequence", "prefill, one sequence"),
        *("decode, 8 sequences at once", "prefill, 8 sequences at once"),
    ]
    assert len({row.mark for row in rows}) == 1
    assert rows[0].bars[0].length == pytest.approx(1.3 * rows[0].mark, abs=0.1)
    assert rows[2].bars[0].length < rows[2].mark and rows[2].bars[0].value == "0.90x"
    batches = [row[:2] for row in tables.timings(found).rows]
    assert batches == [["dense", "1"], ["saved", "1"], ["dense", "8"], ["saved", "8"]]


def test_odd_samples_are_marked_and_long_ones_cut():
    looping = written("on and on " * 400, repeated=0.9)
    early = written(" Oh.", "b", tokens=2)
    fine = written("Fine.", "c", tokens=2, ended=False)
    found = pair(after={"written": (looping, early, fine)})
    first, second, third = scoreboard.board(found).samples
    assert first.written[0][3] == ["goes round in circles"] and len(first.written[0][2]) == scoreboard.LONG + 1
    assert second.written[0][2:] == ("Oh.", ["ends at once"]) and third.written[0][3] == []
    many = pair(after={"written": tuple(written(name=str(number)) for number in range(20))})
    assert len(scoreboard.board(many).samples) + scoreboard.board(many).more_samples == 20


def test_texts_stand_below_one_another_with_their_ratio():
    found = pair(before={"texts": [text(2.0), text(1.0, "b")]}, after={"texts": [text(2.5), text(20.0, "b")]})
    rows = tables.texts(found).rows
    assert [row[:4] for row in rows] == [
        ["stories", "dense", "7.389", ""],
        ["stories", "saved", "12.18", "1.65 times"],
        ["b", "dense", "2.718", ""],
        ["b", "saved", "20.0 nats", "over 100 times"],
    ]


def test_columns_in_which_nothing_stands_are_left_out():
    found = pair(before={"texts": [text()]}, after={"texts": [text()]})
    assert "to dense" in tables.texts(found).head
    alone = found.model_copy(update={"against": None})
    assert "to dense" not in tables.texts(alone).head and len(tables.texts(alone).rows[0]) == 6
    assert tables.overview(of_groups()).head == ["model", "accuracy", "kept", "stability", "flipped"]


def test_models_stand_below_one_another_task_by_task():
    rows = tables.answers(of_groups()).rows
    assert [row[:2] for row in rows[:3]] == [["law", "one"], ["law", "two"], ["art", "one"]]


def test_a_group_that_a_model_was_not_asked_whole_is_not_its():
    first, one, two = of_groups().models
    part = two.model_copy(update={"tasks": two.tasks[1:], "stability": two.stability[1:]})
    (row,) = scoreboard.board(Evaluation(against="big", models=[first, one, part])).accuracy
    assert [bar.label for bar in row.bars] == ["big", "one"]
    assert [bar.label for bar in row.members[1].bars] == ["big", "one", "two"]


def test_figures_of_another_kind_have_a_table():
    one = task("summaries", metric="rouge1,none").model_copy(update={"others": {"bleu": 12.345}})
    found = Evaluation(against=None, models=[model("a", [one]), model("b", [task("summaries", metric="rouge1,none")])])
    assert tables.figures(found).rows == [
        ["summaries", "rouge1,none", "0.9 [0.826, 0.945]", "0.9 [0.826, 0.945]"],
        ["summaries", "bleu", "12.35", ""],
    ]
    assert scoreboard.board(found).accuracy == []


def test_several_models_have_an_overview_and_one_has_tiles():
    rows = tables.overview(of_groups()).rows
    assert [row[:5] for row in rows] == [["one", "0.580", "97%", "0.98", "2%"], ["two", "0.400", "67%", "0.80", "20%"]]
    assert tables.overview(pair()) is None
    found = of_a_run()
    tiles = {name: (value, more) for name, value, more in scoreboard.tiles(found, found.models[2])}
    assert tiles == {
        "accuracy": ("0.90 → 0.86", "on questions; 0.70 merely cut"),
        "stability": ("0.94", "on questions; 6% of answers flipped"),
        "speed": ("1.31x", "decode, one sequence; prefill 1.31x"),
        "weights": ("-25.0%", "4 MB → 3 MB"),
    }


def test_the_first_task_that_ranks_is_on_the_tile():
    guessed = stability("guessed", 13, 13, 12, 62)
    dense, saved = model("dense", [task("guessed", 26), task()]), model("saved", [task("guessed", 25), task(right=86)])
    saved = saved.model_copy(update={"stability": [guessed, stability()]})
    found = Evaluation(against="dense", models=[dense, saved])
    assert [more for *_, more in scoreboard.tiles(found, saved)] == [
        "on questions",
        "on questions; 6% of answers flipped",
    ]


@pytest.mark.parametrize(
    "number, words",
    [(0, "0 bytes"), (999, "999 bytes"), (6912, "6.91 kB"), (999_600, "1 MB"), (15_300_000_000, "15.3 GB")],
)
def test_bytes_are_said_as_people_say_them(number, words):
    assert tables.amount(number) == words


def test_an_evaluation_of_nothing_shows_nothing():
    found = scoreboard.board(Evaluation(against=None, models=[]))
    assert not any((found.accuracy, found.figures, found.stability, found.texts, found.timings, found.samples))
