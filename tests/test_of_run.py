"""The last stage of `compress`: its three models are asked, let write and timed, once."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from llm_streamline import run
from llm_streamline.cli import main
from llm_streamline.errors import UserError
from llm_streamline.evaluation import Evaluation
from llm_streamline.forward import substituted
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.scoring.continuations import continuation_questions
from llm_streamline.scoring.items import read_items
from llm_streamline.scoring.of_run import OWN
from llm_streamline.scoring.questions import answers, encode, read_questions
from tests import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("of-run")
    model = tiny.make_folder(folder / "model", "llama")
    data = tiny.write_jsonl(folder / "text.jsonl", tiny.make_documents(60))
    extra = folder / "extra.jsonl"
    rows = [{"id": n, "query": f"the {n}", "choices": ["old man", "red boat"], "gold": n % 2} for n in range(6)]
    extra.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(model=str(model), data=(str(data),), window="3:5", replace="layer", tokens=2000, block=32)
    runtime = Runtime(output=folder / "run", quiet=True, compute="float32", tasks=(str(extra),))
    return recipe, runtime, run.compress(recipe, runtime)


def test_the_three_models_are_asked_and_two_of_them_write_and_are_timed(made):
    _recipe, runtime, result = made
    found = result.evaluation
    assert found == Evaluation.read(runtime.output / "evaluation.json")
    assert [one.label for one in found.models] == ["dense", "cut", "saved"] and found.against == "dense"
    dense, cut, saved = found.models
    assert all([task.task for task in one.tasks] == ["own-text", "extra"] for one in found.models)
    assert dense.stability is None and len(cut.stability) == len(saved.stability) == 2
    assert not cut.written and not cut.timings
    assert [one.prompt for one in dense.written] == [one.prompt for one in saved.written] and saved.writing.samples
    assert dense.timings[0].prefill_ratio is None and saved.timings[0].prefill_ratio > 0
    assert saved.size.parameters == result.plan.parameters_after


def test_the_cut_model_is_the_source_without_its_window(made):
    _recipe, runtime, result = made
    model, tokenizer = tiny.make_model("llama"), tiny.make_tokenizer()
    questions = read_questions(runtime.output / OWN)
    rows = encode(tokenizer, questions, tiny.CONTEXT)
    with substituted(model, result.plan.plain_window):
        by_hand = answers(model, questions, rows, "own-text", quiet=True)
    kept = read_items(runtime.output / "items" / "cut" / "own-text.jsonl")["own-text"]
    for item in by_hand:
        assert kept[item.id].log_likelihoods == pytest.approx(item.log_likelihoods, abs=1e-4)
    dense = read_items(runtime.output / "items" / "dense" / "own-text.jsonl")["own-text"]
    assert any(abs(dense[key].ppl[0] - kept[key].ppl[0]) > 1e-4 for key in kept)


def test_its_questions_can_be_asked_again(made, tmp_path, capsys):
    _, runtime, result = made
    questions = str(runtime.output / OWN)
    main(
        [
            "evaluate",
            result.model,
            "--tasks",
            questions,
            "-o",
            str(tmp_path / "eval"),
            "--json",
            "--quiet",
            "--compute",
            "float32",
        ]
    )
    again = json.loads(capsys.readouterr().out)["models"][0]["tasks"][0]
    assert again["value"] == result.evaluation.models[2].task("own-text").value


def test_a_finished_evaluation_is_not_repeated(made, monkeypatch):
    recipe, runtime, result = made
    monkeypatch.setattr(run, "evaluate_run", lambda *_: pytest.fail("evaluated again"))
    assert run.compress(recipe, runtime).evaluation == result.evaluation


def test_nothing_is_asked_on_request(made, tmp_path):
    recipe, _, _ = made
    plain = recipe.model_copy(update={"replace": "none"})
    result = run.compress(plain, Runtime(output=tmp_path / "run", quiet=True, tasks=("none",)))
    assert result.evaluation is None and not (tmp_path / "run" / "items").exists()


def test_a_run_finished_without_is_asked_later_and_its_page_and_card_say_so(made, tmp_path):
    recipe, runtime, _ = made
    plain = recipe.model_copy(update={"replace": "none"})
    later = runtime.model_copy(update={"output": tmp_path / "run"})
    run.compress(plain, later.model_copy(update={"tasks": ("none",)}))
    card, page = tmp_path / "run" / "model" / "README.md", tmp_path / "run" / "report.html"
    assert "own-text" not in card.read_text() and "own-text" not in page.read_text()
    run.compress(plain, later)
    assert "own-text" in card.read_text() and "own-text" in page.read_text()
    assert "quick-facts" not in page.read_text()
    later = later.model_copy(update={"tasks": ("quick",)})
    run.compress(plain, later)
    assert "quick-facts" in page.read_text()
    card.write_text("edited")
    run.compress(plain, later)
    assert card.read_text() == "edited"


def test_without_a_replacement_the_saved_model_is_the_cut_one(made, tmp_path):
    recipe, runtime, _ = made
    plain = recipe.model_copy(update={"replace": "none"})
    result = run.compress(plain, runtime.model_copy(update={"output": tmp_path / "run"}))
    assert [one.label for one in result.evaluation.models] == ["dense", "saved"]


def test_an_unknown_task_is_refused_before_anything_is_done(made, tmp_path):
    recipe, _, _ = made
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        run.compress(recipe, Runtime(output=tmp_path / "run", quiet=True, tasks=("nowhere.jsonl",)))
    assert not (tmp_path / "run").exists()


def test_a_file_named_as_the_runs_own_questions_is_refused(made, tmp_path):
    recipe, runtime, _ = made
    with pytest.raises(UserError, match="rename the file"):
        run.compress(recipe, Runtime(output=tmp_path / "run", quiet=True, tasks=(str(runtime.output / OWN),)))


def test_continuation_questions_by_hand():
    tokenizer = tiny.make_tokenizer()
    text = "".join(f"sentence {number:03d} goes on and on; " for number in range(200))
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    blocks = ids[: len(ids) // 64 * 64].view(-1, 64)
    found = continuation_questions(blocks, tokenizer, 0)
    assert found == continuation_questions(blocks, tokenizer, 0) != continuation_questions(blocks, tokenizer, 1)
    for question in found:
        assert question.query + question.choices[question.gold] in text
        assert len(set(question.choices)) == 4
        assert [question.query + choice in text for choice in question.choices].count(True) == 1
    assert {question.gold for question in found} == {0, 1, 2, 3}


def test_too_little_text_gives_no_questions():
    assert continuation_questions(tiny.random_ids(3, 32), tiny.make_tokenizer(), 0) == []


def test_a_run_that_asked_nothing_gets_a_new_card_and_page_when_it_asks(made, tmp_path):
    recipe, runtime, _ = made
    folder = tmp_path / "run"
    shutil.copytree(runtime.output, folder)
    (folder / "evaluation.json").unlink()
    for told in (folder / "report.html", folder / "model" / "README.md"):
        told.write_text("made without questions")
    run.compress(recipe, runtime.model_copy(update={"output": folder}))
    assert "own-text" in (folder / "report.html").read_text() and "own-text" in (folder / "model/README.md").read_text()


def test_questions_that_do_not_fit_are_refused_before_anything_is_done(made, tmp_path):
    recipe, _, _ = made
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"id": 0, "query": "a", "choices": ["b" * (tiny.CONTEXT + 1), "c"], "gold": 0}))
    for tasks, told in (((str(long),), "longer than the model's context"), (("none", "quick"), "give either")):
        with pytest.raises(UserError, match=told):
            run.compress(recipe, Runtime(output=tmp_path / "run", quiet=True, tasks=tasks))
        assert not (tmp_path / "run").exists()


@pytest.fixture
def finished(made, tmp_path):
    """A finished run without its replacement, and what it was made of, all in a folder of their own."""
    recipe, runtime, _ = made
    shutil.copyfile(recipe.data[0], tmp_path / "text.jsonl")
    shutil.copyfile(runtime.tasks[0], tmp_path / "asked.jsonl")
    plain = recipe.model_copy(update={"replace": "none", "data": (str(tmp_path / "text.jsonl"),)})
    again = runtime.model_copy(update={"output": tmp_path / "run", "tasks": (str(tmp_path / "asked.jsonl"),)})
    run.compress(plain, again)
    return plain, again


def test_questions_that_were_put_right_are_asked_again(finished, tmp_path):
    recipe, runtime = finished
    before = Evaluation.read(tmp_path / "run" / "evaluation.json")
    rows = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    flipped = "".join(json.dumps({**row, "gold": 1 - row["gold"]}) + "\n" for row in rows)
    (tmp_path / "asked.jsonl").write_text(flipped)
    after = run.compress(recipe, runtime).evaluation
    one, other = (found.models[0].task("asked") for found in (before, after))
    assert one.value + other.value == pytest.approx(1) and one.digest != other.digest


def test_what_is_asked_later_is_of_the_text_that_the_run_began_with(finished, tmp_path):
    recipe, runtime = finished
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write(json.dumps({"text": "the small red boat"}) + "\n")
    assert run.compress(recipe, runtime).evaluation, "what is there needs no text"
    shutil.copyfile(tmp_path / "asked.jsonl", tmp_path / "more.jsonl")
    with pytest.raises(UserError, match="the text is not the one that the run"):
        run.compress(recipe, runtime.model_copy(update={"tasks": (str(tmp_path / "more.jsonl"),)}))


@pytest.mark.parametrize("stage", ["write_card", "write_report"])
def test_a_run_killed_after_it_was_asked_more_says_so_when_it_goes_on(stage, finished, tmp_path, monkeypatch):
    recipe, runtime = finished
    shutil.copyfile(tmp_path / "asked.jsonl", tmp_path / "more.jsonl")
    more = runtime.model_copy(update={"tasks": (str(tmp_path / "more.jsonl"),)})
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(run, stage, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run.compress(recipe, more)
    run.compress(recipe, more)
    for told in ("model/README.md", "report.html"):
        assert "more" in (tmp_path / "run" / told).read_text().split("own-text", 1)[1], told
