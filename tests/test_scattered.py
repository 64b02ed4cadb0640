"""Single layers that go, wherever they lie: which, what is left of the model, and that it is what was checked."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from llm_streamline import assemble as assemble_module
from llm_streamline import oracle, run, selection, verdict
from llm_streamline.analyze import analyze
from llm_streamline.choose import choose_layers, least_influence
from llm_streamline.errors import UserError
from llm_streamline.families import layers_of
from llm_streamline.forward import shortened, substituted
from llm_streamline.heal import Heal
from llm_streamline.recipe import Recipe
from llm_streamline.records import ModelShape, Window, runs_of
from llm_streamline.scoring.perplexity import next_token_loss
from llm_streamline.student import student_of
from llm_streamline.workspace import Workspace
from tests import tiny
from tests.test_choose import SHAPE, similarity
from tests.test_rank import work
from tests.test_run import quiet, recipe, weights

__all__ = ["recipe"]  # a fixture


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(assemble_module, "verify", oracle.check)


def plan_without(layers, **values):
    values = {"select": "greedy", "replace": "none", **values}
    return choose_layers(similarity(), SHAPE, Recipe(model="m", **values), layers)


def test_layers_are_told_in_as_few_runs_as_hold_them():
    assert runs_of([]) == []
    assert list(map(str, runs_of([5, 1, 2, 7, 6]))) == ["1:3", "5:8"]


def test_a_plan_without_scattered_layers():
    plan = plan_without([6, 2, 5])
    assert (plan.window, plan.dropped, plan.gone, plan.net) == (Window(start=5, stop=7), [2], [2, 5, 6], 3)
    assert plan.sources() == plan.layer_map() == [0, 1, 3, 4, 7]
    assert plan.parameters_after == SHAPE.total - 30 == plan.plain_parameters
    assert str(plan) == "layers 2:3, 5:7 (3) of 8 -> nothing, net 3" and "6, 2, 5" in plan.why
    assert verdict.removed(plan).startswith("Layers 2 and 5 to 6 (3 of 8) are gone; nothing stands in their place.")


def test_words_for_one_layer_and_for_many():
    assert verdict.removed(plan_without([3])).startswith("Layer 3 (1 of 8) is gone; nothing stands in its place.")
    assert verdict.removed(plan_without([1, 3, 5])).startswith("Layers 1, 3 and 5 (3 of 8) are gone")


def test_influence_takes_the_layers_that_change_least_between_the_protected_ends():
    found, shape = similarity({1: 4}), ModelShape(name="m", model_type="t", total=180, layers=[10] * 8)
    assert least_influence(found, shape, Recipe(model="m", protect_first=2), 1) == [4]
    assert set(least_influence(found, shape, Recipe(model="m", protect_first=2, protect_last=3), 3)) == {2, 3, 4}


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_the_source_without_them_is_the_source_with_each_skipped(name):
    model, ids = tiny.make_model(name), tiny.random_ids(2, 12)
    plan = plan_without([1, 4]).model_copy(update={"num_layers": len(layers_of(model))})
    with torch.no_grad(), shortened(model, plan):
        found = model(ids).logits
    one, other = (substituted(model, Window(start=layer, stop=layer + 1)) for layer in (1, 4))
    with torch.no_grad(), one, other:
        assert torch.equal(model(ids).logits, found)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, found)


def test_greedy_takes_what_costs_least_each_time(llama_folder, text_file, monkeypatch):
    one = work(llama_folder, text_file, select="greedy", replace="none")
    model, blocks = one.model, one.parts.calibration

    def cost(layers):
        with substituted(model, Window(start=layers[0], stop=layers[0] + 1)):
            if len(layers) == 1:
                return next_token_loss(model, blocks, 4, "", quiet=True).nats
            with substituted(model, Window(start=layers[1], stop=layers[1] + 1)):
                return next_token_loss(model, blocks, 4, "", quiet=True).nats

    real, begun = selection.rank, []

    def rank(*given):  # of the model as it is then: without what has gone before
        begun.append(next_token_loss(model, blocks, 4, "", quiet=True).nats)
        return real(*given)

    monkeypatch.setattr(selection, "rank", rank)
    dense = next_token_loss(model, blocks, 4, "", quiet=True).nats
    first = min(range(1, 5), key=lambda layer: cost([layer]))
    second = min(set(range(1, 5)) - {first}, key=lambda layer: cost([first, layer]))
    measured = analyze(model, blocks, batch=4, quiet=True)
    assert selection.single(one, measured) == [first, second]
    assert begun == [dense, cost([first])] and begun[0] != begun[1]


@pytest.mark.parametrize("select", ["influence", "greedy"])
def test_the_saved_model_is_the_source_without_them(select, recipe, llama_folder, tmp_path):
    result = run.compress(recipe(select=select, replace="none"), quiet(tmp_path))
    plan = result.plan
    assert result.verification.passed and plan.merely_cut and len(plan.gone) == 2 == plan.net
    source, saved = load_file(llama_folder / "model.safetensors"), weights(tmp_path)
    for new, old in enumerate(plan.sources()):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert torch.equal(saved[name.format(new)], source[name.format(old)])


def test_what_stays_can_be_healed(recipe, tmp_path):
    result = run.compress(recipe(select="influence", replace="none", heal="lora:2", heal_lr=0.002), quiet(tmp_path))
    assert result.verification.passed and result.healing.validation_best < result.healing.validation_before


def test_the_student_leaves_them_out():
    model = tiny.make_model("llama").requires_grad_(False)
    plan = plan_without([1, 4]).model_copy(update={"num_layers": 6})
    student = student_of(model, plan, [], Heal("all", 0))
    assert len(student) == 4 and all(next(layer.parameters()).requires_grad for layer in student)


def test_nothing_can_stand_in_their_place(recipe, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--select greedy takes single layers"):
        recipe(select="greedy")
    with pytest.raises(UserError, match="leaves nothing to select"):
        recipe(select="influence", replace="none", remove=None, window="1:3")
    monkeypatch.setattr(Workspace, "offloads", True)
    with pytest.raises(UserError, match="--select greedy reads the model 2 times over"):
        selection.single(Workspace(recipe(select="greedy", replace="none"), quiet(tmp_path)), similarity())
