from __future__ import annotations

import math

import pytest

from llm_streamline import findings
from llm_streamline.comparison import AT_CHANCE, FEW_ITEMS, units
from llm_streamline.evaluation import EXACT, Evaluation, Flips
from tests.evaluations import model, of_a_run, of_groups, pair, size, stability, task, text, timing, writing


def flips(lost: int, gained: int, p: float) -> list[Flips]:
    counts = {"items": 50, "both": 20, "neither": 30 - lost - gained, "flips": (lost + gained) / 50}
    return [Flips(task="recall", lost=lost, gained=gained, mcnemar_p=p, difference_interval=(-0.4, 0.1), **counts)]


def test_a_model_is_told_in_one_sentence_by_what_ranks():
    assert findings.sentences(of_a_run())[1] == (
        "The saved model keeps 98% of the dense model's accuracy (0.80 of 0.82 over 2 tasks; 97% above chance), "
        "stability 0.94, 6% of answers flipped, written answers right 0.36 of 0.60, decode 1.31x as fast, "
        "25% fewer bytes."
    )


def test_a_group_weighs_as_one_task_and_names_keep_their_case():
    first, second = findings.sentences(of_groups())
    assert first.startswith("one keeps 97% of the dense model's accuracy (0.58 of 0.60; 94% above chance), stability")
    assert second.startswith("two keeps 67%")


def test_a_speed_that_is_no_difference_is_called_that():
    found = pair(after={"timings": (timing(8, 1.4), timing(1, 1.05)), "size": size()}, before={"size": size()})
    assert findings.sentences(found)[0].endswith("decode 1.05x as fast (no measurable difference).")


def test_without_a_task_that_ranks_it_is_the_text_that_speaks():
    dense, saved = model("dense", [task(right=26)], [text()]), model("x", [task(right=25)], [text(2.1)])
    saved = saved.model_copy(update={"stability": [stability(both=13, lost=13, gained=12, neither=62)]})
    assert findings.sentences(Evaluation(against="dense", models=[dense, saved])) == [
        "x has 1.11 times the perplexity on stories."
    ]
    dense, saved = (one.model_copy(update={"texts": [], "size": size()}) for one in (dense, saved))
    saved = saved.model_copy(update={"size": size(3_000_000)})
    assert findings.sentences(Evaluation(against="dense", models=[dense, saved])) == [
        "x cannot be judged by accuracy (the dense model is at chance), 25% fewer bytes."
    ]
    nothing = Evaluation(against="dense", models=[model("dense"), model("x")])
    assert findings.sentences(nothing) == ["x was asked nothing that ranks."]
    assert findings.sentences(nothing.model_copy(update={"against": None})) == []


@pytest.mark.parametrize(
    "changed, doubt",
    [({}, ""), ({"effective": 19}, FEW_ITEMS), ({"both": 15, "lost": 13, "neither": 71}, AT_CHANCE)],
)
def test_stabilities_that_rank_nothing_say_why(changed, doubt):
    found = pair()
    saved = found.models[1].model_copy(update={"stability": [stability(**changed)]})
    (unit,) = units(found, saved)
    assert unit.doubt == doubt and unit.stability[0].ranks == (doubt == "")


def test_a_group_of_small_tasks_ranks_where_none_of_them_does_alone():
    names = [f"subject-{number}" for number in range(40)]
    dense = model("dense", [task(name, 4, 10, group="exam") for name in names])
    both = [stability(name, 4, 0, 0, 6) for name in names]
    saved = model("saved", dense.tasks, stability=both)
    (unit,) = units(Evaluation(against="dense", models=[dense, saved]), saved)
    assert not any(one.ranks for one in both) and unit.ranks and unit.doubt == ""
    assert unit.within_chance and not units(of_groups(), of_groups().models[2])[0].within_chance


