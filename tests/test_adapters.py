"""A LoRA adapter of the dense model goes on in its shortened one: kept layers compute the same bits."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_streamline import assemble as assemble_module
from llm_streamline import oracle, run
from llm_streamline.adapters import CONFIG, WEIGHTS, remap_adapter
from llm_streamline.errors import UserError
from llm_streamline.families import layers_of
from llm_streamline.forward import run_window
from llm_streamline.records import Window
from tests import tiny
from tests.test_run import quiet, recipe

__all__ = ["recipe"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # which peft still asks for
NEW = {0: 0, 4: 2, 5: 3}  # of 6 layers 1 to 3 go, for one in the place of layer 1


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(assemble_module, "verify", oracle.check)


@pytest.fixture
def shorter(recipe, tmp_path):
    run.compress(recipe(remove=None, window="1:4", tokens=2000, loss="nmse"), quiet(tmp_path / "shorter"))
    return tmp_path / "shorter"


def adapter_of(folder, target, **more):
    """A peft adapter of the model in `folder` whose factors are all drawn, and the model with it."""
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **more}
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**settings)).eval()
    model.save_pretrained(target)
    return model


def passing(model, layer: int) -> torch.Tensor:
    """What leaves a layer that is given what the dense model's second one is."""
    passage = run_window(model, Window(start=layer, stop=layer + 1), tiny.random_ids(2, 12))
    state = torch.randn(passage.entering.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return passage.calls[0].replay(layers_of(model)[layer], state)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_kept_layers_compute_with_it_what_they_did(more, llama_folder, shorter, tmp_path):
    dense = adapter_of(llama_folder, tmp_path / "lora", **more)
    found = remap_adapter(tmp_path / "lora", shorter, tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(shorter / "model")
    bare = passing(model, 0)
    loaded = PeftModel.from_pretrained(model, tmp_path / "new").eval()
    for old, new in NEW.items():
        one, other = passing(dense.get_base_model(), old), passing(loaded.get_base_model(), new)
        assert torch.equal(one, other)
    assert not torch.equal(bare, passing(loaded.get_base_model(), 0)), "an adapter that does nothing tests nothing"
    per_layer = 6 if "use_dora" in more else 4
    assert (found.kept, found.left_out, found.layers_left_out) == (3 * per_layer, 3 * per_layer, [1, 2, 3])
    assert found.outside == len(more.get("modules_to_save", []))
    assert not any("lora" in name for name, _ in layers_of(loaded.get_base_model())[1].named_parameters())
    if not more:
        every = load_file(tmp_path / "new" / WEIGHTS)
        assert sum(torch.equal(value, load_file(tmp_path / "lora" / WEIGHTS)[key]) for key, value in every.items()) >= 4


def test_patterns_and_listed_layers_are_renumbered(llama_folder, shorter, tmp_path):
    ranks = {"layers.4.self_attn.q_proj": 3, "layers.2.self_attn.q_proj": 5}
    adapter_of(llama_folder, tmp_path / "lora", layers_to_transform=[0, 2, 4], rank_pattern=ranks)
    remap_adapter(tmp_path / "lora", shorter, tmp_path / "new")
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert config["layers_to_transform"] == [0, 2] and config["rank_pattern"] == {"layers.2.self_attn.q_proj": 3}
    assert config["base_model_name_or_path"] == str(shorter / "model")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(shorter / "model"), tmp_path / "new")
    assert layers_of(loaded.get_base_model())[2].self_attn.q_proj.lora_A["default"].weight.shape[0] == 3


def test_modules_listed_by_name_are_renumbered(llama_folder, shorter, tmp_path):
    adapter_of(llama_folder, tmp_path / "lora", target_modules=["layers.2.mlp.up_proj", "layers.5.mlp.up_proj"])
    remap_adapter(tmp_path / "lora", shorter, tmp_path / "new")
    assert json.loads((tmp_path / "new" / CONFIG).read_text())["target_modules"] == ["layers.3.mlp.up_proj"]


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "embed_tokens", "lm_head"], r".*\.layers\.[045]\.(self_attn\.q_proj|mlp\.down_proj)"],
    ids=["modules-outside", "an-expression-with-numbers"],
)
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
def test_what_layers_alone_cannot_tell_is_told_module_by_module(targets, llama_folder, shorter, tmp_path):
    dense = adapter_of(llama_folder, tmp_path / "lora", target_modules=targets)
    remap_adapter(tmp_path / "lora", shorter, tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(shorter / "model")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        loaded = PeftModel.from_pretrained(model, tmp_path / "new").eval()
    for old, new in NEW.items():
        assert torch.equal(passing(dense.get_base_model(), old), passing(loaded.get_base_model(), new))
    kept = load_file(tmp_path / "new" / WEIGHTS)
    found = {key.replace(".default", "") for key in loaded.state_dict() if "lora_" in key}
    assert found == {key for key in kept if "lora_" in key}, "nothing more and nothing less is adapted"
    if isinstance(targets, list):
        assert any("embed_tokens.lora_" in key for key in kept) and any("lm_head.lora_" in key for key in kept)


def test_a_folder_with_code_of_its_own_is_refused(recipe, llama_folder, tmp_path):
    way = {"remove": None, "window": "1:4", "tokens": 2000, "replace": "ffn", "custom_code": True}
    run.compress(recipe(**way), quiet(tmp_path / "own"))
    adapter_of(llama_folder, tmp_path / "lora")
    assert "brings its own model code" in refused(tmp_path / "lora", tmp_path / "own", tmp_path)


def refused(adapter, shorter, tmp_path) -> str:
    with pytest.raises(UserError) as caught:
        remap_adapter(adapter, shorter, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    return str(caught.value)


def test_what_cannot_be_remapped_is_refused(llama_folder, shorter, tmp_path):
    lora = tmp_path / "lora"
    adapter_of(llama_folder, lora, layers_to_transform=[1, 2])
    assert "adapts only layers 1, 2, none of which is in" in refused(lora, shorter, tmp_path)
    assert "is no adapter, as it has no" in refused(tmp_path, shorter, tmp_path)
    assert "is no model made by llm-streamline" in refused(lora, llama_folder, tmp_path)
    weights = {key.replace("layers.2.", "layers.9."): value for key, value in load_file(lora / WEIGHTS).items()}
    save_file(weights, lora / WEIGHTS)
    assert "adapts layer 9, and the model that was shortened had 6" in refused(lora, shorter, tmp_path)
    config = json.loads((lora / CONFIG).read_text())
    (lora / CONFIG).write_text(json.dumps({**config, "peft_type": "IA3"}))
    assert "is an adapter of type IA3" in refused(lora, shorter, tmp_path)
    (lora / CONFIG).write_text("{")
    assert "is no JSON object" in refused(lora, shorter, tmp_path)
    (lora / CONFIG).write_text(json.dumps(config))
    (lora / WEIGHTS).write_bytes((lora / WEIGHTS).read_bytes()[:-100])
    assert "cannot be read" in refused(lora, shorter, tmp_path)
    (lora / WEIGHTS).unlink()
    assert f"has no {WEIGHTS}" in refused(lora, shorter, tmp_path)


def test_a_folder_that_is_there_is_left_alone(llama_folder, shorter, tmp_path):
    adapter_of(llama_folder, tmp_path / "lora")
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="is there already"):
        remap_adapter(tmp_path / "lora", shorter, tmp_path / "new")
    assert not [*(tmp_path / "new").iterdir()]
