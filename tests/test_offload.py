from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from llm_streamline import assemble, layerwise, oracle, run
from llm_streamline.analyze import analyze
from llm_streamline.checkpoint import Source, load_model
from llm_streamline.errors import UserError
from llm_streamline.estimate import Estimate
from llm_streamline.families import layers_of
from llm_streamline.fingerprints import fingerprint
from llm_streamline.layerwise import Layerwise, grouped, logits_of
from llm_streamline.memory import memory_limit
from llm_streamline.offload import is_offloaded, onloaded, round_stored, stored_weights
from llm_streamline.oracle import verify
from llm_streamline.passages import layer_by_layer, passages_of, streamed
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import Window
from llm_streamline.replacement import build_replacement
from llm_streamline.scoring.perplexity import next_token_loss
from llm_streamline.workspace import Workspace
from tests import tiny

BATCHES = [tiny.random_ids(2, 16), tiny.random_ids(2, 16, seed=3), tiny.random_ids(1, 16, seed=4)]
WINDOW = Window(start=1, stop=4)
LITTLE = "0.1GB"


@pytest.fixture
def pair(request, tmp_path):
    """One model twice: in memory, and with its layers on the disk."""
    folder = tiny.make_folder(tmp_path / "model", request.param)
    return (load_model(Source(str(folder)), torch.float32, offload=place) for place in (None, tmp_path / "rewritten"))


every = pytest.mark.parametrize("pair", tiny.NAMES, indirect=True)
some = pytest.mark.parametrize("pair", ["llama", "gpt2", "gemma2", "qwen3_moe"], indirect=True)


@every
def test_layer_by_layer_is_the_model_to_the_bit(pair):
    held, stored = pair
    assert is_offloaded(stored) and not is_offloaded(held)
    for model in (held, stored):
        for group, expected in zip(_by_layer(model), BATCHES, strict=True):
            assert torch.equal(group, held(input_ids=expected.long(), use_cache=False).logits)
    assert all(parameter.is_meta for parameter in layers_of(stored).parameters()), "weights were let go of"


@pytest.mark.parametrize("name", list(tiny.VARIED))
def test_a_stored_model_in_bfloat16_is_the_loaded_one(name, tmp_path):
    folder = tiny.make_folder(tmp_path / "model", name)
    held = load_model(Source(str(folder)), torch.bfloat16)
    stored = load_model(Source(str(folder)), torch.bfloat16, offload=tmp_path / "rewritten")
    converted = name.startswith(("mixtral", "qwen3_moe")) or name == "gpt_neox"  # of which others have tied heads
    assert (tmp_path / "rewritten").exists() == converted, "the others are opened without being read"
    assert stored.config.to_dict() == held.config.to_dict()
    assert stored.generation_config.to_dict() == held.generation_config.to_dict()
    for group, expected in zip(_by_layer(stored), BATCHES, strict=True):
        assert torch.equal(group, held(input_ids=expected.long(), use_cache=False).logits)
    buffers = dict(held.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in stored.named_buffers())


def _by_layer(model):
    layers = Layerwise(model)
    flows = layers.enter(BATCHES)
    assert flows[0].calls is flows[1].calls, "equal calls are held once"
    layers.advance(flows, range(len(layers_of(model))))
    return [layers.logits(flow) for flow in flows]


@every
def test_passages_are_the_streamed_ones_to_the_bit(pair):
    held, stored = pair
    expected = list(streamed(held, WINDOW, False)(BATCHES))
    assert passages_of(held, WINDOW, False).__qualname__.startswith("streamed")
    assert passages_of(stored, WINDOW, False).__qualname__.startswith("layer_by_layer")
    for one, other in zip(layer_by_layer(stored, WINDOW, False)(BATCHES), expected, strict=True):
        assert torch.equal(one.entering, other.entering) and torch.equal(one.leaving, other.leaving)
        replacement = build_replacement(held, [1], "inherited", 0)
        assert torch.equal(replacement.run(one.entering, one.calls), replacement.run(other.entering, other.calls)), (
            "the calls are the same"
        )


@some
def test_analysis_loss_and_inheritance_are_the_same(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(layerwise, "GROUP_TOKENS", 48)
    held, stored = pair
    blocks = tiny.random_ids(7, 16)
    assert analyze(stored, blocks, 2, quiet=True, scratch=tmp_path) == analyze(held, blocks, 2, quiet=True)
    assert next_token_loss(stored, blocks, 2, "", quiet=True) == next_token_loss(held, blocks, 2, "", quiet=True)
    one, other = (build_replacement(model, [2, 3], "inherited", 0).state_dict() for model in (held, stored))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    held_layers = {key: value for key, value in held.state_dict().items() if key in dict(stored_weights(stored))}
    assert held_layers and all(torch.equal(value, held_layers[key]) for key, value in stored_weights(stored))


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_each_layer_is_read_once_for_a_group(pair, monkeypatch):
    _, stored = pair
    read = []
    monkeypatch.setattr(layerwise, "onloaded", lambda layer: (read.append(id(layer)), onloaded(layer))[1])
    assert len(list(logits_of(stored, BATCHES))) == 3
    assert len(read) == len(set(read)) == tiny.LAYERS


def test_weights_that_go_while_they_are_needed_are_missed_in_one_sentence(tmp_path):
    folder = tiny.make_folder(tmp_path / "model", "llama")
    model = load_model(Source(str(folder)), torch.float32, offload=tmp_path / "rewritten")
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"can no longer be read .*; put them back and repeat"):
        Layerwise(model).advance(Layerwise(model).enter([BATCHES[0]]), [0])
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"can no longer be read \(No such file"):
        list(stored_weights(model))
    with pytest.raises(UserError, match=r"holds no model.safetensors"):
        fingerprint(Source(str(folder)))  # as a run that is continued does before the model is opened