FINE = {"lost": 2, "gained": 1}
OBJECTIONS = [
    (
        {"texts": [text()]},
        {"texts": [text(2.19)]},
        "its perplexity on stories is 1.21 times the dense model's (8.935 against 7.389)",
    ),
    ({"writing": writing(0.25)}, {"writing": writing(0.75)}, "75% of its samples go round in circles (dense: 25%)"),
    ({"writing": writing()}, {"writing": writing(early=0.5)}, "50% of its samples end at once (dense: 0%)"),
    ({}, {"flips": flips(12, 2, 0.013)}, "it loses 12 of 50 written answers on recall and gains 2 (McNemar p 0.013)"),
]
SILENT = [
    ({"texts": [text()]}, {"texts": [text(2.17)]}),
    ({"texts": [text()]}, {"texts": [text(3.0, "another")]}),
    ({"writing": writing(0.5)}, {"writing": writing(0.5)}),
    ({"writing": writing(0.5)}, {"writing": writing(0.75, early=0.25)}),
    ({"writing": writing(0.25, samples=4)}, {"writing": writing(1.0, samples=4)}),
    ({}, {"writing": writing(1.0)}),
    ({}, {"flips": flips(12, 5, 0.14)}),
    ({}, {"flips": flips(2, 12, 0.013)}),
    ({}, {}),
]


@pytest.mark.parametrize("before, after, words", OBJECTIONS)
def test_what_accuracy_does_not_see_is_warned_of(before, after, words):
    assert findings.warnings(_with(FINE, before, after)) == (
        f"The saved model keeps 99% of the accuracy, but {words}.",
    )


@pytest.mark.parametrize("before, after", SILENT)
def test_what_is_no_worse_is_not_warned_of(before, after):
    assert findings.warnings(_with(FINE, before, after)) == ()


@pytest.mark.parametrize("before, after, words", OBJECTIONS)
def test_where_accuracy_itself_tells_of_damage_there_is_no_contradiction(before, after, words):
    assert findings.warnings(_with({"lost": 9, "gained": 1}, before, after)) == ()


def _with(counts, before, after) -> Evaluation:
    found = pair(**counts)
    changes = zip(found.models, (before, after), strict=True)
    return found.model_copy(update={"models": [one.model_copy(update=change) for one, change in changes]})


def test_flips_that_accuracy_hides_are_warned_of():
    (line,) = findings.warnings(pair(lost=6, gained=5))
    assert line.endswith("but 11% of its answers on questions flipped while accuracy moved by 1.0%.")
    assert findings.warnings(pair(lost=5, gained=4)) == ()  # fewer than a tenth
    assert findings.warnings(pair(lost=10, gained=8)) != ()
    assert findings.warnings(pair(lost=1, gained=9)) == ()  # better, which accuracy shows


def test_a_difference_within_chance_is_fine_too():
    found = _with({"lost": 6, "gained": 1}, {"writing": writing()}, {"writing": writing(1.0)})
    assert findings.warnings(found) == ()
    wide = found.models[1].stability[0].model_copy(update={"difference_interval": (-0.11, 0.01)})
    saved = found.models[1].model_copy(update={"stability": [wide]})
    (line,) = findings.warnings(found.model_copy(update={"models": [found.models[0], saved]}))
    assert line.startswith("The saved model loses no accuracy that can be told from chance, but 100%")


def test_a_task_at_chance_calls_nothing_fine():
    dense, saved = model("dense", [task(right=26)], writing=writing()), model("x", [task(right=26)], writing=writing(1))
    saved = saved.model_copy(update={"stability": [stability(both=13, lost=13, gained=13, neither=61)]})
    assert findings.warnings(Evaluation(against="dense", models=[dense, saved])) == ()


def test_one_line_per_model_names_all_and_nan_is_no_good_perplexity():
    found = _with(FINE, {"texts": [text()], "writing": writing()}, {"texts": [text(math.nan)], "writing": writing(1.0)})
    (line,) = findings.warnings(found)
    assert "its perplexity on stories" in line and "; 100% of its samples" in line
    assert findings.warnings(found.model_copy(update={"against": None})) == ()


def test_written_answers_do_not_count_as_accuracy():
    dense = model("dense", [task(right=90), task("recall", 30, 50, EXACT)])
    saved = model("saved", [task(right=89), task("recall", 5, 50, EXACT)], stability=[stability(both=89, lost=1)])
    found = Evaluation(against="dense", models=[dense, saved])
    assert findings.retained(units(found, saved)) == pytest.approx(89 / 90)
