"""Speed and size: what is timed is what is said, turns are fair, bytes are counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from llm_streamline.recipe import Runtime
from llm_streamline.scoring import speed
from llm_streamline.scoring.peak import process_peak
from llm_streamline.scoring.speed import Load, cache_bytes, loads, one_round, size, take_turns, timings
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.make_model("llama")


def test_loads_fit_the_context():
    assert loads(4096) == [Load(1, 512, 32), Load(8, 512, 32)]
    assert loads(40) == [Load(1, 20, 20), Load(8, 20, 20)]


def test_a_round_reads_the_prompt_once_and_then_one_token_at_a_time(model):
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    prefill, decode = one_round(model, Load(3, 10, 4))
    handle.remove()
    assert [tuple(call["input_ids"].shape) for call in seen] == [(3, 10), *[(3, 1)] * 4]
    assert all(call["past_key_values"].get_seq_length() == 14 for call in seen[1:])  # one cache, full in the end
    assert prefill > 0 and decode > 0


@pytest.mark.parametrize("name", ["mamba", "recurrent_gemma", "qwen3_next", "falcon_h1", "gemma3_text"])
def test_models_that_remember_otherwise_are_timed_with_what_they_remember(name):
    model, told = tiny.make_model(name), []
    model.register_forward_pre_hook(lambda _, args, given: told.append(given["input_ids"].shape[1]), with_kwargs=True)
    assert min(one_round(model, Load(2, 10, 3))) > 0
    hidden = name == "recurrent_gemma"  # hands out nothing: the prompt is read again with a cache that it is given
    assert told == [10, 10, 1, 1, 1][not hidden :]
    assert (cache_bytes(model, 64) is None) == hidden
    cache = DynamicCache(config=model.config)
    taken = "cache_params" if name == "mamba" else "past_key_values"
    ids = tiny.random_ids(1, 9)
    with torch.no_grad():
        model(input_ids=ids[:, :8], use_cache=True, **{taken: cache})
        last = model(input_ids=ids[:, 8:], use_cache=True, **{taken: cache}).logits[:, -1]
        assert torch.allclose(last, model(input_ids=ids, use_cache=False).logits[:, -1], atol=1e-4)


def test_models_take_turns_and_the_first_one_changes(model, monkeypatch):
    order = []
    monkeypatch.setattr(speed, "one_round", lambda one, load: order.append(one) or (1.0, 1.0))
    monkeypatch.setattr(speed, "FEWEST", 3)
    monkeypatch.setattr(speed, "MOST", 3)
    found = take_turns(["dense", "short"], Load(1, 4, 4), "t", quiet=True)
    assert order[2:] == ["dense", "short", "short", "dense", "dense", "short"]  # after one unmeasured turn of each
    assert [len(rounds) for rounds in found] == [3, 3]


def test_figures_by_hand(monkeypatch):
    """Seconds of three rounds of two models; the ratios are round by round, so that a slow round falls on both."""
    dense, short = iter([(2.0, 4.0), (20.0, 40.0), (2.2, 4.0)]), iter([(1.0, 2.0), (10.0, 40.0), (1.0, 1.0)])
    rounds = [list(dense), list(short)]
    monkeypatch.setattr(speed, "take_turns", lambda models, load, title, quiet: rounds)
    monkeypatch.setattr(speed, "SLOW", 1e9)
    (own, own_8), (other, _) = timings([None, None], 64, "t")
    assert (own_8.prefill, own_8.decode) == (8 * 32 / 2.2, 8 * 32 / 4.0)
    assert (own.prefill, own.decode) == (32 / 2.2, 32 / 4.0)
    assert own.prefill_ratio is None and own.decode_interval is None
    assert (other.prefill_ratio, other.decode_ratio) == (2.0, 2.0)
    assert other.prefill_interval[0] == 2.0 and other.prefill_interval[1] == pytest.approx(2.2)
    assert other.decode_interval == (1.0, 4.0)


def test_a_batch_that_would_take_minutes_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(speed, "take_turns", lambda models, load, title, quiet: [[(5.0, 1.0)] * 3] * 2)
    dense, other = timings([None, None], 64, "t")
    assert [one.batch for one in dense] == [one.batch for one in other] == [1]
    assert "batch 8 is left out: one round would take 96 s" in capsys.readouterr().err
    monkeypatch.setattr(speed, "take_turns", lambda models, load, title, quiet: [[(2.0, 1.0)] * 3] * 2)
    assert [one.batch for one in timings([None, None], 64, "t")[0]] == [1, 8]


def test_bytes_of_weights_and_cache_by_hand(model):
    config = model.config
    heads, width = config.num_key_value_heads, config.head_dim
    by_hand = 2 * 4 * config.num_hidden_layers * heads * width
    assert cache_bytes(model, tiny.CONTEXT) == by_hand
    found = size(model, tiny.CONTEXT)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weights == 4 * found.parameters and found.cache_per_token == by_hand
    assert found.peak is None or torch.cuda.is_available()
    assert size(tiny.make_model("llama", torch.bfloat16), tiny.CONTEXT).weights == 2 * found.parameters


def test_tied_weights_count_once():
    model = tiny.make_model("llama-tied")
    assert size(model, tiny.CONTEXT).parameters == sum(p.numel() for p in model.parameters())


def test_the_peak_of_a_process_of_its_own(tmp_path):
    folder = tiny.make_folder(tmp_path / "model", "llama")
    held_here = torch.ones(1_500_000_000, dtype=torch.uint8)  # of which the other process has nothing
    assert 50e6 < process_peak(str(folder), Runtime(compute="float32", device="cpu")) < held_here.nbytes


def test_the_peak_on_a_gpu_is_of_one_model_whatever_else_is_loaded(monkeypatch):
    model = tiny.make_model("llama")
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr(type(model), "device", SimpleNamespace(type="cuda"))
    for name, value in {
        "reset_peak_memory_stats": None,
        "memory_allocated": 7000,
        "max_memory_allocated": 7500,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    monkeypatch.setattr(speed, "one_round", lambda *_: None)
    monkeypatch.setattr(speed, "cache_bytes", lambda *_: None)
    assert size(model, 64).peak == own + 500


def test_a_process_that_fails_tells_no_peak(tmp_path):
    assert process_peak(str(tmp_path / "nowhere"), Runtime()) is None
