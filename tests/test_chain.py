"""Dense, shortened, and shortened with fewer bits: written, verified and told side by side."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_streamline import assemble as assemble_module
from llm_streamline import chain, oracle, run
from llm_streamline import lighter as lighter_module
from llm_streamline.chain import PLACES
from llm_streamline.errors import UserError, VerificationError
from llm_streamline.evaluation import CHAIN, Chain
from llm_streamline.lighter import by_torchao, write_lighter
from llm_streamline.oracle import LOSSY, MANIFEST
from llm_streamline.records import Manifest
from llm_streamline.workspace import Workspace
from tests.test_run import quiet, recipe

__all__ = ["recipe"]  # a fixture
pytest.importorskip("torchao", reason="int8 is an optional extra: pip install 'llm-streamline[int8]'")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(assemble_module, "verify", oracle.check)
    monkeypatch.setattr(lighter_module, "verify", oracle.check)


@pytest.fixture
def shorter(recipe, tmp_path):
    run.compress(recipe(replace="none"), quiet(tmp_path / "run"))
    return tmp_path / "run"


def test_a_run_goes_on_to_int8_and_tells_all_three(recipe, shorter, tmp_path):
    before = (shorter / "report.html").read_text()
    question = {"query": "the old man saw a", "choices": ["small red boat", "harbour near our"], "gold": 0}
    asked = "".join(json.dumps({"id": number, **question}) + "\n" for number in range(3))
    (tmp_path / "asked.jsonl").write_text(asked)
    tasks = (str(tmp_path / "asked.jsonl"),)
    found = run.compress(recipe(replace="none"), quiet(shorter, then="int8", tasks=tasks))
    kept = Chain.read(shorter / CHAIN)
    assert found.chain == kept and [one.name for one in kept.links] == ["dense", "shortened", "and int8"]
    dense, shortened, lighter = kept.links
    assert (
        dense.bytes > shortened.bytes > lighter.bytes == (shorter / "model-int8" / "model.safetensors").stat().st_size
    )
    assert dense.stability == 1.0 and None not in (lighter.accuracy, shortened.stability, lighter.stability)
    assert 0 < abs(lighter.nats - shortened.nats) < 0.05
    answers = [(shorter / "items" / label / "asked.jsonl").read_text() for label in ("saved", "int8")]
    assert answers[0] != answers[1]  # the lighter model was asked, and not the one it was made from
    page = (shorter / "report.html").read_text()
    assert "With fewer bits per weight" in page and "With fewer bits per weight" not in before
    again = run.compress(recipe(replace="none"), quiet(shorter, tasks=tasks))  # which has not forgotten it
    assert again.chain == kept and (shorter / "report.html").read_text() == page
    manifest = Manifest.read(shorter / "model-int8" / MANIFEST)
    assert manifest.quantised == "int8" and manifest.verification.tolerance == LOSSY["int8"]
    assert 1e-5 < manifest.verification.logits_error < LOSSY["int8"]


def test_the_int8_folder_is_ordinary_and_its_linear_weights_are_int8(shorter, tmp_path):
    write_lighter("int8", by_torchao, shorter / "model", tmp_path / "lighter")
    weights = load_file(tmp_path / "lighter" / "model.safetensors")
    kinds = {name: str(one.dtype) for name, one in weights.items() if "q_proj" in name}
    assert set(kinds.values()) == {"torch.int8", "torch.float32"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lighter")
    assert type(model.model.layers[0].mlp.down_proj.weight).__name__ == "Int8Tensor"
    for name in ("tokenizer.json", "layer-map.json", "verification/oracle.safetensors"):
        assert (tmp_path / "lighter" / name).read_bytes() == (shorter / "model" / name).read_bytes()


def test_a_damaged_int8_folder_fails_its_check(shorter, tmp_path):
    write_lighter("int8", by_torchao, shorter / "model", tmp_path / "lighter")
    file = tmp_path / "lighter" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name, one in weights.items() if str(one.dtype) == "torch.int8")
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({**weights, name: -weights[name]}, file, metadata)
    problems = oracle.check(tmp_path / "lighter").problems
    assert any("the weights are not the ones" in one for one in problems)


def test_what_is_quantised_wrongly_is_not_published(shorter, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(shorter / "model", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: one * 1.5 for name, one in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=r"the int8 model is not published: logits differ"):
        write_lighter("int8", lambda _, folder: by_torchao(other, folder), shorter / "model", tmp_path / "lighter")
    assert not (tmp_path / "lighter").exists()


def test_what_is_not_there_is_refused_first(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(lighter_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torchao's, which is not installed: pip install 'llm-streamline\[int8\]'"):
        run.compress(recipe(), quiet(tmp_path / "run", then="int8"))
    with pytest.raises(UserError, match=r"llama.cpp is not installed|has no convert_hf"):
        monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
        run.compress(recipe(), quiet(tmp_path / "run", then="int4"))
    with pytest.raises(UserError, match=r"--then int8 holds the model in memory whole"), monkeypatch.context() as short:
        short.setattr(chain, "check_library", lambda kind: None)
        short.setattr(Workspace, "offloads", True)
        run.compress(recipe(loss="nmse"), quiet(tmp_path / "run", then="int8"))
    with pytest.raises(UserError, match=r"--then int8 is for models that load without code of their own"):
        run.compress(recipe(replace="ffn", custom_code=True), quiet(tmp_path / "run", then="int8"))
    assert not (tmp_path / "run").exists()


def test_a_model_of_no_tasks_has_a_chain_of_losses(recipe, tmp_path):
    found = run.compress(recipe(replace="none"), quiet(tmp_path / "run", then="int8", tasks=("none",)))
    assert Manifest.read(tmp_path / "run" / "model-int8" / MANIFEST).scores == found.scores
    assert "Not measured yet" not in (tmp_path / "run" / "model-int8" / "README.md").read_text()
    assert found.evaluation is None and [one.accuracy for one in found.chain.links] == [None] * 3
    assert json.loads((tmp_path / "run" / "int8.json").read_text())["path"] == PLACES["int8"]
