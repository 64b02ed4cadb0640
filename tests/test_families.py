"""One checklist, every configuration: cut = source with those layers skipped; saved, reloaded and cached alike."""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
)

from llm_streamline import assemble, families, oracle
from llm_streamline.architectures import RECURRING
from llm_streamline.assemble import Parts, build
from llm_streamline.errors import StreamlineError, UserError
from llm_streamline.families import (
    FAMILIES,
    family_of,
    find_stack,
    kinds_of_layers,
    layers_of,
    mixing,
    parameter_counts,
    sliced_config,
    sliding_window,
)
from llm_streamline.forward import run_window, substituted
from llm_streamline.records import LayerPlan, ModelShape, Window
from llm_streamline.replacement import ReplacementLayers, build_replacement
from tests import tiny

NEWER = hasattr(LlamaConfig, "is_heterogeneous")  # whether layers can have settings of their own
WITH_MIXER = [name for name, config in tiny.CONFIGS.items() if FAMILIES[config.model_type].mixers()]
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


@contextmanager
def kinds_of(config, keep: list[int]):
    """The list of kinds that is read at every forward, by place, of these layers alone; stored, or made of others."""
    key = config.attribute_map.get("layer_types", "layer_types")
    kinds = getattr(config, key, None)
    made = isinstance(getattr(type(config), key, None), property)
    kept = [kinds[i] for i in keep] if kinds else None
    with mock.patch.object(type(config) if made else config, key, kept) if kinds else nullcontext():
        yield


def skipped_by_list(model, window: Window, ids: torch.Tensor) -> torch.Tensor:
    """A second oracle, which shares nothing with hooks: the layers taken out of the source's own list."""
    path, _, name = FAMILIES[model.config.model_type].layers.rpartition(".")
    parent, config = model.get_submodule(path), model.config
    whole = getattr(parent, name)
    keep = [i for i in range(len(whole)) if i not in window.layers()]
    try:
        with kinds_of(config, keep), torch.no_grad():  # everything else was read when the layers were made
            setattr(parent, name, torch.nn.ModuleList(whole[i] for i in keep))
            config.num_hidden_layers = len(keep)
            return model(ids, use_cache=False).logits
    finally:
        setattr(parent, name, whole)
        config.num_hidden_layers = len(whole)


def cut_and_loaded(model, window: Window, folder: Path) -> PreTrainedModel:
    """The model without the window, as stock transformers loads it; refuses weights that are not all used."""
    built, _ = build(Parts(model, plan_for(model, window), ReplacementLayers(), None), torch.float32)
    built.save_pretrained(folder)
    loaded, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return loaded.eval()


def check_logits(model, loaded, window: Window, ids: torch.Tensor) -> None:
    with substituted(model, window), torch.no_grad():
        hooked = model(ids, use_cache=False).logits
    with torch.no_grad():
        cut = loaded(ids, use_cache=False).logits
    largest = hooked.abs().max()
    for expected in (hooked, skipped_by_list(model, window, ids)):
        assert (cut - expected).abs().max() <= oracle.TOLERANCE * largest, "other logits"
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
    assert (cut - dense).abs().max() > 1e-2 * largest, "a cut that changes nothing tests nothing"


