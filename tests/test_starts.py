"""What a replacement begins as: the one layer of its window that costs least alone in its place."""

from __future__ import annotations

import pytest
import torch

from llm_streamline import assemble as assemble_module
from llm_streamline import oracle, run, selection
from llm_streamline.errors import UserError
from llm_streamline.families import layers_of
from llm_streamline.forward import substituted
from llm_streamline.recipe import Runtime
from llm_streamline.records import Window
from llm_streamline.replacement import build_replacement, fits
from llm_streamline.starts import best_start, with_starts
from llm_streamline.workspace import Workspace
from tests.test_run import quiet, recipe

__all__ = ["recipe"]  # a fixture
WINDOW = Window(start=1, stop=5)
WAY = {"remove": None, "window": "1:5", "tokens": 1000}


def plain_losses(work: Workspace) -> dict[int, float]:
    """By a model that has but one layer of the window left, without a hook."""
    ids, model = work.parts.calibration.long(), work.model
    own, found = list(layers_of(model)), {}
    for layer in WINDOW.layers():
        model.model.layers = torch.nn.ModuleList([*own[: WINDOW.start], own[layer], *own[WINDOW.stop :]])
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        found[layer] = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    model.model.layers = torch.nn.ModuleList(own)
    return found


def test_it_is_the_layer_whose_stay_costs_least(recipe, tmp_path):
    work = Workspace(recipe(**WAY), quiet(tmp_path))
    first = best_start(work, WINDOW)
    losses = plain_losses(work)
    assert first == min(losses, key=losses.__getitem__)
    with torch.no_grad():
        layers_of(work.model)[first].mlp.down_proj.weight.mul_(100)
    losses = plain_losses(work)
    assert first != best_start(work, WINDOW) == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize("replace", ["layer", "mlp"])
def test_the_run_begins_with_it_and_says_so(replace, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assemble_module, "verify", oracle.check)
    monkeypatch.setattr("llm_streamline.starts.best_start", lambda work, window: 3)
    result = run.compress(recipe(replace=replace, lr=1e-9, min_lr=0.0, **WAY), quiet(tmp_path))
    assert result.plan.starts == [3] and result.plan.replaced() == [1] and result.verification.passed
    told = Workspace(recipe(replace=replace, **WAY), Runtime(compute="float32"))
    with_starts(told, result.plan)
    assert "what stands in for 1:5 begins as layer 3" in capsys.readouterr().err
    with_starts(told, result.plan, result.plan)
    assert "begins as" not in capsys.readouterr().err, "of an earlier round, it goes on from what has trained"
    work = Workspace(recipe(replace=replace, **WAY), quiet(tmp_path))
    begun = build_replacement(work.model, [1], "best", 0, replace, [3])
    with substituted(work.model, WINDOW, list(begun)), torch.no_grad():
        wanted = work.model(input_ids=work.parts.validation.long()).logits
    saved = work.load_saved(tmp_path / "model", False)
    with torch.no_grad():
        torch.testing.assert_close(saved(input_ids=work.parts.validation.long()).logits, wanted, rtol=0, atol=1e-4)


def test_the_papers_is_the_first(recipe, tmp_path):
    work = Workspace(recipe(init="inherited", **WAY), quiet(tmp_path))
    (first,) = work.replacement(work.model, [1])
    source = layers_of(work.model)[1].state_dict()
    assert all(torch.equal(value, source[name]) for name, value in first.state_dict().items())
    assert recipe(preset="paper", **WAY).start == "inherited"


def test_layers_on_the_disk_are_looked_through_only_where_asked(recipe, tmp_path, monkeypatch, capsys):
    work = Workspace(recipe(**WAY), quiet(tmp_path))
    plan = selection.decide(work, run.measure(work))
    monkeypatch.setattr(Workspace, "offloads", True)
    monkeypatch.setattr("llm_streamline.starts.best_start", lambda work, window: 3)
    left, asked = (Workspace(recipe(init=init, **WAY), quiet(tmp_path, quiet=False)) for init in (None, "best"))
    assert with_starts(left, plan) == plan and "--init best looks for the best one anyway" in capsys.readouterr().err
    assert with_starts(asked, plan).starts == [3] and "does not fit" not in capsys.readouterr().err


def test_weights_of_other_shapes_cannot_begin(recipe, tmp_path, monkeypatch):
    work = Workspace(recipe(**WAY), quiet(tmp_path))
    order = sorted(plain_losses(work).items(), key=lambda pair: pair[1])
    monkeypatch.setattr("llm_streamline.starts.fits", lambda model, layer, place: layer != order[0][0])
    assert best_start(work, WINDOW) == order[1][0]
    layers_of(work.model)[3].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(3, 8))
    assert [layer for layer in range(6) if fits(work.model, layer, 1)] == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("replace", ["layer:2", "none", "merged", "linear"])
def test_it_is_for_one_layer_of_the_models_own(replace, recipe):
    assert recipe(replace=replace).start == ("solved" if replace == "linear" else "inherited")
    refused = {"layer:2": "is for one layer", "none": "puts nothing there", "merged": "not trained"}
    with pytest.raises(UserError, match=refused.get(replace, "begins as its closed form")):
        recipe(replace=replace, init="best")


def test_the_text_is_shared_before_the_model_is_read_also_where_a_run_goes_on(recipe, tmp_path, monkeypatch):
    work, read, real = Workspace(recipe(**WAY), quiet(tmp_path)), [], Workspace.share
    monkeypatch.setattr(Workspace, "share", lambda self: read.append("model" in self.__dict__) or real(self))
    best_start(work, WINDOW)
    assert read == [False]
