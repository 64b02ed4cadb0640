"""Healing, by the command: what trains besides the replacement is merged into stock weights, and nothing else moves."""

from __future__ import annotations

import html
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from llm_streamline import assemble as assemble_module
from llm_streamline import oracle, run, verdict
from llm_streamline.errors import UserError
from llm_streamline.estimate import predict
from llm_streamline.heal import parse_heal
from llm_streamline.preview import estimate_only, plan_only
from llm_streamline.recipe import Runtime
from llm_streamline.records import Manifest
from llm_streamline.sizes import sizes_of
from llm_streamline.student import student_of
from llm_streamline.train import Trainer
from llm_streamline.training import check_training
from llm_streamline.workspace import Workspace
from tests.test_run import quiet, recipe, weights
from tests.test_train import stopping

__all__ = ["recipe"]  # a fixture
TOKENS = 31 * 128  # whole sequences of 4,000
WAY = {"remove": None, "window": "1:4", "tokens": 4000, "lr": 0.01}  # of 6 layers: 0, 4 and 5 stay


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(assemble_module, "verify", oracle.check)


def changed_layers(model, llama_folder) -> set[int]:
    """The source's numbers of the layers that stay and do not hold what they held."""
    source, found = load_file(llama_folder / "model.safetensors"), weights(model)
    numbers = {0: 0, 2: 4, 3: 5}
    changed = set()
    for name, value in found.items():
        _, _, rest = name.partition("model.layers.")
        number, _, rest = rest.partition(".")
        if not number:
            assert torch.equal(value, source[name]), name
        elif int(number) in numbers and not torch.equal(value, source[f"model.layers.{numbers[int(number)]}.{rest}"]):
            changed.add(numbers[int(number)])
    return changed


def test_a_heal_that_finds_stand_ins_alone_is_refused_before_training(recipe, tmp_path, monkeypatch):
    ends = {**WAY, "window": "4:6", "protect_last": 0}  # the last layer of what is left is the replacement
    monkeypatch.setattr(run, "train_replacement", None)
    with pytest.raises(UserError, match="--heal last:1 finds no layer to train"):
        run.compress(recipe(heal="last:1", **ends), quiet(tmp_path / "one"))
    with pytest.raises(UserError, match="--heal last:1 finds no layer to train"):
        plan_only(recipe(heal="last:1", **ends), Runtime(quiet=True))


def test_rates_are_those_of_the_sequences_that_each_stage_has(recipe, tmp_path):
    """Of 320 sequences 32 train the replacement: by AdamW, whose rate is half of Muon's, of which 288 have theirs."""
    long = {**WAY, "lr": None, "tokens": 40_000, "batch": 1, "accumulate": 1}
    with pytest.raises(UserError, match="--min-lr"):
        check_training(Workspace(recipe(heal="all", min_lr=8e-3, **long), quiet(tmp_path)))
    check_training(Workspace(recipe(min_lr=8e-3, **long), quiet(tmp_path)))


def test_the_head_alone_may_be_what_trains(recipe, tmp_path):
    result = run.compress(recipe(heal="last:1+head", **{**WAY, "window": "4:6", "protect_last": 0}), quiet(tmp_path))
    assert result.verification.passed and result.healing.trained_parameters > 0


@pytest.mark.parametrize(
    ("heal", "changed"), [("lora:2", {0, 4, 5}), ("layers:1", {0, 4}), ("all", {0, 4, 5}), ("none", set())]
)
def test_the_layers_it_names_change_and_no_others(heal, changed, recipe, llama_folder, tmp_path):
    slower = {"heal_lr": 0.002} if heal != "none" else {}
    result = run.compress(recipe(heal=heal, **slower, **WAY), quiet(tmp_path))
    assert changed_layers(tmp_path, llama_folder) == changed
    assert result.verification.passed
    assert (result.healing is None) == (heal == "none")
    if result.healing:
        assert result.healing.validation_best < result.healing.validation_before
        assert (result.fit.loss, result.healing.loss) == ("nmse:0.3,kl:0.7", "nmse:0.3,kl+0.1lm:0.7")
        assert result.fit.tokens + result.healing.tokens == TOKENS


