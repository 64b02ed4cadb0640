from __future__ import annotations

import json

import pytest

from llm_streamline import assemble, oracle, run
from llm_streamline.comparison import _of_tasks, mean_accuracy, mean_stability
from llm_streamline.errors import UserError
from llm_streamline.evaluation import Sweep
from llm_streamline.files import remove
from llm_streamline.lock import run_lock
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.sweep import _place, plans, sweep
from llm_streamline.sweep_figure import PANELS, panels
from tests import tiny
from tests.evaluations import model, stability, task


@pytest.fixture(autouse=True)
def in_process(monkeypatch) -> None:
    monkeypatch.setattr(assemble, "verify", oracle.check)


@pytest.fixture
def recipe(llama_folder, text_file) -> Recipe:
    values = {"model": str(llama_folder), "data": str(text_file), "replace": "none", "select": "cosine"}
    return Recipe(**values, remove="1,3", block=32, calibration_tokens=2000, validation_tokens=2000)


def runtime(output, **more) -> Runtime:
    return Runtime(output=output, compute="float32", quiet=True, **more)


def test_every_ratio_is_a_run_and_what_is_there_is_not_made_again(recipe, tmp_path, monkeypatch):
    beside = str(tiny.make_folder(tmp_path / "smaller", "llama"))
    found = sweep(recipe, runtime(tmp_path / "out", tasks=("none",), beside=(beside,)))
    assert [(one.name, one.layers, one.removed is not None) for one in found.points] == [("1", 5, True), ("3", 3, True)]
    assert found.dense.layers == 6 and 0 < found.points[0].share < found.points[1].share < 1
    assert found.dense.accuracy is None and list(panels(found)) == ["validation perplexity"]
    (smaller,) = found.beside
    assert smaller.share == 0 and smaller.nats == pytest.approx(found.dense.nats, rel=1e-5), "the same model, here"
    assert Sweep.read(tmp_path / "out" / "sweep.json") == found
    assert (tmp_path / "out" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    one, other = (tmp_path / "out" / f"remove-{ratio}" / "similarity.json" for ratio in (1, 3))
    assert one.read_bytes() == other.read_bytes()

    remove(tmp_path / "out" / "remove-3")
    made, real = [], run.assemble
    monkeypatch.setattr(run, "assemble", lambda *given: made.append(given[-1].parent.name) or real(*given))
    monkeypatch.setattr(run, "measure", lambda work: pytest.fail("measured again"))
    again = sweep(recipe, runtime(tmp_path / "out", tasks=("none",)))
    assert again.points == found.points and made == ["remove-3"] and not again.beside


def test_answers_are_shown_where_there_are_some(recipe, tmp_path, monkeypatch):
    asked = []
    from llm_streamline.scoring.evaluator import Evaluator

    real = Evaluator._ask
    monkeypatch.setattr(Evaluator, "_ask", lambda self, task: asked.append(self.label) or real(self, task))
    questions = tmp_path / "some.jsonl"
    rows = [{"id": n, "query": f"a {n}", "choices": ["b", "c d"], "gold": n % 2} for n in range(12)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    same = str(tiny.make_folder(tmp_path / "same", "llama"))
    found = sweep(recipe, runtime(tmp_path / "out", tasks=(str(questions),), beside=(same,)))
    (other,) = found.beside
    assert (other.accuracy, other.stability) == (found.dense.accuracy, 1) and other.decode > 0
    assert set(panels(found)) == set(PANELS)
    for one in found.points:
        low, high = one.accuracy_interval
        assert low < one.accuracy < high and one.stability_interval[0] <= one.stability
    assert found.dense.stability == 1 and all(0 <= one.stability <= 1 for one in found.points)
    assert asked.count("dense") == asked.count("saved") // 2 > 0, "the dense model is asked in one run alone"


def test_the_interval_of_a_mean_is_narrower_than_its_parts():
    assert _of_tasks([(0.5, (0.4, 0.6)), (0.7, (0.6, 0.8))]) == (
        0.6,
        pytest.approx((0.6 - 0.0707, 0.6 + 0.0707), abs=1e-4),
    )
    assert _of_tasks([(0.5, (0.4, 0.6)), (0.7, None)]) == (0.6, None)


def test_ratios_of_one_number_of_layers_are_one_run(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = plans(recipe.model_copy(update={"remove": "1, 17%,3"}), Runtime(compute="float32"))
    assert list(found) == ["1", "3"] and "17% is 1 net layers, as 1 is: one run for both" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("remove", "sentence"),
    [(None, "needs the ratios"), ("1,60", "60"), ("1,x", "x")],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(recipe, remove, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure", lambda work: pytest.fail("measured"))
    with pytest.raises(UserError, match=sentence):
        sweep(recipe.model_copy(update={"remove": remove}), runtime(tmp_path / "out", tasks=("none",)))
    assert not (tmp_path / "out").exists()


def test_folders_of_other_runs_are_refused_before_anything_is_measured(recipe, text_file, tmp_path, monkeypatch):
    own = tmp_path / "text.jsonl"
    own.write_bytes(text_file.read_bytes())
    asked = recipe.model_copy(update={"data": (str(own),)})
    sweep(asked.model_copy(update={"remove": "3"}), runtime(tmp_path / "out", tasks=("none",)))
    monkeypatch.setattr(run, "measure", lambda work: pytest.fail("measured"))
    with pytest.raises(UserError, match="a run of another recipe"):
        sweep(asked.model_copy(update={"seed": 1}), runtime(tmp_path / "out", tasks=("none",)))
    own.write_text(own.read_text(encoding="utf-8").replace("a", "e"), encoding="utf-8")
    with pytest.raises(UserError, match="the text is not the one"):
        sweep(asked, runtime(tmp_path / "out", tasks=("none",)))
    assert not (tmp_path / "out" / "remove-1").exists()


def test_models_beside_of_one_name_have_places_of_their_own():
    names = ("a/model", "b/model", "other")
    assert [_place(name, names) for name in names] == ["model-1", "model-2", "other"]


def test_other_targets_folders_and_processes_are_refused(recipe, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="neither --window nor"):
        sweep(recipe.model_copy(update={"remove": None, "window": "1:3"}), runtime(tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds mine\.txt"):
        sweep(recipe, runtime(tmp_path / "full"))
    with pytest.raises(UserError, match="no output folder"):
        sweep(recipe, runtime(None))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        sweep(recipe, runtime(tmp_path / "out"))


def test_what_a_killed_sweep_left_is_cleared_and_two_do_not_mix(recipe, tmp_path):
    root = tmp_path / "out"
    (root / ".partial-1a2b3c4d").mkdir(parents=True)
    with run_lock(root), pytest.raises(UserError, match="is in use by another run"):
        sweep(recipe, runtime(root, tasks=("none",)))
    sweep(recipe.model_copy(update={"remove": "1"}), runtime(root, tasks=("none",)))
    assert {path.name for path in root.iterdir()} == {"remove-1", "sweep.json", "sweep.png"}


def test_a_model_of_a_shorter_context_stands_beside(recipe, tmp_path):
    beside = tiny.make_folder(tmp_path / "smaller", "llama")
    config = json.loads((beside / "config.json").read_text())
    (beside / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    one = recipe.model_copy(update={"remove": "1"})
    found = sweep(one, runtime(tmp_path / "out", tasks=("none",), beside=(str(beside),)))
    assert found.beside[0].nats is not None


def test_a_mean_accuracy_is_of_right_answers_alone_and_a_group_is_one():
    subjects = [task(f"subject-{n}", right=40 + 20 * n, group="exam") for n in range(2)]
    perplexity = task("wikitext", right=90, metric="word_perplexity").model_copy(update={"value": 31.5})
    found = model("saved", [task("boolq", right=80), *subjects, perplexity], stability=[stability("boolq")])
    value, (low, high) = mean_accuracy(found)
    assert value == pytest.approx((0.8 + (0.4 + 0.6) / 2) / 2) and low < value < high
    assert mean_stability(found)[0] == stability("boolq").stability
    assert mean_accuracy(model("saved", [perplexity])) == (None, None)
