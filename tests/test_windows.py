"""Several windows: where they can lie, which are taken, and that what is saved is what was trained and checked."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_streamline import assemble as assemble_module
from llm_streamline import oracle, preview, run, selection, verdict
from llm_streamline.analyze import analyze
from llm_streamline.assemble import Parts, build
from llm_streamline.cache import Cached, StateCache
from llm_streamline.choose import choose, choose_windows, pick
from llm_streamline.comparison import CUT
from llm_streamline.errors import UserError
from llm_streamline.estimate import predict
from llm_streamline.families import layers_of
from llm_streamline.forward import run_window, shortened, substituted
from llm_streamline.heal import Heal, parse_heal
from llm_streamline.memory import alive_layers, layers_above
from llm_streamline.rank import rank
from llm_streamline.recipe import Recipe
from llm_streamline.records import LayerPlan, ModelShape, Window
from llm_streamline.removal import check_request
from llm_streamline.replacement import build_replacement
from llm_streamline.sizes import sizes_of
from llm_streamline.student import spanning, split, student_of
from llm_streamline.train import Trainer
from llm_streamline.windows import parse_windows, places_for, split_evenly
from llm_streamline.workspace import RunFolder, Workspace
from tests import tiny
from tests.test_choose import SHAPE, similarity
from tests.test_run import equal, quiet, recipe, weights
from tests.test_train import stopping

__all__ = ["recipe"]  # a fixture
TWO = {"remove": None, "window": "1:3,4:6", "protect_last": 0, "tokens": 4000}  # of 6 layers: 0 and 3 stay


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(assemble_module, "verify", oracle.check)


def plan_of(text: str, model=None, **values) -> LayerPlan:
    shape = SHAPE
    if model is not None:
        total, layers = (
            model.num_parameters(),
            [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)],
        )
        shape = ModelShape(name="m", model_type=model.config.model_type, total=total, layers=layers)
    asked = Recipe(model="m", window=text, protect_first=0, protect_last=0, **values)
    return choose(similarity(layers=shape.num_layers), shape, asked)


def shaken(layers):
    generator = torch.Generator().manual_seed(1)
    for value in layers.trained():
        value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return layers


def test_windows_are_read_in_order_and_apart():
    assert list(map(str, parse_windows("8:11, 3:6"))) == ["3:6", "8:11"]
    for wrong in ("3:6,6:8", "3:6,5:8", "3:6,", "3:6,x", "3:6,3:6"):
        with pytest.raises(ValueError, match="--window"):
            parse_windows(wrong)


def test_lengths_are_as_even_as_can_be():
    assert split_evenly(7, 3) == [3, 2, 2] and split_evenly(6, 2) == [3, 3] and split_evenly(4, 1) == [4]


@pytest.mark.parametrize("lengths", [[3], [2, 2], [3, 2], [2, 2, 1], [2, 1, 1]])
@pytest.mark.parametrize("taken", [(), ("4:6",), ("2:3", "6:7")])
def test_every_place_that_leaves_room_for_the_rest_is_found_and_no_other(lengths, taken):
    bounds, before = Window(start=1, stop=10), [Window.parse(one) for one in taken]
    starts = range(bounds.start, bounds.stop)
    wanted = set()
    for chosen in itertools.product(starts, repeat=len(lengths)):
        windows = [Window(start=s, stop=s + n) for s, n in zip(chosen, lengths, strict=True)]
        layers = [layer for window in (*windows, *before) for layer in window.layers()]
        touching = {window.stop for window in (*windows, *before)} & {window.start for window in (*windows, *before)}
        if len(layers) == len(set(layers)) and not touching and max(w.stop for w in windows) <= bounds.stop:
            wanted.add(chosen[0])
    assert [window.start for window in places_for(bounds, lengths, before)] == sorted(wanted)


def test_a_plan_of_two_windows():
    plan = plan_of("5:7,1:4")
    assert str(plan) == "layers 1:4, 5:7 (5) of 8 -> 1 layer each, net 3"
    assert (plan.occupied, plan.each, plan.net, plan.gone) == (2, 1, 3, [1, 2, 3, 5, 6])
    assert plan.sources() == [0, 1, 4, 5, 7] and plan.replaced() == [1, 5]
    assert plan.layer_map() == [0, "1:4", 4, "5:7", 7]
    assert plan.parameters_after == SHAPE.total - 30 and plan.plain_parameters == SHAPE.total - 30
    assert len(plan.plain_window) == 3 and plan.span == Window(start=1, stop=7)
    assert list(map(str, plan.cuts())) == ["1:2", "3:4"]
    assert [new for new in range(5) if Heal("layers", 1).whole(new, plan)] == [0, 1, 2, 3, 4]
    assert verdict.removed(plan).startswith(
        "Layers 1 to 3 and 5 to 6 (5 of 8) are gone; one trained layer of the model's own kind stands in the place of"
    )
    assert verdict.hooked(plan) == "its windows replaced"
    assert LayerPlan.model_validate_json(plan.model_dump_json()) == plan


def test_a_plan_of_an_earlier_version_still_reads():
    old = json.loads(plan_of("2:5").model_dump_json())
    del old["others"]
    plan = LayerPlan.model_validate(old)
    assert plan.windows == [plan.window] == [plan.span] and plan.sources() == [0, 1, 2, 5, 6, 7]


def test_two_layers_each_and_nothing_at_all():
    two, none = plan_of("0:3,4:8", replace="layer:2"), plan_of("1:3,5:7", replace="none")
    assert two.layer_map() == ["0:3", "0:3", 3, "4:8", "4:8"] and two.net == 3 and two.replaced() == [0, 1, 4, 5]
    assert none.layer_map() == [0, 3, 4, 7] and none.merely_cut and len(none.plain_window) == 4


def test_cosine_takes_the_next_apart_from_the_first_with_room_for_the_rest():
    shape = ModelShape(name="m", model_type="llama", total=200, layers=[10] * 10)
    asked = Recipe(model="m", remove="2", windows=2, select="cosine")
    measured = similarity({2: 4}, layers=10)
    first = pick(measured, shape, asked)
    assert first.window == Window(start=4, stop=6)
    cosine = [list(row) for row in measured.cosine]
    cosine[5][7], cosine[2][4], cosine[7][9] = 0.9999, 0.9998, 0.999  # the first overlaps, the second touches
    second = pick(measured.model_copy(update={"cosine": cosine}), shape, asked, None, [first.window])
    assert second.window == Window(start=7, stop=9) and "the most similar of 2 windows" in second.why
    plan = choose_windows(measured, shape, asked, [first, second])
    assert plan.window == first.window and plan.others == [second.window]
    assert plan.why.startswith("4:6: the most similar of 7 ") and "; then, with 4:6 left out, 7:9: the" in plan.why


def test_the_first_leaves_room_for_the_second():
    asked = Recipe(model="m", remove="2", windows=2, select="cosine")
    first = pick(similarity({2: 3}), SHAPE, asked)  # 3:5 in the middle of 1:7 would leave none
    assert first.window.start in (1, 4, 5)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3_text", "qwen3_moe", "gpt2"])
def test_the_saved_model_is_the_source_with_both_replaced_by_hooks(name, tmp_path):
    model, ids = tiny.make_model(name).requires_grad_(False), tiny.random_ids(2, 24)
    plan = plan_of("1:3,4:6", model)
    replacement = shaken(build_replacement(model, plan.replaced(), "inherited", 0))
    with torch.no_grad(), shortened(model, plan, list(replacement)):
        wanted = model(ids, use_cache=False).logits
    built, counts = build(Parts(model, plan, replacement, None), torch.float32)
    built.save_pretrained(tmp_path)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path)(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert built.num_parameters() == plan.parameters_after and counts["replaced"] > 0
    low, high = plan.windows
    with torch.no_grad(), substituted(model, low, [replacement[0]]), substituted(model, high, [replacement[1]]):
        assert torch.equal(model(ids, use_cache=False).logits, wanted)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt"])
def test_what_is_trained_is_the_whole_span(name):
    model, ids = tiny.make_model(name).requires_grad_(False), tiny.random_ids(2, 24)
    plan = plan_of("1:3,4:6", model)
    replacement = shaken(build_replacement(model, plan.replaced(), "inherited", 0))
    network = spanning(model, plan, replacement)
    passage = run_window(model, plan.span, ids)
    with torch.no_grad(), shortened(model, plan, list(replacement)):
        wanted = run_window(model, plan.span, ids).leaving
    found = network.run(passage.entering, passage.calls)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    found.square().mean().backward()
    assert {id(value) for value in network.trained()} == {id(value) for value in replacement.trained()}
    assert all(
        value.grad is not None and value.grad.abs().sum() > 0
        for layer in replacement
        for value in layer.parameters()
        if value.dim() > 1
    )
    assert spanning(model, plan_of("1:3", model), replacement) is replacement


@pytest.mark.parametrize("heal", ["lora:2", "layers:1"])
def test_a_healed_student_comes_apart_into_what_it_was_made_of(heal):
    model, ids = tiny.make_model("llama-tied").requires_grad_(False), tiny.random_ids(2, 24)
    plan = plan_of("1:3,4:6", model)
    replacement = build_replacement(model, plan.replaced(), "inherited", 0)
    student = shaken(student_of(model, plan, replacement, parse_heal(heal)))
    passage = run_window(model, Window(start=0, stop=plan.num_layers), ids)
    with torch.no_grad():
        wanted = student.run(passage.entering, passage.calls)
    stays, replaced = split(student, model, plan)
    again = build_replacement(model, plan.replaced(), "random", 0)
    again.load_state_dict(replaced)
    own = model.state_dict()
    for name, value in stays.items():
        own[name].copy_(value)
    with torch.no_grad(), shortened(model, plan, list(again)):
        found = run_window(model, Window(start=0, stop=plan.num_layers), ids).leaving
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert {name.split(".")[2] for name in stays} == {"0", "3"} and {name[0] for name in replaced} == {"0", "1"}


def test_windows_are_ranked_on_the_model_without_those_before(recipe, tmp_path, monkeypatch):
    work = Workspace(recipe(remove="2", windows=2, protect_first=0, protect_last=0, select="kl"), quiet(tmp_path))
    measured = analyze(work.model, work.parts.calibration, batch=4, quiet=True)
    real, asked = selection.rank, []

    def noted(model, blocks, batch, windows, *rest):
        found = real(model, blocks, batch, windows, *rest)
        asked.append((windows, found.dense.value, found.winner.window))
        return found

    monkeypatch.setattr(selection, "rank", noted)
    plan = selection.decide(work, measured)
    first, second = asked
    blocks = work.parts.calibration
    assert plan.window == first[2] and plan.others == [second[2]]
    assert second[2].apart([first[2]]) and all(one.apart([first[2]]) for one in second[0])
    with substituted(work.model, first[2]):
        again = rank(work.model, blocks, 4, second[0], "kl", quiet=True)
    assert again.winner.window == second[2] and second[1] == pytest.approx(again.dense.value) != first[1]
    assert preview.plan_only(work.recipe, quiet(tmp_path)) == plan


def test_by_cosine_too_the_second_window_is_the_most_similar_without_the_first(recipe, tmp_path):
    work = Workspace(recipe(remove="2", windows=2, protect_first=0, protect_last=0, select="cosine"), quiet(tmp_path))
    first = analyze(work.model, work.parts.calibration, batch=4, quiet=True)
    first.cosine[0][2] = 1.0  # so that the first is below all others
    plan = selection.decide(work, first)
    assert plan.window == Window(start=0, stop=2)
    with substituted(work.model, plan.window):
        again = analyze(work.model, work.parts.calibration, batch=4, quiet=True)
    (second,) = plan.others
    assert again.of(second) == max(again.of(one) for one in places_for(Window(start=0, stop=6), [2], [plan.window]))
    assert f"left out, {second}: " in plan.why and f"cosine {again.of(second):.4f} ±" in plan.why
    assert again.of(second) != pytest.approx(first.of(second), abs=1e-4)


def test_compress_with_two_windows(recipe, llama_folder, tmp_path):
    result = run.compress(recipe(**TWO, seed=1), quiet(tmp_path))
    plan = result.plan
    assert result.verification.passed and plan.net == 2 and result.fit.validation_best < result.fit.validation_before
    work = Workspace(recipe(**TWO, seed=1), quiet(tmp_path))
    blocks, saved_model = work.parts.validation.long(), AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():  # what was trained is what was saved
        dense, found = (one(blocks).logits.double().div(2).log_softmax(-1) for one in (work.model, saved_model))
    kl = float((dense.exp() * (dense - found)).sum(-1).mean()) * 2**2
    assert result.fit.measure == "kl" and result.fit.validation_best == pytest.approx(kl, rel=1e-3)
    source, saved = load_file(llama_folder / "model.safetensors"), weights(tmp_path)
    names = {new: old for new, old in enumerate(plan.layer_map()) if isinstance(old, int)}
    assert names == {0: 0, 2: 3}
    for name, value in saved.items():
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        if not name.startswith("model.layers."):
            assert torch.equal(value, source[name])
        elif int(number) in names:
            assert torch.equal(value, source[f"model.layers.{names[int(number)]}.{rest}"])
        elif value.dim() > 1:
            assert not torch.equal(value, source[f"model.layers.{plan.sources()[int(number)]}.{rest}"])
    card, page = (tmp_path / "model" / "README.md").read_text(), (tmp_path / "report.html").read_text()
    assert "0 **[1:3]** 3 **[4:6]**" in card and "its windows replaced by hooks" in " ".join(card.split())
    assert "the layers 1:3, 4:6, which" in page and page.count('class="band"') == 2 == page.count('class="chosen"')
    asked = run.standings(work, plan, RunFolder(tmp_path, work.recipe))
    assert asked[CUT].name.endswith(f"without {plan.plain_window}") and len(plan.plain_window) == 2


def test_a_stopped_training_goes_on_to_the_same_bits(recipe, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run.compress(recipe(**TWO), quiet(whole))
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stopping(12))
        with pytest.raises(KeyboardInterrupt):
            run.compress(recipe(**TWO), quiet(cut, checkpoint_every=0.0001))
    resumed = []
    monkeypatch.setattr("llm_streamline.train.say", lambda text, quiet: resumed.append(text))
    run.compress(recipe(**TWO), quiet(cut, checkpoint_every=0.0001))
    assert any(text.startswith("resumed at step 11 of") for text in resumed)
    assert equal(weights(whole), weights(cut))


def test_another_stand_in_and_states_alone(recipe, tmp_path):
    asked = {"remove": "2", "windows": 2, "protect_last": 0, "tokens": 2000, "loss": "nmse", "replace": "mlp"}
    result = run.compress(recipe(**asked, select="cosine"), quiet(tmp_path))
    assert result.verification.passed and len(result.plan.windows) == 2 and result.plan.net == 2


def test_healing_comes_on_top(recipe, llama_folder, tmp_path):
    result = run.compress(recipe(**{**TWO, "tokens": 2500}, heal="lora:2", heal_lr=0.002, lr=0.01), quiet(tmp_path))
    assert result.verification.passed and result.healing.validation_best < result.healing.validation_before
    source, saved = load_file(llama_folder / "model.safetensors"), weights(tmp_path)
    for new, old in ((0, 0), (2, 3)):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert not torch.equal(saved[name.format(new)], source[name.format(old)])
    assert torch.equal(saved["model.embed_tokens.weight"], source["model.embed_tokens.weight"])


def test_states_of_the_span_are_cached_for_later_epochs(recipe, tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    way = recipe(**{**TWO, "tokens": 1000}, epochs=2, loss="nmse")
    run.compress(way, quiet(one))
    taken, real = [], StateCache.read
    monkeypatch.setattr(StateCache, "read", lambda self, ids: taken.append(len(ids)) or real(self, ids))
    monkeypatch.setattr(Cached, "_judge", lambda self: None)  # which lets go of it where computing is as fast
    fit = run.compress(way, quiet(other, cache=10**9)).fit
    assert sum(taken) >= fit.tokens // fit.block // 2, "the second epoch computed them again"
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"windows": 2, "remove": None, "window": "1:3"}, "--windows 2 was given with --window"),
        ({"windows": 2, "replace": "linear"}, "--replace linear stands in for one window, and 2"),
        ({"windows": 2, "replace": "swiglu", "custom_code": True}, "--replace swiglu stands in for one window"),
        ({"windows": 2, "select": "greedy", "replace": "none"}, "takes single layers, not windows"),
        ({"windows": 0}, "--windows was given 0"),
        ({"remove": None, "window": "1:3,3:5"}, "1:3 and 3:5 overlap or touch"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(values, sentence, recipe):
    with pytest.raises(UserError, match=sentence):
        recipe(**values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"remove": "1", "windows": 2}, "each of 2 windows takes at least one"),
        (
            {"remove": "4", "windows": 2},
            "6 in 2 windows, one between any two, of 8 layers would take",
        ),
        ({"windows": 3, "remove": "50%"}, "--windows 3 do not fit in 8 layers, with 1 net layer of .*; give at most 2"),
        ({"windows": 3, "remove": "1"}, "--windows 3 do not fit in 8 layers, .*; give at most 1"),
        ({"windows": 3, "max_params": 130}, "--windows 3 do not fit in 8 layers, .*; give at most 2"),
        ({"remove": "5", "windows": 4, "replace": "none"}, "--windows 4 do not fit in 8 layers, .*; give at most 3"),
        ({"window": "1:3,6:8"}, "--window 6:8 takes protected layers"),
        ({"window": "1:3,5:6"}, "--window 5:6 has 1 layer and --replace layer puts 1"),
        ({"max_params": 130, "windows": 2}, "cannot be reached"),
    ],
)
def test_what_no_windows_can_give_is_refused(values, sentence):
    with pytest.raises(UserError, match=sentence):
        check_request(SHAPE, Recipe(model="m", **values))


def test_as_few_layers_as_bring_the_parameters_asked_for():
    asked = Recipe(model="m", max_params=150, windows=2, select="cosine")
    assert len(pick(similarity(), SHAPE, asked).window) == 3
    with pytest.raises(UserError, match="cannot be reached"):
        check_request(SHAPE, Recipe(model="m", max_params=149, windows=2))


def test_with_nothing_in_their_place_they_need_not_be_held(recipe, tmp_path, monkeypatch):
    way = recipe(**{**TWO, "replace": "none"})
    held = run.compress(way, quiet(tmp_path / "held"))
    monkeypatch.setattr(Workspace, "offloads", True)
    on_disk = run.compress(way, quiet(tmp_path / "on_disk"))
    assert on_disk.plan == held.plan and on_disk.scores.saved.nats == pytest.approx(held.scores.saved.nats)


def test_layers_between_windows_have_to_be_held(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Workspace, "offloads", True)
    with pytest.raises(UserError, match="2 windows are trained through the layers between them"):
        run.compress(recipe(**TWO), quiet(tmp_path))


def test_the_estimate_counts_what_gradients_pass(recipe, tmp_path):
    one, two, given = (Recipe(model="m", loss="nmse", **way) for way in ({}, {"windows": 2}, {"window": "3:6,8:11"}))
    assert [layers_above(way, 32) for way in (one, two, given)] == [0, 26, 2]
    assert alive_layers(given, 32) == 5 and layers_above(Recipe(model="m", loss="kl", window="3:6,8:11"), 32) == 23

    def stage(**values):
        work = Workspace(recipe(loss="nmse", batch=2, protect_last=0, **values), quiet(tmp_path))
        return {each.name: each for each in predict(sizes_of(work), False, False)}

    single, double = stage(), stage(windows=2)
    assert single["training"].memory < double["training"].memory
    assert 2 * single["ranking"].tokens >= double["ranking"].tokens > single["ranking"].tokens