def test_nothing_of_adapters_is_in_the_folder(recipe, tmp_path):
    run.compress(recipe(heal="lora", heal_lr=0.002, **WAY), quiet(tmp_path))
    assert not any("lora" in name or "base_layer" in name for name in weights(tmp_path))
    assert "peft" not in (tmp_path / "model" / "config.json").read_text()
    manifest = Manifest.read(tmp_path / "model" / "streamline.json")
    assert manifest.tensors["healed"] == 3 * 7 and manifest.tensors["kept"] + manifest.tensors["renamed"] > 0
    sentence = verdict.healed(manifest.plan, 21)
    page, card = (tmp_path / "report.html").read_text(), (tmp_path / "model" / "README.md").read_text()
    assert html.escape(sentence, quote=True) in page.replace("&#39;", "&#x27;") and sentence in card
    assert "Healing the rest" in page and "Healing the rest" in card
    assert "replaced, 21 healed.</li>" in page, "so that the source's tensors add up"
    assert "besides the replacement's" in sentence
    alone = manifest.plan.model_copy(update={"occupied": 0, "replace": "none"})
    assert verdict.healed(alone, 21) == "Healed (lora): 21 tensors are not the source's any more."
    assert verdict.healed(alone, 1) == "Healed (lora): 1 tensor is not the source's any more."


def test_a_healed_model_loads_and_writes_where_neither_peft_nor_this_tool_is(recipe, tmp_path):
    run.compress(recipe(heal="lora:2", heal_lr=0.002, **WAY), quiet(tmp_path))
    script = (
        "import sys; sys.modules['peft'] = sys.modules['llm_streamline'] = None\n"
        "from transformers import AutoModelForCausalLM as A; import torch\n"
        "model, loading = A.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(loading[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), loading\n"
        "assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape == (1, 7)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "model")], check=True)


def test_without_a_replacement_all_of_the_text_heals(recipe, tmp_path):
    result = run.compress(recipe(heal="layers", replace="none", heal_lr=0.002, **{**WAY, "lr": None}), quiet(tmp_path))
    assert result.fit is None and result.healing.tokens == TOKENS
    assert result.healing.validation_best < result.healing.validation_before and not result.plan.merely_cut


def test_a_killed_healing_goes_on_to_the_same_bits(recipe, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    way = recipe(heal="lora:2", **WAY)
    run.compress(way, quiet(whole))
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stopping(6, counted=lambda one: one.window.start == 0))
        with pytest.raises(KeyboardInterrupt):
            run.compress(way, quiet(cut, checkpoint_every=0.0001))
    assert (cut / "healing.safetensors").exists() and (cut / "replacement").exists()
    resumed = []
    monkeypatch.setattr("llm_streamline.train.say", lambda text, quiet: resumed.append(text))
    run.compress(way, quiet(cut, checkpoint_every=0.0001))
    assert "resumed at step 5 of 28" in resumed
    assert not (cut / "healing.safetensors").exists()
    one, other = weights(whole), weights(cut)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_loss_of_states_comes_first_where_neither_the_norm_nor_the_head_trains(recipe):
    losses = {heal: recipe(heal=heal).healing.loss_used for heal in ("lora", "all", "norm", "last:1+head")}
    both, logits = "nmse:0.3,kl+0.1lm:0.7", "kl+0.1lm"
    assert losses == {"lora": both, "all": both, "norm": logits, "last:1+head": logits}
    assert recipe(heal="all", heal_loss="kl:50").healing.loss_used == "kl:50"


def test_rates_given_for_everything_are_healings_too(recipe):
    given = {"replace": "none", "heal": "lora", "lr": 1e-3, "min_lr": 1e-5}
    other = given | {"replace": "layer", "heal_lr": 1e-2}
    both = [(one.lr, one.min_lr) for one in (recipe(**given).healing, recipe(**other).healing)]
    assert both == [(1e-3, 1e-5), (1e-2, None)]


def test_a_saved_format_of_fewer_bits_is_what_was_checked(recipe, tmp_path):
    result = run.compress(recipe(heal="all", dtype="bfloat16", **WAY), quiet(tmp_path))
    assert result.verification.passed and result.verification.logits_error < 1e-5
    assert result.healing.lr == pytest.approx(0.05 * result.fit.lr)
    assert all(value.dtype == torch.bfloat16 for value in weights(tmp_path).values())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"heal": "lora", "replace": "linear"}, "--heal lora does not go with --replace linear, whose map is part"),
        ({"heal_share": 0.4}, "--heal-share is for --heal"),
        ({"heal": "heads"}, "no way to heal"),
        ({"heal": "all", "heal_share": 1.0}, "--heal-share was given 1.0"),
        ({"heal": "all", "heal_loss": "ppl"}, "--heal-loss was given 'ppl'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(values, sentence, recipe):
    with pytest.raises(UserError, match=sentence):
        recipe(**values)


def test_a_share_that_leaves_nothing_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match="leaves nothing for one of the two"):
        run.compress(recipe(heal="all", heal_share=0.01, **{**WAY, "tokens": 640}), quiet(tmp_path / "out"))
    assert not (tmp_path / "out").exists(), "it is refused before anything is measured"
    with pytest.raises(UserError, match="--tokens 8 is less than one block"):
        run.compress(recipe(heal="all", **{**WAY, "tokens": 8}), quiet(tmp_path / "out"))


