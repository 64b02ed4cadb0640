"""Stability by hand, against golden numbers, and from every kind of file."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from llm_streamline.answers import Item
from llm_streamline.errors import UserError
from llm_streamline.scoring.items import read_items
from llm_streamline.scoring.stability import compare, compare_tasks, macro, weights

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


def item(name: str, ppl: list[float], gold: int, prediction: int | None = None, **changes) -> Item:
    chosen = min(range(len(ppl)), key=ppl.__getitem__) if prediction is None else prediction
    values = {"task": "t", "id": name, "measure": "whole", "ppl": ppl, "prediction": str(chosen), "gold": str(gold)}
    return Item(**{**values, **changes})


def random_items(count: int, seed: int, choices: int = 4) -> list[Item]:
    draw = random.Random(seed)
    return [item(str(i), [draw.uniform(1, 4) for _ in range(choices)], draw.randrange(choices)) for i in range(count)]


def answered_again(items: list[Item], share: float, seed: int = 1) -> list[Item]:
    draw = random.Random(seed)
    return [
        one if draw.random() < share else one.model_copy(update={"prediction": str(draw.randrange(len(one.ppl)))})
        for one in items
    ]


def test_a_worked_example():
    # two choices: the sample deviation is half the difference times the root of two
    before = [item("a", [1.0, 3.0], 0), item("b", [2.0, 2.0 + math.sqrt(2)], 1), item("c", [5.0, 5.0], 0)]
    after = [item("a", [9.0, 1.0], 0), item("b", [1.0, 2.0], 1), item("c", [1.0, 2.0], 0)]
    a, b, c = math.exp(math.sqrt(2)), math.exp(1), math.exp(0)
    found = compare(before, after)
    assert (found.TP, found.FN, found.FP, found.TN) == (1, 1, 0, 1)
    assert found.stability == pytest.approx((b + c) / (a + b + c), abs=1e-12)
    assert found.effective_items == pytest.approx((a + b + c) ** 2 / (a * a + b * b + c * c), abs=1e-12)
    assert found.agreement == pytest.approx(2 / 3) and found.flips == pytest.approx(1 / 3)
    assert found.same_answer == pytest.approx(2 / 3) and found.mcnemar_p == 1.0


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden numbers are not at hand")
def test_golden_numbers():
    expected = json.loads((GOLDEN / "stability.json").read_text())
    folders = [read_items(GOLDEN / "opencompass" / when) for when in ("before", "after")]
    (found,) = compare_tasks(*folders)
    assert found.stability == pytest.approx(expected["stability"], abs=1e-9)
    assert found.agreement == pytest.approx(expected["unweighted_agreement"], abs=1e-9)
    assert found.same_answer == pytest.approx(expected["same_prediction"], abs=1e-9)
    assert [expected[key] for key in ("TP", "FN", "FP", "TN")] == [found.TP, found.FN, found.FP, found.TN]
    assert found.task == expected["dataset"] and found.items == expected["items"]


def test_the_order_of_items_changes_nothing():
    before = random_items(200, seed=0)
    after = answered_again(before, 0.7)
    order = random.Random(5).sample(range(200), 200)
    one, other = compare(before, after), compare([before[i] for i in order], [after[i] for i in order])
    assert one.stability == pytest.approx(other.stability, abs=1e-12)
    assert (one.TP, one.FN, one.FP, one.TN) == (other.TP, other.FN, other.FP, other.TN)


def test_a_model_against_itself_is_wholly_stable():
    items = random_items(50, seed=0)
    found = compare(items, items)
    assert found.stability == pytest.approx(1.0, abs=1e-12) and found.stability_interval == (1.0, 1.0)
    assert found.flips == 0 and found.same_answer == 1 and found.mcnemar_p == 1 and found.retained == 1


def test_extreme_values_neither_overflow_nor_rank():
    before = [item(str(i), [1.0, 2.0], 0) for i in range(99)] + [item("x", [1.0, 1e6], 0)]
    found = compare(before, before)
    assert found.stability == 1.0 and found.effective_items == pytest.approx(1.0) and not found.ranks
    assert weights(before).sum() == pytest.approx(1.0)
    found = compare(before, [one.model_copy(update={"prediction": "1"}) if one.id == "x" else one for one in before])
    assert found.stability == 0.0 and all(0 <= end <= 1 for end in found.stability_interval)


def test_weights_are_the_first_models_alone():
    before = random_items(40, seed=0)
    after = answered_again(before, 0.5)
    louder = [one.model_copy(update={"ppl": [9 * value for value in one.ppl]}) for one in after]
    assert compare(before, after).stability == compare(before, louder).stability


def test_intervals_hold_the_figure_and_shrink_with_items():
    widths = []
    for count in (60, 600):
        before = random_items(count, seed=2)
        found = compare(before, answered_again(before, 0.6))
        low, high = found.stability_interval
        assert low < found.stability < high
        low, high = found.difference_interval
        assert low <= found.accuracy_after - found.accuracy_before <= high
        widths.append(high - low)
    assert widths[1] < 0.5 * widths[0]


def test_chance_is_told_and_ranks_nothing():
    guessing = random_items(100, seed=3)
    found = compare(guessing, guessing)
    assert found.chance == 0.25 and found.above_chance_p > 0.05
    assert not found.ranks and found.retained_above_chance is None
    knowing = [one.model_copy(update={"gold": one.prediction}) for one in guessing]
    found = compare(knowing, answered_again(knowing, 0.8))
    assert found.ranks and found.retained_above_chance < found.retained < 1


def test_mcnemar_tells_a_real_change_from_an_even_exchange():
    before = [item(str(i), [1.0, 2.0], 0) for i in range(40)]
    worse = [one.model_copy(update={"prediction": "1"}) if int(one.id) < 15 else one for one in before]
    assert compare(before, worse).mcnemar_p < 1e-3
    mixed = [item(str(i), [1.0, 2.0], i % 2) for i in range(40)]
    flipped = [one.model_copy(update={"prediction": "1"}) if int(one.id) < 16 else one for one in mixed]
    found = compare(mixed, flipped)
    assert found.FN == found.FP == 8 and found.mcnemar_p == 1.0


def test_tasks_weigh_the_same_in_the_mean():
    small, large = random_items(10, seed=0), [one.model_copy(update={"task": "u"}) for one in random_items(90, seed=1)]
    found = [compare(small, small), compare(large, answered_again(large, 0.0))]
    assert macro(found)["stability"] == pytest.approx((found[0].stability + found[1].stability) / 2)


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample(number: int, scores: list[float], target: object, texts: list[str]) -> dict:
    calls = {f"gen_args_{i}": {"arg_0": "Q:", "arg_1": text} for i, text in enumerate(texts)}
    answers = [[str(score), "False"] for score in scores]
    return {"doc_id": number, "target": str(target), "arguments": calls, "filtered_resps": answers, "acc": 1.0}


def test_our_items_are_read_back(tmp_path):
    items = random_items(5, seed=0)
    write(tmp_path / "t.jsonl", [json.loads(one.model_dump_json()) for one in items])
    assert list(read_items(tmp_path)["t"].values()) == items
    assert read_items(tmp_path / "t.jsonl") == read_items(tmp_path)


def test_samples_of_lm_eval_are_read_as_choice_only_per_byte(tmp_path):
    write(tmp_path / "m" / "samples_arc_easy_2026-01-01T00-00-00.1.jsonl", [sample(0, [-9.0, -1.0], 0, [" a", " b"])])
    rows = [sample(0, [-6.0, -8.0], 0, [" no", " é é"]), sample(1, [-6.0, -4.0], " b", [" a", " b"])]
    write(tmp_path / "m" / "samples_arc_easy_2026-01-02T00-00-00.1.jsonl", rows)
    (tmp_path / "m" / "results_2026-01-02T00-00-00.1.json").write_text('{"results": {"arc_easy": {}}}')
    items = read_items(tmp_path)["arc_easy"]
    assert items["0"].ppl == [2.0, 8 / 6] and items["0"].measure == "choice", "bytes, not characters"
    assert items["0"].prediction == "1" and not items["0"].right and items["1"].right
    assert len(items) == 2, "of two logs of one task, the last"


@pytest.mark.parametrize(("acc", "gold"), [(1.0, "1"), (0.0, "0")])
def test_choices_that_differ_in_the_context_alone_take_the_logs_verdict(tmp_path, acc, gold):
    # winogrande's log gives the continuation as the target, which both choices have
    row = sample(0, [-9.0, -1.0], "because it broke", ["because it broke"] * 2) | {"acc": acc}
    row["arguments"]["gen_args_1"]["arg_0"] = "another"
    write(tmp_path / "samples_winogrande_2026-01-01T00-00-00.1.jsonl", [row])
    item = read_items(tmp_path)["winogrande"]["0"]
    assert item.gold == gold and item.right == (acc == 1.0)


def test_a_right_answer_that_is_not_said_is_refused(tmp_path):
    row = sample(0, [-9.0, -1.0, -2.0], "it", ["it"] * 3)
    write(tmp_path / "samples_t_2026-01-01T00-00-00.1.jsonl", [row])
    with pytest.raises(UserError, match="says which choice is right"):
        read_items(tmp_path)


def test_lines_end_at_line_feeds_only(tmp_path):
    row = sample(0, [-9.0, -1.0], 0, [" a\u2028b", " c\x85"])
    path = tmp_path / "samples_t_2026-01-01T00-00-00.1.jsonl"
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(read_items(path)["t"]) == 1


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.jsonl", "5\n", "line 1, is no item"),
        ("samples_t_2026-01-01T00.jsonl", "5\n", "no multiple-choice sample"),
        ("samples_t_2026-01-01T00.jsonl", '{"doc_id": 0, "arguments": [["a"]]}\n', "no multiple-choice sample"),
        ("samples_t_2026-01-01T00.jsonl", '{"doc_id": 0, "arguments": null}\n', "no multiple-choice sample"),
        ("t.json", '{"0": {"label: 0": 3.0, "prediction": "A", "gold": "A"}}', "item 0, has no PPL per choice"),
        ("t.json", '{"0": {"label: 0": {"PPL": true}, "prediction": "A", "gold": "A"}}', "item 0, has no PPL"),
        ("t.json", '{"0": {"label: 0": {"PPL": 1}, "prediction": null, "gold": null}}', "item 0, has no PPL"),
        ("t.json", "[" * 100_000, "is not JSON"),
        ("t.jsonl", '{"task": "t"}\n', "line 1, is no item of an evaluation"),
        ("t.jsonl", '{"task": \n', "line 1, is not JSON"),
        ("t.json", "{", "is not JSON"),
        ("t.json", '{"0": {"prediction": "A", "gold": "A"}}', "item 0, has 0 choice"),
        ("t.json", '{"results": {}}', "holds no items"),
        ("samples_t_2026-01-01T00.jsonl", '{"doc_id": 0, "resps": [["text"]]}\n', "no multiple-choice sample"),
    ],
)
def test_files_that_hold_something_else_are_one_sentence(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_items(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_compared_is_refused(tmp_path):
    items = random_items(4, seed=0)
    tasks = {"t": {one.id: one for one in items}}
    with pytest.raises(UserError, match="no task in common"):
        compare_tasks(tasks, {"u": tasks["t"]})
    with pytest.raises(UserError, match=r"4 items before and 3 after .item '3'"):
        compare_tasks(tasks, {"t": {one.id: one for one in items[:3]}})
    with pytest.raises(UserError, match="mixes PPL"):
        compare(items, [one.model_copy(update={"measure": "choice"}) for one in items])
    with pytest.raises(UserError, match="another question"):
        compare(items, [one.model_copy(update={"gold": "x"}) for one in items])
    with pytest.raises(UserError, match="a PPL that is no number"):
        write(tmp_path / "a.jsonl", [{**json.loads(items[0].model_dump_json()), "ppl": [1.0, math.nan]}])
        read_items(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        read_items(tmp_path / "nowhere")
