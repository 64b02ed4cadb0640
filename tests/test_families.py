"""One checklist, every configuration: cut = source with those layers skipped; saved, reloaded and cached alike."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, T5Config

from llm_streamline.assemble import Parts, build
from llm_streamline.errors import UserError
from llm_streamline.families import FAMILIES, family_of, layers_of, parameter_counts, sliced_config
from llm_streamline.forward import substituted
from llm_streamline.records import LayerPlan, ModelShape, Window
from llm_streamline.replacement import ReplacementLayers, build_replacement
from tests import tiny

WINDOWS = [Window(start=a, stop=b) for a in range(tiny.LAYERS) for b in range(a + 1, min(a + 4, tiny.LAYERS + 1))]


def plan_for(model, window: Window, occupied: int = 0) -> LayerPlan:
    total, layers = parameter_counts(model)
    shape = ModelShape(name="tiny", model_type=model.config.model_type, total=total, layers=layers)
    removed = sum(shape.layers[window.start + occupied : window.stop])
    return LayerPlan(
        model="tiny",
        model_type=shape.model_type,
        num_layers=shape.num_layers,
        window=window,
        replace="layer" if occupied else "none",
        occupied=occupied,
        parameters_before=total,
        parameters_after=total - removed,
        similarity=0.9,
        similarity_se=0.0,
        plain_window=window,
        plain_parameters=total - sum(layers[window.start : window.stop]),
        why="a test",
    )


def skipped_by_list(model, window: Window, ids: torch.Tensor) -> torch.Tensor:
    """A second oracle, which shares nothing with hooks: the layers taken out of the source's own list."""
    parent = model.get_submodule(FAMILIES[model.config.model_type].layers.rpartition(".")[0])
    whole, count = parent.layers, model.config.num_hidden_layers
    parent.layers = torch.nn.ModuleList(layer for i, layer in enumerate(whole) if i not in window.layers())
    model.config.num_hidden_layers = len(parent.layers)
    try:
        with torch.no_grad():
            return model(ids, use_cache=False).logits
    finally:
        parent.layers, model.config.num_hidden_layers = whole, count


def test_every_family_has_a_tiny_configuration():
    assert {config.model_type for config in tiny.CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_cut_is_the_source_with_the_layers_skipped(name, tmp_path):
    model, ids = tiny.make_model(name), tiny.random_ids(2, 40)
    dense = model(ids).logits
    for window in WINDOWS:
        with substituted(model, window), torch.no_grad():
            hooked = model(ids, use_cache=False).logits
        parts = Parts(model, plan_for(model, window), ReplacementLayers(), None)
        built, _ = build(parts, torch.float32)
        built.save_pretrained(tmp_path / str(window.start) / str(window.stop))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(window.start) / str(window.stop)).eval()
        with torch.no_grad():
            cut = loaded(ids, use_cache=False).logits
        torch.testing.assert_close(cut, hooked, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cut, skipped_by_list(model, window, ids), rtol=1e-5, atol=1e-5)
        assert (cut - dense).abs().max() > 1e-2, "a cut that changes nothing tests nothing"


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_cached_generation_equals_uncached(name, tmp_path):
    model = tiny.make_model(name)
    built, _ = build(Parts(model, plan_for(model, Window(start=1, stop=3)), ReplacementLayers(), None), torch.float32)
    built.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = tiny.random_ids(2, 20)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached = loaded.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, loaded.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("occupied", [1, 2])
def test_inherited_layers_are_bit_equal_to_the_first_pruned_ones(name, occupied):
    model, window = tiny.make_model(name), Window(start=2, stop=5)
    plan = plan_for(model, window, occupied)
    inherited = build_replacement(model, plan.replaced(), "inherited", seed=0)
    for layer, source in zip(inherited, layers_of(model)[2:], strict=False):
        for key, value in source.state_dict().items():
            assert torch.equal(layer.state_dict()[key], value), key
    built, counts = build(Parts(model, plan, inherited, None), torch.float32)
    for key, value in layers_of(model)[2].state_dict().items():
        assert torch.equal(layers_of(built)[2].state_dict()[key], value), key
    assert counts["replaced"] == occupied * len(layers_of(model)[2].state_dict())
    assert sum(counts.values()) == len(model.state_dict())
    assert built.num_parameters() == plan.parameters_after


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_removing_nothing_keeps_every_bit(name):
    model = tiny.make_model(name)
    built, counts = build(
        Parts(model, plan_for(model, Window(start=3, stop=3)), ReplacementLayers(), None), torch.float32
    )
    assert counts == {"kept": len(model.state_dict()), "renamed": 0, "removed": 0, "replaced": 0}
    for key, value in model.state_dict().items():
        assert torch.equal(built.state_dict()[key], value), key


def test_config_keys_that_depend_on_layer_numbers_are_sliced():
    config = Qwen2Config(
        num_hidden_layers=6,
        layer_types=["full_attention", "sliding_attention"] * 3,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=4,
    )
    config.mlp_only_layers = [0, 3, 5]
    new = sliced_config(config, [0, 1, 4, 5])
    assert new.num_hidden_layers == 4
    assert new.layer_types == ["full_attention", "sliding_attention"] * 2
    assert new.mlp_only_layers == [0, 3]
    assert new.max_window_layers == 2
    assert config.num_hidden_layers == 6 and config.mlp_only_layers == [0, 3, 5]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (Qwen2Config(), "not proven"),
        (tiny._llama(architectures=["LlamaForSequenceClassification"]), "no causal LM"),
    ],
)
def test_what_is_not_proven_is_refused_with_the_reason(config, reason):
    with pytest.raises(UserError, match=reason):
        family_of(config)