@pytest.mark.parametrize(("heal", "instead"), [("last:6+head", r"all\+head"), ("layers:100", "all")])
def test_more_layers_than_there_are_are_refused(heal, instead, recipe, tmp_path):
    past = rf"--heal {re.escape(heal)} reaches past the 5 layers that can be left; .* --heal {instead}\."
    with pytest.raises(UserError, match=past):
        run.compress(recipe(heal=heal, **WAY), quiet(tmp_path / "out"))
    with pytest.raises(UserError, match=past):
        estimate_only(recipe(heal=heal), quiet(tmp_path))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--heal last:5 reaches past the 4 layers"):
        plan_only(recipe(heal="last:5", **WAY), quiet(tmp_path))


def test_layers_that_are_not_held_are_not_healed(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Workspace, "offloads", True)
    with pytest.raises(UserError, match="have to be held in memory"):
        run.compress(recipe(heal="all", **WAY), quiet(tmp_path))
    assert not [*tmp_path.iterdir()]


def test_the_estimate_counts_it(recipe, tmp_path):
    def stage(**values):
        work = Workspace(recipe(**{**WAY, **values}), quiet(tmp_path))
        return {one.name: one for one in predict(sizes_of(work), False, False)}

    assert "healing" not in stage()
    few, many, more = (stage(heal=heal)["healing"].memory for heal in ("lora:1", "lora:8", "all"))
    assert few < many < more
    both = stage(heal="all")
    assert both["healing"].tokens < stage(heal="all", heal_share=0.95)["healing"].tokens
    assert both["training"].tokens < stage()["training"].tokens


def test_what_stands_in_keeps_its_rate_and_the_rest_has_its_own(recipe, tmp_path, monkeypatch):
    rates = []

    def step(self, optimizer, passages, sequences, lr, part):
        loss = whole(self, optimizer, passages, sequences, lr, part)
        if self.window.start == 0:
            rates.append({float(group["lr"]) for group in optimizer.param_groups})
        return loss

    whole = Trainer.step
    monkeypatch.setattr(Trainer, "step", step)
    result = run.compress(recipe(heal="all", heal_lr=0.001, warmup=0.2, **WAY), quiet(tmp_path))
    assert result.healing.lr == 0.001
    assert sorted(rates[-1]) == pytest.approx([0.001 / 10, 0.01 / 10]), "that of --heal-lr, and ten times as much: --lr"
    student = student_of(Workspace(recipe(**WAY), quiet(tmp_path)).model, result.plan, *_stand_in(recipe, tmp_path))
    student.quick = {1: 10.0}
    (slow, others, _), (quick, own, _) = student.paces()
    assert (slow, quick) == (1.0, 10.0) and {id(value) for value in own} == {id(v) for v in student[1].parameters()}
    assert len(others) + len(own) == len(student.trained())


def _stand_in(recipe, folder):
    work = Workspace(recipe(**WAY), quiet(folder))
    return work.replacement(work.model, [1]), parse_heal("all")