def check_generation(loaded, ids: torch.Tensor) -> None:
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached, uncached = (loaded.generate(ids, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, uncached), "the cache changes what is generated"


def check_config(old, new, window: Window) -> None:
    """Every list per layer, in whatever key: it has the new length and what belongs to the layers that stay."""
    keep = [i for i in range(tiny.LAYERS) if i not in window.layers()]
    assert new.num_hidden_layers == len(keep)
    for key, value in old.to_dict().items():
        if isinstance(value, list) and len(value) == tiny.LAYERS:
            assert getattr(new, key) == [value[i] for i in keep], key
    if hasattr(old, "decoder_sparse_step"):
        assert [is_sparse(new, i) for i in range(len(keep))] == [is_sparse(old, i) for i in keep]


def is_sparse(config, layer: int) -> bool:
    """The rule as the model's documentation has it."""
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def windows_of(name: str) -> list[Window]:
    """All of them; where a family adds no new way of meeting a model, a third that shifts from one to the next."""
    if tiny.MATRIX or name in tiny.VARIED:
        return WINDOWS
    return WINDOWS[list(tiny.CONFIGS).index(name) % 3 :: 3]


def test_every_family_has_a_tiny_configuration():
    known = {kind for kind in FAMILIES if kind in CONFIG_MAPPING}  # an older transformers does not know them all
    assert {config.model_type for config in tiny.CONFIGS.values()} == known


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_cut_is_the_source_with_the_layers_skipped(name, tmp_path):
    model, ids = tiny.make_model(name), tiny.random_ids(2, 40)
    assert (sliding_window(model.config) or 0) + 6 < 20, "prompts outrun the window"
    for window in windows_of(name):
        loaded = cut_and_loaded(model, window, tmp_path)
        check_config(model.config, loaded.config, window)
        check_logits(model, loaded, window, ids)
        if len(window) == 3:  # logits tell a wrong cut; what a cache adds is the layers' numbers, whichever they are
            check_generation(loaded, ids[:, :20])


def only_the_count(config, sources):
    new = copy.deepcopy(config)
    new.num_hidden_layers = len(sources)
    return new


def lists_cut_short(config, sources):
    """What passes transformers' own validation: as many entries as layers, but not those of the layers that stay."""
    new = only_the_count(config, sources)
    for key in ("layer_types", "no_rope_layers", "attention_layers"):
        if getattr(new, key, None):
            setattr(new, key, getattr(new, key)[: len(sources)])
    if hasattr(new, "attention_layers"):
        new.attention_types = [[[kind], 1] for kind in new.attention_layers]
    return new


@pytest.mark.parametrize(
    ("name", "mistake", "way"),
    [
        ("qwen2", only_the_count, "refused by transformers"),
        ("qwen3", only_the_count, "refused by transformers"),
        ("gemma2", only_the_count, "refused by transformers"),
        ("gemma3_text", only_the_count, "refused by transformers"),
        ("cohere2", only_the_count, "refused by transformers"),
        ("smollm3", only_the_count, "refused by transformers"),
        ("gpt_neo", only_the_count, "refused by transformers"),
        ("qwen3_moe", only_the_count, "tensors"),
        ("qwen3_moe-period", only_the_count, "tensors"),
        ("qwen2", lists_cut_short, "logits"),
        ("qwen3", lists_cut_short, "logits"),
        ("gemma2", lists_cut_short, "logits"),
        ("gemma3_text", lists_cut_short, "logits"),
        ("cohere2", lists_cut_short, "logits"),
        ("smollm3", lists_cut_short, "logits"),
        ("smollm3-period", lists_cut_short, "logits"),
        ("gpt_neo", lists_cut_short, "logits"),
    ],
)
def test_without_slicing_the_checklist_fails(name, mistake, way, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "sliced_config", mistake)
    model, window, ids = tiny.make_model(name), Window(start=1, stop=2), tiny.random_ids(2, 40)
    try:
        check_logits(model, cut_and_loaded(model, window, tmp_path), window, ids)
        found = "none"
    except AssertionError as error:
        found = "logits" if "other logits" in str(error) else "tensors"
    except StreamlineError as error:
        assert "tensors are not accounted for" in str(error)
        found = "tensors"
    except Exception as error:  # strict configurations have their own kind of errors
        assert type(error).__module__.startswith(("huggingface_hub", "builtins")), error
        found = "refused by transformers"
    assert found == way


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe-period"])
def test_layers_cut_out_of_a_list_and_saved_load_silently_wrong(name, tmp_path):
    model, window, ids = tiny.make_model(name), Window(start=1, stop=2), tiny.random_ids(2, 40)
    naive = copy.deepcopy(model)
    del naive.model.layers[1]
    naive.config.num_hidden_layers -= 1
    naive.save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match="other logits"):
        check_logits(model, AutoModelForCausalLM.from_pretrained(tmp_path).eval(), window, ids)


