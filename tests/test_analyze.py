from __future__ import annotations

import json
import math

import pytest
import torch

from llm_streamline.analyze import analyze
from llm_streamline.checkpoint import Source, load_model
from llm_streamline.errors import UserError
from llm_streamline.families import layers_of
from llm_streamline.forward import hidden_of
from llm_streamline.records import Window
from tests import tiny


def states_by_hooks(model, ids) -> list[torch.Tensor]:
    """Boundaries 0..L by plain hooks on each layer, the last before the final norm."""
    states: list[torch.Tensor] = []
    layers = layers_of(model)
    handles = [layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    handles += [layer.register_forward_hook(lambda _, __, output: states.append(hidden_of(output))) for layer in layers]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return states


def expected(model, ids, start: int, stop: int) -> tuple[float, float, float]:
    """Mean cosine, its standard error over sequences, and mean relative change, the slow and plain way."""
    states = states_by_hooks(model, ids)
    cosines = torch.cosine_similarity(states[start], states[stop], dim=-1).double().mean(dim=1)
    changes = (states[stop] - states[start]).norm(dim=-1) / states[start].norm(dim=-1)
    return float(cosines.mean()), float(cosines.std() / math.sqrt(len(ids))), float(changes.mean())


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_pair_of_boundaries_equals_a_computation_with_hooks(name):
    model, ids = tiny.make_model(name), tiny.random_ids(5, 24)
    found = analyze(model, ids, batch=2)
    for start in range(tiny.LAYERS):
        for stop in range(start + 1, tiny.LAYERS + 1):
            cosine, error, change = expected(model, ids, start, stop)
            assert found.cosine[start][stop] == pytest.approx(cosine, abs=1e-6)
            assert found.cosine_se[start][stop] == pytest.approx(error, abs=1e-6)
            assert found.relative_change[start][stop] == pytest.approx(change, rel=1e-4)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_similarities_equal_the_reference_but_for_its_last_window(name, shared):
    model = load_model(Source(str(shared / "golden" / name)), torch.float32)
    ids = torch.tensor(json.loads((shared / "golden" / name / "input_ids.json").read_text()))[:11]
    reference = json.loads((shared / "golden" / "reference_similarity.json").read_text())[name]["records"]
    found = analyze(model, ids, batch=4)
    for length, record in reference.items():
        *inner, last = record["mapped_similarity"]
        for start, value in enumerate(inner):
            assert 0.5 + 0.5 * found.cosine[start][start + int(length)] == pytest.approx(value, abs=1e-4)
        end = found.num_layers
        by_hooks, _, _ = expected(model, ids, end - int(length), end)
        assert found.cosine[end - int(length)][end] == pytest.approx(by_hooks, abs=1e-6)
        if name == "tiny-opt":  # its final norm moves the state; the reference's last entry is another number
            assert 0.5 + 0.5 * by_hooks != pytest.approx(last, abs=1e-5)


def test_batch_size_and_padding_change_nothing():
    model, ids = tiny.make_model("llama"), tiny.random_ids(4, 20)
    plain = analyze(model, ids, batch=4)
    one_by_one = analyze(model, ids, batch=1)
    padded_ids = torch.cat([ids, torch.zeros(4, 7, dtype=ids.dtype)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(4, 7, dtype=ids.dtype)], dim=1)
    padded = analyze(model, padded_ids, batch=3, mask=mask)
    for other in (one_by_one, padded):
        assert torch.allclose(torch.tensor(plain.cosine), torch.tensor(other.cosine), atol=1e-5)
        assert torch.allclose(torch.tensor(plain.relative_change), torch.tensor(other.relative_change), atol=1e-4)
    assert padded.tokens == plain.tokens == 80
    unmasked = analyze(model, padded_ids, batch=3)
    assert not torch.allclose(torch.tensor(plain.cosine), torch.tensor(unmasked.cosine), atol=1e-3)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_each_half_of_the_sequences_has_its_own_mean(batch):
    model, ids = tiny.make_model("llama"), tiny.random_ids(5, 16)
    halves = analyze(model, ids, batch).halves
    for half, sequences in zip(halves, (ids[0::2], ids[1::2]), strict=True):
        assert torch.allclose(torch.tensor(half), torch.tensor(analyze(model, sequences, 5).cosine), atol=1e-5)
    assert analyze(model, ids[:1], batch).halves == []


def test_windows_are_ranked_and_protected():
    found = analyze(tiny.make_model("llama"), tiny.random_ids(3, 16), batch=3)
    windows = found.windows(2, protect_first=1, protect_last=1)
    assert {w.start for w in windows} == {1, 2, 3}
    assert [found.of(w) for w in windows] == sorted((found.of(w) for w in windows), reverse=True)
    assert len(found.windows(2)) == tiny.LAYERS - 1
    assert found.of(Window(start=0, stop=1)) == found.cosine[0][1]


def test_non_finite_states_name_the_layer():
    model = tiny.make_model("llama")
    with torch.no_grad():
        layers_of(model)[3].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="output of layer 3"):
        analyze(model, tiny.random_ids(2, 8), batch=2)