def test_the_saved_models_experts_lie_apart_from_the_dense_ones(tmp_path, text_file):
    """Both are rewritten to the disk, under the same names."""
    for number in range(2):
        model = tiny.make_model("qwen3_moe")
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(1 + number / 10)
        model.save_pretrained(tmp_path / str(number))
        tiny.make_tokenizer().save_pretrained(tmp_path / str(number))
    recipe = Recipe(model=str(tmp_path / "0"), data=text_file, block=32, loss="nmse", select="cosine")
    work = Workspace(recipe, Runtime(memory=LITTLE, compute="float32", output=tmp_path / "out", quiet=True))
    before = [next(iter(logits_of(work.model, BATCHES[:1])))]
    other = next(iter(logits_of(work.load_saved(tmp_path / "1", False), BATCHES[:1])))
    (after,) = logits_of(work.model, BATCHES[:1])
    assert torch.equal(before[0], after) and not torch.equal(after, other)


def test_groups_hold_so_many_tokens(monkeypatch):
    monkeypatch.setattr(layerwise, "GROUP_TOKENS", 64)
    assert [len(group) for group in grouped(BATCHES)] == [2, 1]
    assert [len(group) for group in grouped([tiny.random_ids(5, 16)] * 2)] == [1, 1], "one at least"


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_a_substituted_window_is_substituted_layer_by_layer_too(pair):
    held, stored = pair
    with run.substituted(held, WINDOW):
        expected = held(input_ids=BATCHES[0].long(), use_cache=False).logits
    with run.substituted(stored, WINDOW):
        (found,) = logits_of(stored, BATCHES[:1])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("pair", ["llama", "qwen3_moe"], indirect=True)
def test_stored_weights_are_rounded_as_a_save_rounds(pair):
    held, stored = pair
    round_stored(stored, torch.bfloat16)
    expected = copy.deepcopy(held).to(torch.bfloat16).state_dict()
    for name, value in stored_weights(stored):
        assert value.dtype == torch.float32 and torch.equal(value.to(torch.bfloat16), expected[name])
        assert torch.equal(value, expected[name].float())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", None),
        ("opt", None),
        ("gpt2-untied", "bfloat16"),
        ("qwen3_moe", None),
        ("gemma3_text-period", "bfloat16"),
    ],
)
def test_a_model_that_does_not_fit_gives_the_same_model(name, dtype, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Estimate, "problem", lambda *_: None)  # torch alone takes more than these models
    if name != "llama":
        monkeypatch.setattr(assemble, "verify", oracle.check)
    folder = tiny.make_folder(tmp_path / "model", name)
    text = tiny.write_jsonl(tmp_path / "text.jsonl", tiny.make_documents(200))
    recipe = Recipe(
        model=folder.as_posix(),
        data=text,
        remove=2,
        block=32,
        tokens=640,
        calibration_tokens=640,
        validation_tokens=320,
        dtype=dtype,
        batch=2,
        select="cosine",
        loss="nmse",
        init="inherited",
    )
    results = {}
    for memory in ("16GB", LITTLE):
        out = tmp_path / memory
        results[memory] = run.compress(recipe, Runtime(output=out, memory=memory, tasks="none", compute="float32"))
        assert not list(out.glob(".partial-*"))
        read = "its layers are read from the disk" in capsys.readouterr().err
        assert read == (memory == LITTLE)
    held, stored = results.values()
    assert stored.plan == held.plan and stored.scores == held.scores
    assert stored.fit.curve == held.fit.curve and stored.verification.passed
    assert stored.verification.tensors == held.verification.tensors
    assert "compared over 4 tokens" in " ".join(stored.verification.limits)
    one, other = (_tensors(tmp_path / memory / "model") for memory in results)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


def _tensors(folder):
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def test_a_wrong_weight_is_found_layer_by_layer_too(llama_folder, text_file, tmp_path):
    recipe = Recipe(model=str(llama_folder), data=text_file, remove=2, block=32, replace="none")
    model = run.compress(recipe, Runtime(output=tmp_path / "out", tasks="none", quiet=True)).model
    (file,) = (tmp_path / "out" / "model").glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 0x40
    file.write_bytes(raw)
    found = verify(model, memory=10**6)
    assert not found.passed and any("logits differ" in problem for problem in found.problems)


@pytest.mark.parametrize(("given", "size"), [("3GB", 3 * 10**9), ("2GiB", 2**31), ("512m", 512 * 10**6), (77, 77)])
def test_sizes_are_read(given, size):
    assert Runtime(memory=given).memory == size


@pytest.mark.parametrize("given", ["much", "3XB", "-1GB", "0"])
def test_what_is_no_size_is_refused(given):
    with pytest.raises(UserError, match=r"--memory was given"):
        Runtime(memory=given)


def test_the_limit_is_no_more_than_the_machine_has():
    import psutil

    assert 2**20 < memory_limit() <= psutil.virtual_memory().total