def layers_with_calls(name: str):
    """Each layer with what its model passed to it, and a hidden state to run it on."""
    model, window = tiny.make_model(name), Window(start=0, stop=tiny.LAYERS)
    passage = run_window(model, window, tiny.random_ids(2, 40))
    family = FAMILIES[model.config.model_type]
    return model.config, family, list(zip(layers_of(model), passage.calls, strict=True)), passage.entering.detach()


def reach(layer, call, hidden: torch.Tensor, token: int = 0) -> list[int]:
    """The tokens whose output changes when that token's hidden state does."""
    changed = hidden.clone()
    changed[:, token] = 2 * changed[:, token].flip(-1)  # a constant added would be lost in a norm that centres
    with torch.no_grad():
        difference = (call.replay(layer, changed) - call.replay(layer, hidden)).abs().amax(dim=(0, 2))
    return torch.nonzero(difference > 1e-6).flatten().tolist()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_sliding_window_is_as_wide_as_the_narrowest_layer_sees(name):
    config, _, layers, hidden = layers_with_calls(name)
    kinds = kinds_of_layers(config) or ["full_attention"] * len(layers)
    attending = [one for one, kind in zip(layers, kinds, strict=True) if kind not in RECURRING]
    widths = [max(reach(layer, call, hidden)) + 1 for layer, call in attending]
    assert min(widths, default=hidden.shape[1]) == (sliding_window(config) or hidden.shape[1])


@pytest.mark.parametrize("name", WITH_MIXER)
def test_with_the_attention_output_zeroed_only_the_mlp_acts(name):
    _, family, layers, hidden = layers_with_calls(name)
    for layer, call in layers:
        assert len(reach(layer, call, hidden, 3)) > 1
        for parameter in [parameter for module in mixing(layer, family) for parameter in module.parameters()]:
            torch.nn.init.zeros_(parameter)
        assert reach(layer, call, hidden, 3) == [3]
        call.replay(layer, hidden).square().sum().backward()
        moved = {key for key, value in layer.named_parameters() if value.grad is not None and value.grad.any()}
        moved = {key for key in moved if not key.startswith(family.mixers())}
        assert moved and all(key.startswith(tuple(f"{part}." for part in family.mlp)) for key in moved), moved


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_finder_agrees_with_the_row(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny.CONFIGS[name])
    assert find_stack(model) == FAMILIES[model.config.model_type].layers


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
    assert counts["replaced"] == sum(len(layer.state_dict()) for layer in layers_of(model)[2 : 2 + occupied])
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


def test_the_sources_own_code_is_not_named_in_the_new_configuration():
    config = tiny._llama(auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    new = sliced_config(config, [0, 1])
    assert "auto_map" not in new.to_dict() and "auto_map" in config.to_dict()


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


@pytest.mark.skipif("kimi_linear" not in CONFIG_MAPPING, reason="the installed transformers does not know it")
def test_lists_that_only_other_programs_read_are_sliced_too():
    own = {"head_dim": 8, "full_attn_layers": [3, 5, 6], "kda_layers": [1, 2, 4]}
    config = copy.deepcopy(tiny.CONFIGS["kimi_linear"])
    config.linear_attn_config = own
    found = sliced_config(config, [0, 3, 4, 5]).linear_attn_config
    assert found == {"head_dim": 8, "full_attn_layers": [3, 4], "kda_layers": [1, 2]}
    assert config.linear_attn_config == own
    config = copy.deepcopy(tiny.CONFIGS["lfm2"])
    config.full_attn_idxs = [2, 4, 5]
    assert sliced_config(config, [0, 3, 4, 5]).full_attn_idxs == [2, 3]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (AutoConfig.for_model("bert", architectures=["BertLMHeadModel"]), "'bert' is an encoder, and not proven"),
        (AutoConfig.for_model("rwkv"), "generates otherwise with its state than without"),
        (AutoConfig.for_model("zamba"), "layers share weights"),
        (AutoConfig.for_model("jamba"), "told apart by periods, which few removals leave"),
        (AutoConfig.for_model("diffllama"), "computed with the number of each layer"),
        (AutoConfig.for_model("gemma3n_text"), "share keys and values"),
        (AutoConfig.for_model("ctrl", n_layer=2, n_embd=64, n_head=4), r"not proven .*transformer.h: try"),
        (AutoConfig.for_model("dbrx"), r"not proven to survive the removal of layers; give another"),
        (AutoConfig.for_model("modernbert-decoder"), "first or last layer is unlike the others"),
        (AutoConfig.for_model("ernie4_5_moe", moe_layer_interval=2), "moe_layer_interval 2 is not proven"),
        (AutoConfig.for_model("gpt2", scale_attn_by_inverse_layer_idx=True), "scaled by the layer's number"),
        (AutoConfig.for_model("gpt2", add_cross_attention=True), "an encoder; give"),
        (AutoConfig.for_model("gemma2", use_bidirectional_attention=True), "see later ones"),
        *([(tiny._llama(per_layer_config={1: {"intermediate_size": 48}}), "settings of their own")] if NEWER else []),
        (tiny._llama(architectures=["LlamaForSequenceClassification"]), "no causal LM"),
    ],
)
def test_what_is_not_proven_is_refused_with_the_reason(config, reason):
    with pytest.raises(UserError, match=reason):
        family_of(config)


