"""Groups of tasks: lm-eval's subjects as one score, in the record and on the terminal."""

from __future__ import annotations

import json
from statistics import fmean

import pytest

from llm_streamline import report
from llm_streamline.cli import main
from llm_streamline.evaluation import Evaluation, ModelScore, Request, TaskScore
from llm_streamline.recipe import Runtime
from llm_streamline.report import accuracy_table, evaluation_lines
from llm_streamline.run import evaluate
from llm_streamline.scoring import tasks as tasks_module
from llm_streamline.scoring.groups import grouped
from llm_streamline.scoring.stability import macro
from tests.test_evaluate import models  # noqa: F401
from tests.test_tasks import make_jsonl, make_yaml

SIZES = (2, 5, 11)


@pytest.fixture
def examination(tmp_path, monkeypatch) -> str:
    """A group of lm-eval's of more subjects than the terminal lists, of unequal sizes, and one task beside it."""
    manager = pytest.importorskip("lm_eval.tasks", exc_type=ImportError).TaskManager
    for size in SIZES:
        name = f"subject_{size}"
        jsonl = make_jsonl(tmp_path / f"{name}.jsonl", size)
        make_yaml(tmp_path, jsonl, name, more="tag: subjects\nmetric_list: [{metric: acc}]")
    (tmp_path / "exam.yaml").write_text("group: examination\ntask: [{group: half, task: [subjects]}]\n")
    found = manager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(report, "MOST_OF_A_GROUP", len(SIZES) - 1)
    monkeypatch.setattr(tasks_module, "_index", lambda include_defaults: found)
    return str(make_jsonl(tmp_path / "q.jsonl", 4))


@pytest.mark.filterwarnings("ignore")
def test_every_subject_weighs_the_same(tmp_path, models, examination):  # noqa: F811
    request = Request(models=models[1], against=models[0], tasks=("examination", examination))
    found = evaluate(request, Runtime(output=tmp_path / "out", quiet=True, compute="float32"))
    dense, other = found.models
    subjects = [task for task in other.tasks if task.group]
    assert len(subjects) == len(SIZES) and {task.group for task in subjects} == {"examination"}
    ((of_dense,), (one,)) = dense.groups, other.groups
    assert (one.tasks, one.items) == (len(SIZES), sum(SIZES))
    assert one.value == pytest.approx(fmean(task.value for task in subjects))
    weighed = sum(task.value * task.items for task in subjects) / one.items
    assert one.value != pytest.approx(weighed), "else the test cannot tell"
    stable = [stability for stability in other.stability if stability.task.startswith("subject_")]
    assert len(stable) == len(SIZES) and one.stability == macro(stable)["stability"] and of_dense.stability is None
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (
        written["models"][1]["groups"][0]["value"] == one.value and len(written["models"][1]["tasks"]) == len(SIZES) + 1
    )
    shown = evaluation_lines(found)
    tables = [line for line in shown if not isinstance(line, str)]
    first = [[str(cell) for cell in table.columns[index].cells] for table, index in zip(tables, (1, 1, 0), strict=True)]
    assert first == [["q", "q"], ["examination", "examination"], ["q"]], "subjects are in evaluation.json only"


def score(task: str, value: float, group: str | None = None, metric: str = "accuracy") -> TaskScore:
    return TaskScore(
        task=task, metric=metric, value=value, interval=None, items=10, right_by_ppl=None, measure=None, cut=None,
        group=group,
    )  # fmt: skip


def test_a_short_group_is_listed_and_metrics_are_not_mixed():
    some = [score("a", 0.5, "g"), score("b", 0.7, "g"), score("c", 0.1, "g", "rougeL,none"), score("d", 0.9)]
    model = ModelScore(label="m", model="m", fingerprint="", compute="", tasks=some, texts=[])
    found = [(one.group, one.metric, one.tasks, one.items, round(one.value, 9)) for one in grouped(model)]
    assert found == [("g", "accuracy", 2, 20, 0.6), ("g", "rougeL,none", 1, 10, 0.1)]
    evaluation = Evaluation(against=None, models=[model])
    assert list(accuracy_table(evaluation).columns[1].cells) == ["a", "b", "c", "d"]


def item(number: int, gold: int, low: int) -> str:
    ppl = [1.0, 1.0]
    ppl[low] = 0.5
    return json.dumps(
        {"task": "t", "id": str(number), "measure": "whole", "ppl": ppl, "prediction": str(low), "gold": str(gold)}
    )


def test_stability_of_several_tasks_ends_with_their_average(tmp_path, capsys):
    """One task of two questions, one of eight: each weighs the same."""
    for model, wrong in (("before", 0), ("after", 1)):
        (tmp_path / model).mkdir()
        for task, size in (("a", 2), ("b", 8)):
            lines = [item(number, 0, wrong if number == 0 else 0) for number in range(size)]
            (tmp_path / model / f"{task}.jsonl").write_text("\n".join(lines).replace('"t"', f'"{task}"'))
    main(["stability", str(tmp_path / "before"), str(tmp_path / "after")])
    words = "macro average over 2 tasks: accuracy 1.000 -> 0.688, stability 0.688, flips 0.312"
    assert words in capsys.readouterr().out
    main(["stability", str(tmp_path / "before" / "a.jsonl"), str(tmp_path / "after" / "a.jsonl")])
    assert "macro" not in capsys.readouterr().out
    main(["stability", str(tmp_path / "before"), str(tmp_path / "after"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["macro"]["stability"] == pytest.approx((1 / 2 + 7 / 8) / 2) and len(found["tasks"]) == 2
