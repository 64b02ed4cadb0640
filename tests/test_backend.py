"""vLLM in place of transformers: what it is given, and that nothing else loads the weights."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llm_streamline.errors import UserError
from llm_streamline.evaluation import Request
from llm_streamline.recipe import Runtime
from llm_streamline.run import evaluate
from llm_streamline.scoring.backend import check_vllm, language_model
from llm_streamline.scoring.items import read_items
from tests import tiny
from tests.test_tasks import make_jsonl, make_yaml


@pytest.fixture
def task(tmp_path) -> str:
    pytest.importorskip("lm_eval", exc_type=ImportError)
    return str(make_yaml(tmp_path, make_jsonl(tmp_path / "q.jsonl", 6)))


@pytest.fixture
def vllm(monkeypatch) -> list[dict]:
    """As if vLLM were installed; lm-eval's class for it notes what it is given, and computes with transformers."""
    pytest.importorskip("lm_eval", exc_type=ImportError)
    from lm_eval.models.huggingface import HFLM

    given = []

    class VLLM(HFLM):
        def __init__(self, **arguments) -> None:
            given.append(dict(arguments))
            super().__init__(max_length=arguments.pop("max_model_len"), batch_size=2, device="cpu", **arguments)

    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    fake = ModuleType("lm_eval.models.vllm_causallms")
    fake.VLLM = VLLM
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", fake)
    return given


def run(folder: Path, task: str, out: Path, backend: str):
    request = Request(models=str(folder), tasks=task, backend=backend)
    return evaluate(request, Runtime(output=out, quiet=True, compute="float32"))


@pytest.mark.filterwarnings("ignore")
def test_vllm_is_given_the_folder_and_nothing_else_loads_it(tmp_path, llama_folder, task, vllm, monkeypatch):
    expected = run(llama_folder, task, tmp_path / "hf", "hf")
    assert not vllm
    monkeypatch.setattr("llm_streamline.checkpoint.load_model", None)
    found = run(llama_folder, task, tmp_path / "vllm", "vllm")
    assert vllm == [{"pretrained": str(llama_folder), "dtype": "float32", "max_model_len": tiny.CONTEXT}]
    assert found.models[0].tasks == expected.models[0].tasks
    assert run(llama_folder, task, tmp_path / "hf", "vllm").models[0].tasks == expected.models[0].tasks
    assert len(vllm) == 2, "what transformers computed does not stand for vLLM's"


def test_vllm_that_is_not_there_or_not_needed_is_refused_before_weights_are_loaded(
    tmp_path, llama_folder, task, monkeypatch
):
    monkeypatch.setattr("llm_streamline.checkpoint.load_model", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("llm_streamline.scoring.backend.find_spec", lambda name: None)
    with pytest.raises(UserError, match="vLLM is not installed; install it, or use --backend hf"):
        run(llama_folder, task, tmp_path / "out", "vllm")
    with pytest.raises(UserError, match="computes tasks of lm-eval, and none was given"):
        run(llama_folder, str(tmp_path / "q.jsonl"), tmp_path / "out", "vllm")
    with pytest.raises(UserError, match="--backend was given 'onnx'"):
        run(llama_folder, task, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_what_vllm_cannot_load_is_one_sentence(vllm, monkeypatch):
    class Held:
        name, path, compute, context = "held", None, "float32 on cpu", 8

    with pytest.raises(UserError, match="needs a folder, and held is in none"):
        language_model(Held(), "vllm", None)
    Held.path = "nowhere"
    monkeypatch.setattr(sys.modules["lm_eval.models.vllm_causallms"], "VLLM", broken)
    with pytest.raises(UserError, match=r"vLLM cannot load held \(no such architecture\); use --backend hf"):
        language_model(Held(), "vllm", None)
    check_vllm(1)


def broken(**arguments) -> None:
    raise ValueError("no such architecture. Try another\nor not")


def test_log_likelihoods_of_a_bfloat16_model_are_summed_in_float32(tmp_path, llama_folder, task):
    request = Request(models=str(llama_folder), tasks=task)
    evaluate(request, Runtime(output=tmp_path / "out", quiet=True, compute="bfloat16", device="cpu"))
    (items,) = read_items(tmp_path / "out" / "items").values()
    found = torch.tensor([value for item in items.values() for value in item.log_likelihoods])
    assert not found.equal(found.bfloat16().float())


def test_a_task_that_a_model_cannot_be_asked_is_one_sentence(tmp_path, llama_folder):
    pytest.importorskip("lm_eval", exc_type=ImportError)
    more = "generation_kwargs: {max_gen_toks: 4096}\nmetric_list: [{metric: exact_match}]"
    file = make_yaml(tmp_path, make_jsonl(tmp_path / "q.jsonl", 2), kind="generate_until", more=more)
    with pytest.raises(UserError, match=r"task same cannot be asked of this model \(.*maximum sequence length"):
        run(llama_folder, str(file), tmp_path / "out", "hf")