def test_every_kind_that_is_listed_as_refused_is_refused_for_what_is_listed(monkeypatch):
    monkeypatch.setattr(families, "find_stack", lambda model: None)
    monkeypatch.setattr(families.AutoModelForCausalLM, "from_config", lambda config: None)
    refused = [one for one in families.known_families() if one["status"] == "refused"]
    assert len(refused) > (80 if NEWER else 50)
    for one in refused:
        kind = CONFIG_MAPPING[one["model_type"]]
        config = kind.__new__(kind)  # not all can be made without being told anything
        with pytest.raises(UserError, match="encoder-decoder|" + re.escape(one["reason"])) as caught:
            family_of(config)
        assert f"model type {config.model_type!r}" in str(caught.value)


def test_a_model_with_its_own_code_is_refused():
    class MyConfig(LlamaConfig):
        pass

    with pytest.raises(UserError, match="runs its own code"):
        family_of(MyConfig())


@pytest.fixture
def unknown(monkeypatch):
    """A kind that transformers knows and the table does not, for as long as a test takes."""
    monkeypatch.setattr(families, "TRIED", {})
    monkeypatch.delitem(FAMILIES, "smollm3")
    return tiny.CONFIGS["smollm3"]


def test_a_kind_without_a_row_can_be_tried_by_the_path_of_its_layers(unknown):
    with pytest.raises(UserError, match=r"not proven .*try --family-from model.layers, or add a row"):
        family_of(unknown)
    families.try_family(unknown, "model.layers")
    row = family_of(unknown)
    assert (row.layers, row.norm, row.tried, row.down) == ("model.layers", "norm", True, ())
    assert all(one["model_type"] != "smollm3" or one["status"] == "refused" for one in families.known_families())


def test_every_list_as_long_as_the_layers_is_sliced_for_a_tried_kind(unknown, monkeypatch):
    monkeypatch.setattr(families, "PER_LAYER_KEYS", ())
    families.try_family(unknown, "model.layers")
    new = sliced_config(unknown, [0, 3, 4, 5])
    assert new.no_rope_layers == [1, 1, 1, 0] and len(new.layer_types) == 4


def test_what_cannot_be_tried_is_refused(unknown):
    with pytest.raises(
        UserError, match=r"no list of 6 layers in model type 'smollm3'; they seem to be at model.layers"
    ):
        families.try_family(unknown, "model.norm")
    with pytest.raises(UserError, match=r"'llama' is proven, and needs no path; leave it out"):
        families.try_family(tiny.CONFIGS["llama"], "model.layers")
    with pytest.raises(UserError, match=r"'diffllama' is computed with the number of each layer; leave it out"):
        families.try_family(AutoConfig.for_model("diffllama"), "model.layers")
    with pytest.raises(UserError, match=r"none of norm, .* is found in model type 'ctrl'; it needs a row"):
        families.try_family(AutoConfig.for_model("ctrl", n_layer=2, n_embd=64, n_head=4), "transformer.h")
