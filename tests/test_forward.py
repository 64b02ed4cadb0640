from __future__ import annotations

import pytest
import torch

from llm_streamline.families import layers_of
from llm_streamline.forward import hidden_of, run_window, substituted
from llm_streamline.records import Window
from tests import tiny
from tests.test_train import WINDOW, trainer


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("occupied", [1, 2])
def test_the_replacement_computes_in_training_what_it_computes_in_the_model(name, occupied):
    found, ids = trainer(name, occupied, init="random"), tiny.random_ids(2, 32)
    passage = run_window(found.model, WINDOW, ids)
    with torch.no_grad():
        in_training = found.replacement.run(passage.entering.float(), passage.calls)
    seen: list[torch.Tensor] = []
    last = layers_of(found.model)[WINDOW.stop]
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with substituted(found.model, WINDOW, list(found.replacement)), torch.no_grad():
        found.model(ids)
    handle.remove()
    torch.testing.assert_close(seen[0], in_training, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_later_tokens_change_nothing_earlier(name):
    found, ids = trainer(name), tiny.random_ids(2, 32)
    changed = ids.clone()
    changed[:, 20:] = tiny.random_ids(2, 12, seed=5)
    states = []
    for tokens in (ids, changed):
        passage = run_window(found.model, WINDOW, tokens)
        states.append(found.replacement.run(passage.entering, passage.calls).detach())
    torch.testing.assert_close(states[0][:, :20], states[1][:, :20], rtol=0, atol=1e-6)
    assert (states[0][:, 20:] - states[1][:, 20:]).abs().max() > 1e-2


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("window", [Window(start=0, stop=2), Window(start=3, stop=tiny.LAYERS)])
def test_a_window_is_run_between_its_boundaries_and_nothing_above(name, window):
    model, ids = tiny.make_model(name), tiny.random_ids(2, 16)
    layers, ran, states = layers_of(model), [], []

    def record(layer, _, output):
        ran.append(list(layers).index(layer))
        states.append(hidden_of(output))

    for layer in layers:
        layer.register_forward_hook(record)
    passage = run_window(model, window, ids)
    assert ran == list(range(window.stop))
    torch.testing.assert_close(passage.leaving, states[window.stop - 1], rtol=0, atol=0)
    if window.start:
        torch.testing.assert_close(passage.entering, states[window.start - 1], rtol=0, atol=0)
    assert len(passage.calls) == len(window)
