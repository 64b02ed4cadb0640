from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import llm_streamline
from llm_streamline import assemble as assemble_module
from llm_streamline import families, oracle, preview, run
from llm_streamline.errors import UserError
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.train import Trainer
from tests import tiny

FILES = {
    "recipe.yaml",
    "inputs.json",
    "similarity.json",
    "ranking.json",
    "plan.json",
    "replacement",
    "model",
    "scores.json",
    "similarity.png",
    "heat-map.png",
    "report.html",
}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(assemble_module, "verify", oracle.check)


@pytest.fixture
def recipe(llama_folder, text_file):
    def make(**changes) -> Recipe:
        small = {"tokens": 4000, "calibration_tokens": 1000, "validation_tokens": 1000, "remove": "2"}
        return Recipe(**{"model": str(llama_folder), "data": (str(text_file),), **small, **changes})

    return make


def quiet(folder, **changes) -> Runtime:
    """No chatter, and no questions in the end: those are tested elsewhere."""
    return Runtime(output=folder, **{"quiet": True, "tasks": ("none",), "compute": "float32", **changes})


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def equal(one, other) -> bool:
    return set(one) == set(other) and all(torch.equal(value, other[key]) for key, value in one.items())


def test_compress_writes_the_whole_folder_and_says_what_lies_in_it(recipe, tmp_path):
    result = llm_streamline.compress(recipe(), quiet(tmp_path / "out", tasks=("quick",)))
    asked = {"evaluation.json", "items", "scores", "own-text.jsonl"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | asked
    loaded = AutoModelForCausalLM.from_pretrained(result.model)
    assert loaded.num_parameters() == result.plan.parameters_after == result.verification.parameters
    assert loaded.config.num_hidden_layers == tiny.LAYERS - 2
    assert result.fit.validation_best < result.fit.validation_before
    manifest = json.loads((tmp_path / "out" / "model" / oracle.MANIFEST).read_text())
    assert manifest["data"]["training"]["tokens"] == result.fit.tokens
    assert manifest["fit"]["threads"] == torch.get_num_threads()
    assert len(manifest["layer_similarities"]) == tiny.LAYERS
    assert manifest["scores"] == json.loads(result.scores.model_dump_json())
    assert set(manifest["versions"]) == {"llm-streamline", "python", "torch", "transformers"}


def test_the_same_command_again_does_nothing_and_says_the_same(recipe, tmp_path, monkeypatch):
    first = run.compress(recipe(), quiet(tmp_path / "out"))
    monkeypatch.setattr(Trainer, "fit", None)
    monkeypatch.setattr(run, "analyze", None)
    monkeypatch.setattr(run, "next_token_loss", None)
    before = contents(tmp_path / "out")
    assert run.compress(recipe(), quiet(tmp_path / "out")) == first
    assert contents(tmp_path / "out") == before


def test_a_missing_report_is_made_again_with_the_same_bytes(recipe, tmp_path, monkeypatch):
    result = run.compress(recipe(replace="none"), quiet(tmp_path / "out"))
    before = contents(tmp_path / "out")
    monkeypatch.setattr(run, "next_token_loss", None)
    (tmp_path / "out" / "report.html").unlink()
    assert run.compress(recipe(replace="none"), quiet(tmp_path / "out")) == result
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("killed", ["write_card", "write_report"])
def test_a_run_killed_after_scoring_gets_its_card_and_report(recipe, tmp_path, monkeypatch, killed):
    with monkeypatch.context() as patched:
        patched.setattr(run, killed, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.compress(recipe(replace="none"), quiet(tmp_path / "out"))
    card = tmp_path / "out" / "model" / "README.md"
    assert ("Not measured yet" in card.read_text()) == (killed == "write_card")
    assert not (tmp_path / "out" / "report.html").exists()
    scores = run.compress(recipe(replace="none"), quiet(tmp_path / "out")).scores
    assert f"{scores.saved.nats:.4f}" in card.read_text() and "Not measured" not in card.read_text()
    assert (tmp_path / "out" / "report.html").exists()


def test_scores_come_back_into_a_model_folder_that_was_deleted(recipe, tmp_path):
    scores = run.compress(recipe(replace="none"), quiet(tmp_path / "out")).scores
    shutil.rmtree(tmp_path / "out" / "model")
    run.compress(recipe(replace="none"), quiet(tmp_path / "out"))
    manifest = json.loads((tmp_path / "out" / "model" / oracle.MANIFEST).read_text())
    assert manifest["scores"] == json.loads(scores.model_dump_json())


def test_two_runs_of_one_recipe_are_equal_to_the_bit(recipe, tmp_path):
    for name in ("one", "two"):
        run.compress(recipe(init="random"), quiet(tmp_path / name))
    assert equal(weights(tmp_path / "one"), weights(tmp_path / "two"))
    run.compress(recipe(init="random", seed=1), quiet(tmp_path / "three"))
    assert not equal(weights(tmp_path / "one"), weights(tmp_path / "three"))


def test_a_run_stopped_between_stages_continues_to_the_same_weights(recipe, tmp_path, monkeypatch):
    run.compress(recipe(), quiet(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(run, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.compress(recipe(), quiet(tmp_path / "stopped"))
    assert not (tmp_path / "stopped" / "model").exists()
    (tmp_path / "stopped" / ".partial-00000000-model").mkdir()  # as a killed process leaves it
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "fit", None)
        run.compress(recipe(), quiet(tmp_path / "stopped"))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == FILES


def test_a_changed_recipe_is_refused_by_its_keys(recipe, tmp_path):
    run.compress(recipe(replace="none"), quiet(tmp_path / "out"))
    with pytest.raises(UserError, match=r"another recipe \(--remove, --lr changed\)"):
        run.compress(recipe(replace="none", remove="3", lr=1e-4), quiet(tmp_path / "out"))


def test_a_run_killed_before_its_first_result_can_be_repeated(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".partial-00000000-recipe.yaml").write_text("half")
    run.compress(recipe(replace="none"), quiet(tmp_path / "out"))


def test_a_run_is_not_continued_with_another_model_or_text(recipe, tmp_path, llama_folder, text_file):
    model, text = tmp_path / "model", tmp_path / "text.jsonl"
    shutil.copytree(llama_folder, model)
    shutil.copy(text_file, text)
    mine = recipe(model=str(model), data=(str(text),))
    run.compress(mine, quiet(tmp_path / "out"))
    shutil.rmtree(tmp_path / "out" / "model")
    (tmp_path / "out" / "scores.json").unlink()
    tiny.write_jsonl(text, tiny.make_documents(300, seed=5))
    with pytest.raises(UserError, match="the text is not the one"):
        run.compress(mine, quiet(tmp_path / "out"))
    shutil.copy(text_file, text)
    tiny.make_model("llama-tied").save_pretrained(model)
    with pytest.raises(UserError, match="the model is not the one"):
        run.compress(mine, quiet(tmp_path / "out"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_half_precision_checkpoints_are_saved_as_they_came(recipe, tmp_path, dtype, compute):
    model = tiny.make_folder(tmp_path / "model", "opt", dtype)
    config = json.loads((model / "config.json").read_text())
    config.pop("dtype")  # as in some older checkpoints
    (model / "config.json").write_text(json.dumps(config))
    run.compress(recipe(model=str(model)), quiet(tmp_path / "out", compute=compute))
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {dtype}


def test_a_format_that_cannot_hold_the_weights_is_refused_first(recipe, tmp_path):
    model = tiny.make_model("llama")
    model.lm_head.weight.data[5, 5] = 1e6
    model.save_pretrained(tmp_path / "model")
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="--dtype float16 cannot hold"):
        run.compress(recipe(model=str(tmp_path / "model"), dtype="float16"), quiet(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_one_short_validation_block_is_enough(recipe, tmp_path):
    result = run.compress(recipe(block=40, validation_tokens=40, replace="none"), quiet(tmp_path / "out"))
    assert result.verification.passed and result.scores.dense.sequences == 1


@pytest.mark.parametrize(
    "settings",
    [{"do_sample": False, "temperature": 0.3, "eos_token_id": [2, 7]}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["one that transformers would not save", "several sequences"],
)
def test_generation_settings_travel_along_as_they_are(recipe, tmp_path, settings):
    model = tiny.make_folder(tmp_path / "model", "llama")
    (model / "generation_config.json").write_text(json.dumps(settings))
    result = run.compress(recipe(model=str(model), replace="none"), quiet(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "model" / "generation_config.json").read_text())
    assert {key: found.get(key, False) for key in settings} == settings and result.verification.passed


def test_folders_that_are_not_ours_are_refused(recipe, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for folder, words in (
        (tmp_path / "full", "is not empty"),
        (tmp_path / "file", "is a file"),
        (None, "no output folder"),
    ):
        with pytest.raises(UserError, match=words):
            run.compress(recipe(), quiet(folder))


@pytest.mark.parametrize("replace", ["none", "layer:2"])
def test_other_replacements(recipe, tmp_path, replace):
    result = run.compress(recipe(replace=replace), quiet(tmp_path / "out"))
    assert result.plan.net == 2 and len(result.plan.window) == 2 + result.plan.occupied
    assert (result.fit is None) == (replace == "none")
    if replace == "none":
        assert result.scores.saved.nats == pytest.approx(result.scores.cut.nats, abs=1e-5)


def test_the_saved_loss_is_that_of_the_cast_model(recipe, tmp_path):
    exact = run.compress(recipe(), quiet(tmp_path / "exact"))
    cast = run.compress(recipe(dtype="bfloat16"), quiet(tmp_path / "cast"))
    assert {tensor.dtype for tensor in weights(tmp_path / "cast").values()} == {torch.bfloat16}
    assert exact.scores.dense == cast.scores.dense
    assert exact.scores.saved.nats != cast.scores.saved.nats
    assert exact.scores.saved.nats == pytest.approx(cast.scores.saved.nats, abs=0.05)


def test_bfloat16_computing_saves_in_the_checkpoints_format(recipe, tmp_path):
    result = run.compress(recipe(), quiet(tmp_path / "out", compute="bfloat16"))
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}
    assert result.fit.compute == "bfloat16 autocast" and result.verification.passed


def test_planning_writes_nothing(recipe, tmp_path):
    plan = preview.plan_only(recipe(), quiet(tmp_path / "out"))
    assert plan.net == 2 and not list(tmp_path.iterdir())


def test_an_analysis_has_a_folder_of_its_own(recipe, tmp_path):
    for _ in range(2):
        _, _, folder = preview.analyze_model(recipe(), quiet(tmp_path / "a"))
    assert {path.name for path in folder.iterdir()} == preview.ANALYSIS_FILES
    (tmp_path / "a" / "other").write_text("")
    with pytest.raises(UserError, match="holds other things"):
        preview.analyze_model(recipe(), quiet(tmp_path / "a"))


def test_the_curve_goes_to_a_tracker(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    run.compress(recipe(), quiet(tmp_path / "out", tracker="tensorboard"))
    assert list((tmp_path / "out" / "tracking").rglob("events*"))


def test_an_unknown_tracker_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match="--tracker nosuch is not installed"):
        run.compress(recipe(), quiet(tmp_path / "out", tracker="nosuch"))
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_while_saving_leaves_no_model(recipe, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assemble_module, "record_oracle", full)
    with pytest.raises(UserError, match="the disk is full"):
        run.compress(recipe(), quiet(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"model", "scores.json", "report.html"}


def test_a_curriculum_of_losses_in_a_whole_run(recipe, tmp_path, capsys):
    wanted = recipe(loss="nmse:0.3,kl:100:0.7", temperature=2.0, batch=2)
    result = run.compress(wanted, Runtime(output=tmp_path / "out", tasks="none", compute="float32"))
    assert "the loss is nmse in steps 1 to " in (err := capsys.readouterr().err) and "validation is by kl:100" in err
    assert result.verification.passed and result.fit.loss == wanted.loss and result.fit.measure == "kl:100"
    assert result.fit.validation_best < result.fit.validation_before
    page = (tmp_path / "out" / "report.html").read_text()
    assert "all validations are of the last" in page and "Distillation loss (kl:100) on the validation part" in page
    assert run.compress(wanted, quiet(tmp_path / "out")) == result


def test_more_of_the_likeliest_tokens_than_there_are_is_refused_before_anything_is_measured(recipe, tmp_path):
    with pytest.raises(UserError, match=r"--loss kl:1000 is over more tokens than the model's 259"):
        run.compress(recipe(loss="kl:1000"), quiet(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_kind_that_nobody_has_proven_is_tried_and_checked(recipe, tmp_path, monkeypatch):
    known = run.compress(recipe(replace="none"), quiet(tmp_path / "known"))
    monkeypatch.setattr(families, "TRIED", {})
    monkeypatch.delitem(families.FAMILIES, "llama")
    with pytest.raises(UserError, match="try --family-from"):
        run.compress(recipe(replace="none"), quiet(tmp_path / "refused"))
    tried = run.compress(recipe(replace="none", family_from="model.layers"), quiet(tmp_path / "tried"))
    assert tried.verification.passed and equal(weights(tmp_path / "known"), weights(tmp_path / "tried"))
    assert "Nobody has proven that models of type llama" in (tmp_path / "tried" / "report.html").read_text()
    assert "Nobody has proven" not in Path(known.report).read_text()


def test_only_layers_are_known_of_a_tried_kind(recipe):
    with pytest.raises(UserError, match=r"--replace mlp needs to know a model's MLP, and --family-from model.layers"):
        recipe(replace="mlp", family_from="model.layers")


def test_a_tried_kind_is_known_to_the_process_that_checks_it_layer_by_layer(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "TRIED", {})
    monkeypatch.delitem(families.FAMILIES, "llama")
    run.compress(recipe(replace="none", family_from="model.layers"), quiet(tmp_path / "tried"))
    families.TRIED.clear()  # as in a fresh process
    found = oracle.check(tmp_path / "tried" / "model", memory=1)
    assert found.passed and "as memory is short" in " ".join(found.limits)
    monkeypatch.undo()
    assert oracle.check(tmp_path / "tried" / "model").passed, "once it has a row"


def test_what_writes_no_text_on_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="model type 't5' is no causal language model"):
        families.try_family(AutoConfig.for_model("t5"), "model.layers")
