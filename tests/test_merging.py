from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_streamline import assemble, oracle, run, verdict
from llm_streamline.errors import UserError
from llm_streamline.families import layers_of
from llm_streamline.merging import merged_layers
from llm_streamline.preview import estimate_only
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import Loss, Scores, Window
from tests import tiny
from tests.test_families import plan_for

WINDOW = Window(start=2, stop=5)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_matrices_are_added_up_and_the_rest_is_the_first_layers(name):
    model = tiny.make_model(name)
    (merged,) = merged_layers(model, [WINDOW])
    first, second, third = (dict(layers_of(model)[number].named_parameters()) for number in (2, 3, 4))
    for key, value in merged.named_parameters():
        wanted = second[key] + third[key] - first[key] if value.dim() > 1 else first[key]
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(value, first[key]) for key, value in merged.named_parameters())


def test_layers_of_other_shapes_are_refused():
    model = tiny.make_model("llama")
    layer = layers_of(model)[3]
    layer.mlp.up_proj = torch.nn.Linear(layer.mlp.up_proj.in_features, 3, bias=False)
    with pytest.raises(UserError, match=r"--replace merged adds up weights, and mlp.up_proj.weight .* 2:5"):
        merged_layers(model, [WINDOW])


def test_a_whole_run_trains_nothing(llama_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "verify", oracle.check)
    recipe = Recipe(model=str(llama_folder), data=str(text_file), preset="laco", remove=2, block=32)
    runtime = Runtime(output=tmp_path / "out", tasks="none", compute="float32", quiet=True)
    result = run.compress(recipe, runtime)
    assert result.verification.passed and result.fit is None and result.plan.occupied == 1
    saved, source = (AutoModelForCausalLM.from_pretrained(one) for one in (result.model, llama_folder))
    (merged,) = merged_layers(source, result.plan.windows)
    layer = layers_of(saved)[result.plan.window.start]
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in merged.state_dict().items())
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "one layer made of the window" in page.lower()
    assert "training" not in {stage.name for stage in estimate_only(recipe, Runtime(quiet=True)).stages}


@pytest.mark.parametrize("changes", [{"init": "random"}, {"epochs": 2}, {"windows": 2, "rounds": 2}])
def test_what_only_training_has_is_refused(changes):
    with pytest.raises(UserError, match=r"not trained: leave out|nothing to train"):
        Recipe(model="m", replace="merged", **changes)


def test_nothing_that_is_only_put_in_is_told_to_train_on_more():
    plan = plan_for(tiny.make_model("llama"), WINDOW, 1).model_copy(update={"replace": "merged"})
    loss = {name: Loss(nats=nats, se=0.01, tokens=10, sequences=2) for name, nats in (("dense", 3.0), ("cut", 3.5))}
    worse = Scores(**loss, saved=Loss(nats=5.1, se=0.01, tokens=10, sequences=2))
    said = verdict.came_back(plan, worse)
    assert (
        "what the layers are merged into makes it worse" in said
        and "Train what stands in (--replace layer), or" in said
    )
    two = plan.model_copy(update={"others": [Window(start=4, stop=6)]})
    assert "training of" not in verdict.came_back(two, worse.model_copy(update={"saved": loss["cut"]}))


def test_a_beginning_of_nothing_is_refused():
    with pytest.raises(UserError, match="--init random is for what stands in, and --replace none puts nothing there"):
        Recipe(model="m", replace="none", init="random")
