"""A compressed folder as an ONNX graph says what transformers says: at once, through the cache, past the window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_streamline.assemble import Parts, build
from llm_streamline.errors import UserError
from llm_streamline.records import Window
from llm_streamline.replacement import ReplacementLayers
from llm_streamline.runtimes import onnx
from llm_streamline.runtimes.onnx import OnnxModel, export_onnx
from tests import tiny
from tests.test_families import plan_for

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="ONNX is an optional extra: pip install 'llm-streamline[onnx]'")

FIRST_AND_LAST = Window(start=1, stop=tiny.LAYERS - 1)  # two layers stay: the exporter takes seconds per layer
PROMPT = 40  # tokens, five times the sliding window of those that have one
NEW = 8


def compressed(name: str, folder: Path) -> Path:
    """An ordinary folder with the tiny model, its layers between the first and the last removed."""
    source = tiny.make_model(name)
    parts = Parts(source, plan_for(source, FIRST_AND_LAST), ReplacementLayers(), tiny.make_tokenizer())
    build(parts, torch.float32)[0].save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(
    scope="module",
    params=["llama", *(["opt", "qwen3", "gemma3_text"] if tiny.MATRIX else [])],  # the exporter takes 20 s for each
)
def exported(request, tmp_path_factory):
    folder = compressed(request.param, tmp_path_factory.mktemp(request.param) / "model")
    target = folder.parent / "onnx"
    export_onnx(folder, target)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, target, OnnxModel(target)


@pytest.fixture(scope="module")
def expected(exported):
    """Of transformers: a prompt, its logits, and what it writes on."""
    model, ids = exported[0], tiny.random_ids(1, PROMPT, seed=5)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].numpy()
    made = ids
    for _ in range(NEW):  # without any cache
        with torch.no_grad():
            made = torch.cat([made, model(input_ids=made, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0].tolist(), logits, made[0, PROMPT:].tolist()


def test_logits_are_those_of_transformers(exported, expected):
    ids, logits, _ = expected
    found = exported[2].logits(ids)
    assert found.dtype == np.float32 and found.shape == logits.shape
    np.testing.assert_allclose(found, logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("prefill", [1, 20])
def test_logits_through_the_cache_are_those_of_transformers(exported, expected, prefill):
    ids, logits, _ = expected
    pieces = [ids[:prefill], *([one] for one in ids[prefill:])]
    np.testing.assert_allclose(exported[2].in_pieces(pieces), logits, atol=1e-3, rtol=0)


def test_greedy_tokens_are_those_of_transformers(exported, expected):
    ids, _, made = expected
    assert exported[2].greedy(ids, NEW) == made
    assert exported[2].greedy(ids, 0) == []


def test_a_batch_with_padding_on_the_left(exported, expected):
    """Run as any user of onnxruntime would, by the names that optimum gives."""
    import onnxruntime

    ids, logits, _ = expected
    session = onnxruntime.InferenceSession(exported[1] / onnx.GRAPH, providers=["CPUExecutionProvider"])
    shapes = {one.name: one.shape for one in session.get_inputs()}
    assert shapes["input_ids"] == ["batch", "sequence"] and shapes["attention_mask"] == ["batch", "past + sequence"]
    layers = range(exported[0].config.num_hidden_layers)
    names = [f"{layer}.{kind}" for layer in layers for kind in ("key", "value")]
    rows = np.array([ids, [0] * 5 + ids[:-5]])
    mask = np.array([[1] * PROMPT, [0] * 5 + [1] * (PROMPT - 5)])
    past = [np.zeros((2, shapes[f"past_key_values.{name}"][1], 0, 8), np.float32) for name in names]
    found = []
    for start, stop in ((0, 28), (28, 30), (30, PROMPT)):
        given = {"input_ids": rows[:, start:stop], "attention_mask": mask[:, :stop]}
        given |= {f"past_key_values.{name}": tensor for name, tensor in zip(names, past, strict=True)}
        one, *past = session.run(["logits", *(f"present.{name}" for name in names)], given)
        found.append(one)
    full, padded = np.concatenate(found, 1)
    np.testing.assert_allclose(full, logits, atol=1e-3, rtol=0)
    np.testing.assert_allclose(padded[5:], logits[:-5], atol=1e-3, rtol=0)


def test_settings_and_tokenizer_lie_beside_the_graph(exported):
    names = {path.name for path in exported[1].iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.onnx"}
    assert not any(name.endswith(".safetensors") for name in names)
    assert {path.name for path in exported[1].parent.iterdir()} == {"model", "onnx"}


def test_a_graph_that_says_something_else_is_found(exported, expected):
    ids, logits, _ = expected
    onnx._prove(exported[2], ids, logits)
    for wrong in (logits + 0.01 * np.eye(*logits.shape), np.full_like(logits, np.nan)):
        with pytest.raises(ArithmeticError, match="differ by"):
            onnx._prove(exported[2], ids, wrong)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(llama_folder, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such operator. See the log")

    monkeypatch.setattr(onnx, "_write_graph", fails)
    with pytest.raises(UserError, match=r"'llama' cannot be exported to ONNX .* \(no such operator\); give another"):
        export_onnx(llama_folder, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mamba", "lfm2"])
def test_a_memory_that_is_no_keys_and_values_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=f"'{name}' does not remember the past as keys and values"):
        export_onnx(tiny.make_folder(tmp_path / "model", name), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_positions_that_depend_on_the_length_are_refused(tmp_path, monkeypatch, rope):
    rope = {**rope, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    monkeypatch.setitem(tiny.CONFIGS, "llama", tiny._llama(rope_parameters=rope))
    tiny.make_folder(tmp_path / "model", "llama")
    with pytest.raises(UserError, match=f"of type '{rope['rope_type']}', which computes the cached keys anew"):
        export_onnx(tmp_path / "model", tmp_path / "onnx")


def test_folders_and_packages_are_looked_at_first(tmp_path, llama_folder, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        export_onnx(llama_folder, tmp_path / "full")
    with pytest.raises(UserError, match="is no folder"):
        export_onnx(tmp_path / "none", tmp_path / "onnx")
    with pytest.raises(UserError, match="does not exist"):
        OnnxModel(tmp_path)
    (tmp_path / onnx.GRAPH).write_bytes(b"no graph")
    with pytest.raises(UserError, match="does not load"):
        OnnxModel(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match=r"ONNX needs onnxscript; .*llm-streamline\[onnx\]"):
        export_onnx(llama_folder, tmp_path / "onnx")
