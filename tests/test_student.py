"""Healing: the student starts as the shortened model, leaves the dense one alone, and merges to what it computes."""

from __future__ import annotations

import pytest
import torch

from llm_streamline import student as student_module
from llm_streamline.errors import UserError
from llm_streamline.families import layers_of
from llm_streamline.forward import run_window, substituted
from llm_streamline.heal import Heal, parse_heal
from llm_streamline.records import LayerPlan, Window
from llm_streamline.replacement import ReplacementLayers, build_replacement
from llm_streamline.student import Student, check_installed, in_experts, split, student_of
from tests import tiny

WINDOW = Window(start=2, stop=4)
IDS = tiny.random_ids(2, 12)
COUNTS = {"parameters_before": 0, "parameters_after": 0, "similarity": 0, "similarity_se": 0, "plain_parameters": 0}


def plan_of(model, replace="layer") -> LayerPlan:
    return LayerPlan(
        model="",
        model_type=model.config.model_type,
        num_layers=len(layers_of(model)),
        window=WINDOW,
        replace=replace,
        occupied=0 if replace == "none" else 1,
        plain_window=WINDOW,
        why="",
        **COUNTS,
    )


def setup(name: str, heal: str, replace: str = "layer"):
    model = tiny.make_model(name).requires_grad_(False)
    plan = plan_of(model, replace)
    places = list(plan.replaced())
    replacement = build_replacement(model, places, "inherited", 0, replace) if places else ReplacementLayers()
    wanted = parse_heal(heal)
    assert wanted
    return model, plan, replacement, student_of(model, plan, replacement, wanted)


def top_state(model, plan, replacement) -> torch.Tensor:
    """What the source computes with the replacement in the window's place, by hooks."""
    whole = Window(start=0, stop=plan.num_layers)
    with substituted(model, plan.window, list(replacement)):
        return run_window(model, whole, IDS).leaving


def shaken(student: Student) -> None:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    for value in student.trained():
        value.data += 0.05 * torch.randn(value.shape, generator=generator)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba", "nemotron_h"])
def test_adapters_leave_alone_what_a_state_spaces_kernels_read_past_them(name):
    *_, student = setup(name, "lora:4")
    adapted = {name for name, value in student.named_parameters() if value.requires_grad and "lora_" in name}
    assert adapted and not any("out_proj" in name for name in adapted if "mixer" in name)
    assert not in_experts(student)


def test_what_experts_hold_without_adapters_is_counted():
    assert in_experts(setup("qwen3_moe", "lora:4")[-1]) > 0
    assert not in_experts(setup("qwen3_moe", "all")[-1]) and not in_experts(setup("llama-tied", "lora:4")[-1])


@pytest.mark.parametrize("heal", ["lora:4", "layers:1", "all"])
@pytest.mark.parametrize("name", ["llama-tied", "opt", "gpt2", "gemma3_text", "qwen3_moe", "bloom", "phi"])
def test_it_starts_as_the_shortened_model_and_merges_to_what_it_computes(name, heal):
    model, plan, replacement, student = setup(name, heal)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    passage = run_window(model, Window(start=0, stop=plan.num_layers), IDS)
    with torch.no_grad():
        torch.testing.assert_close(student.run(passage.entering, passage.calls), top_state(model, plan, replacement))
        shaken(student)
        healed = student.run(passage.entering, passage.calls)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the dense model changed"
    assert not torch.allclose(healed, top_state(model, plan, replacement), atol=1e-3)
    stays, replaced = split(student, model, plan)
    replacement.load_state_dict(replaced, strict=False)
    own = model.state_dict()
    assert set(stays) <= set(own) and stays
    for key, value in stays.items():
        own[key].copy_(value)
    torch.testing.assert_close(healed, top_state(model, plan, replacement), rtol=1e-4, atol=1e-4)


def test_only_the_neighbours_train_whole():
    model, plan, _, student = setup("llama", "layers:1")
    stays, replaced = split(student, model, plan)
    assert {key.split(".")[2] for key in stays} == {"1", "4"} and replaced
    model, plan, _, student = setup("llama", "all", replace="none")
    stays, replaced = split(student, model, plan)
    assert {key.split(".")[2] for key in stays} == {"0", "1", "4", "5"} and not replaced


def test_adapters_hold_what_they_say_and_a_silent_attention_stays_silent():
    model, plan, replacement, student = setup("llama", "lora:2", replace="mlp")
    config = model.config
    width, inner, narrow = config.hidden_size, config.intermediate_size, config.hidden_size // 2
    pairs = [(width, width)] * 2 + [(width, narrow)] * 2 + [(width, inner)] * 3
    adapters = 4 * 2 * sum(one + other for one, other in pairs)
    assert sum(value.numel() for value in student.trained()) == adapters + sum(
        value.numel() for value in replacement.trained()
    )
    shaken(student)
    _, replaced = split(student, model, plan)
    assert not any("self_attn" in key for key in replaced)


def test_the_state_is_of_what_trains_and_comes_back():
    _, _, _, student = setup("llama", "lora:2")
    kept = {key: value.clone() for key, value in student.state_dict().items()}
    assert sum(value.numel() for value in kept.values()) == sum(value.numel() for value in student.trained())
    shaken(student)
    student.load_state_dict(kept)
    assert all(torch.equal(value, kept[key]) for key, value in student.state_dict().items())
    with pytest.raises(ValueError, match="another student"):
        student.load_state_dict({})


def test_what_heals_is_said_in_words_that_are_known():
    assert parse_heal("none") is None
    assert parse_heal("lora") == Heal("lora", 16) and parse_heal("lora:8") == Heal("lora", 8)
    assert str(parse_heal("layers")) == "layers:1" and str(parse_heal("all")) == "all"
    for wrong in ("lora:0", "layers:x", "all:2", "heads", ""):
        with pytest.raises(ValueError, match="no way to heal"):
            parse_heal(wrong)


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(student_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--heal lora:4 needs peft.*llm-streamline\[heal\]"):
        check_installed("lora:4")
    check_installed("all")
    check_installed("none")
