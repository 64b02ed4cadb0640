"""The norm and the head train with the layers: right gradients, an own matrix for a tied head, stock folders."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from llm_streamline import assemble as assemble_module
from llm_streamline import oracle, run
from llm_streamline import upper as upper_module
from llm_streamline.above import tied, untie, weights_above
from llm_streamline.errors import UserError
from llm_streamline.families import final_norm, layers_of
from llm_streamline.forward import run_window, substituted
from llm_streamline.heal import Heal, parse_heal
from llm_streamline.losses import kl, next_token
from llm_streamline.objective import Part
from llm_streamline.optimizers import Pace, make_optimizer
from llm_streamline.records import Manifest, Window
from llm_streamline.replacement import build_replacement
from llm_streamline.student import Student
from llm_streamline.train import Trainer
from llm_streamline.upper import Upper
from tests import tiny
from tests.test_healing import WAY
from tests.test_run import quiet, recipe, weights

__all__ = ["recipe"]  # a fixture
WINDOW = Window(start=2, stop=4)
IDS = tiny.random_ids(3, 13)
BOTH = ("norm", "head")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(assemble_module, "verify", oracle.check)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_norm_is_what_the_last_layer_leads_to(name):
    model, seen = tiny.make_model(name), {}
    norm = final_norm(model)
    hooks = [layers_of(model)[-1].register_forward_hook(lambda _, given, out: seen.update(layer=out))]
    if norm is not None:
        hooks.append(norm.register_forward_hook(lambda _, given, out: seen.update(norm=given[0])))
    with torch.no_grad():
        model(IDS, use_cache=False)
    left = seen["layer"][0] if isinstance(seen["layer"], tuple) else seen["layer"]
    assert torch.equal(seen["norm"], left) if norm is not None else name.startswith("opt")


@pytest.mark.parametrize("part", [Part("kl"), Part("kl", 5), Part("lm"), Part("kl", text=0.5)], ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "opt", "gpt2", "gemma2", "cohere2"])
def test_gradients_are_those_of_the_whole_model_with_its_own_norm_and_head(name, part, monkeypatch):
    monkeypatch.setattr(upper_module, "CHUNK_LOGITS", 5 * len(IDS) * tiny.VOCABULARY)
    model = tiny.make_model(name, torch.float64).requires_grad_(False)
    found = []
    for chunked in (True, False):
        replacement = build_replacement(model, [WINDOW.start], "random", seed=0).double()
        own = {key: (1.1 * value).requires_grad_() for key, value in weights_above(model, BOTH).items()}
        if chunked:
            passage = run_window(model, WINDOW, IDS)
            upper = Upper(model, WINDOW.stop, False, 2.0, own)
            loss = upper.loss(passage, replacement.run(passage.entering, passage.calls), part)
        else:
            teacher = model(IDS, use_cache=False).logits
            with substituted(model, WINDOW, replacement):
                given = {"input_ids": IDS, "use_cache": False}
                student = functional_call(model, own, kwargs=given, tie_weights=False).logits
            if part.kind == "lm":
                loss = next_token(student[:, :-1], IDS[:, 1:]).mean()
            else:
                loss = kl(student, teacher, part.top, 2.0).mean()
                loss = loss + part.text * next_token(student[:, :-1], IDS[:, 1:]).mean()
        (3 * loss).backward()
        found.append((loss.item(), [value.grad for value in (*replacement.trained(), *own.values())]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for one, other in zip(*(gradients for _, gradients in found), strict=True):
        assert (one is None) == (other is None)
        if one is not None:  # some families' norms compute in float32 whatever they are given
            assert (one - other).norm() <= 1e-5 * other.norm() + 1e-8
    assert all(value.grad.norm() > 1e-3 for value in own.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_head_that_is_one_with_the_embeddings_gets_its_own():
    model = tiny.make_model("llama-tied")
    assert tied(model) and not tied(tiny.make_model("llama"))
    before = model(IDS).logits
    untie(model)
    assert not tied(model) and not model.config.tie_word_embeddings and torch.equal(model(IDS).logits, before)
    model.get_output_embeddings().weight.data.zero_()
    assert model.get_input_embeddings().weight.abs().sum() > 0


def test_what_is_not_there_is_refused():
    model = tiny.make_model("opt")
    model.model.decoder.final_layer_norm = None
    with pytest.raises(UserError, match="--heal norm finds no norm"):
        weights_above(model, BOTH)
    assert set(weights_above(model, ("head",))) == {"lm_head.weight"}


def test_a_student_holds_copies_under_names_that_come_back():
    model = tiny.make_model("llama", torch.bfloat16).requires_grad_(False)
    student = Student(list(layers_of(model)), range(tiny.LAYERS), weights_above(model, BOTH))
    student.pace_above = 0.5
    assert set(student.above()) == {"model.norm.weight", "lm_head.weight"} and len(student) == tiny.LAYERS
    assert all(value.dtype == torch.float32 and value.requires_grad for value in student.above().values())
    kept = {key: value.clone() for key, value in student.state_dict().items()}
    (pace,) = student.paces()
    assert (pace.rate, pace.turned, len(pace.weights)) == (0.5, False, 2)
    for value in student.above().values():
        value.data += 1
    assert not torch.equal(student.above()["lm_head.weight"], model.lm_head.weight.float())
    student.load_state_dict(kept)
    assert torch.equal(student.above()["lm_head.weight"], model.lm_head.weight.float())


def test_muon_leaves_a_head_to_adamw():
    head, other = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = make_optimizer("muon", [Pace(1.0, [other]), Pace(0.5, [head], turned=False)], 0.01, 0.0)
    kinds = [type(part).__name__ for part in optimizer.parts]
    assert kinds == ["Several", "AdamW"] and optimizer.param_groups[-1]["params"] == [head]


@pytest.mark.parametrize(
    ("heal", "changed"),
    [
        ("head", {"lm_head.weight"}),
        ("norm", {"model.norm.weight"}),
        ("last:1+norm+head", {"lm_head.weight", "model.norm.weight", "model.layers.3."}),
        ("lora:2+head", {"lm_head.weight", "model.layers.0.", "model.layers.2.", "model.layers.3."}),
    ],
)
def test_what_is_named_changes_and_nothing_else(heal, changed, recipe, llama_folder, tmp_path):
    result = run.compress(recipe(heal=heal, heal_lr=0.002, **WAY), quiet(tmp_path))
    source, found = load_file(llama_folder / "model.safetensors"), weights(tmp_path)
    old = {0: 0, 2: 4, 3: 5}
    moved = set()
    for name, value in found.items():
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        inside = name.startswith("model.layers.")
        if inside and int(number) not in old:
            continue
        before = source[f"model.layers.{old[int(number)]}.{rest}" if inside else name]
        if not torch.equal(value, before):
            moved.add(f"model.layers.{number}." if inside else name)
    assert moved == changed
    assert result.verification.passed and result.healing.validation_best < result.healing.validation_before


def test_a_tied_head_is_saved_apart_and_counted(recipe, tmp_path):
    folder = tiny.make_folder(tmp_path / "tied", "llama-tied")
    wanted = recipe(model=str(folder), preset="last-n-head", **{**WAY, "window": None, "remove": "2"})
    result = run.compress(wanted, quiet(tmp_path / "out"))
    plan = result.plan
    assert plan.window == Window(start=4, stop=6) and "the highest window" in plan.why
    loaded = AutoModelForCausalLM.from_pretrained(result.model)
    assert loaded.num_parameters() == plan.parameters_after == result.verification.parameters
    assert not loaded.config.tie_word_embeddings and not tied(loaded)
    source = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.get_input_embeddings().weight, source.get_input_embeddings().weight)
    assert not torch.equal(loaded.lm_head.weight, source.lm_head.weight)
    assert result.healing.trained_parameters == sum(
        value.numel()
        for name, value in loaded.named_parameters()
        if name.startswith(("lm_head", "model.norm", "model.layers.1.", "model.layers.2.", "model.layers.3."))
    )
    tensors = Manifest.read(tmp_path / "out" / "model" / "streamline.json").tensors
    assert tensors["healed"] == 2 + sum(
        1 for name in source.state_dict() if name.startswith(("model.layers.1.", "model.layers.2.", "model.layers.3."))
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("last", Heal("last", 3)),
        ("last:2+head+norm", Heal("last", 2, BOTH)),
        ("head", Heal("", 0, ("head",))),
        ("all+norm", Heal("all", 0, ("norm",))),
    ],
)
def test_words_for_it(text, wanted):
    assert parse_heal(text) == wanted and parse_heal(str(wanted)) == wanted


@pytest.mark.parametrize("text", ["head+head", "head+last", "none+head", "last:0", "+head", "all+"])
def test_what_is_no_word_for_it(text):
    with pytest.raises(ValueError, match="no way to heal"):
        parse_heal(text)


def test_a_loss_of_states_does_not_train_them(recipe):
    with pytest.raises(UserError, match=r"--heal head trains what only a loss of logits sees.*nmse"):
        recipe(heal="head", heal_loss="nmse:0.5,kl:0.5")


@pytest.mark.parametrize(("heal", "times"), [("lora:2+head", 0.05), ("last:1+head", 1.0)])
def test_a_head_trains_as_gently_as_whole_layers_do(heal, times, recipe, tmp_path, monkeypatch):
    paces = []

    def optimizer(self):
        if self.window.start == 0:
            paces.extend(self.replacement.paces())
        return whole(self)

    whole = Trainer.optimizer
    monkeypatch.setattr(Trainer, "optimizer", optimizer)
    result = run.compress(recipe(heal=heal, **{**WAY, "tokens": 2000}), quiet(tmp_path))
    head = paces[-1]
    assert not head.turned and head.rate == times
    assert result.healing.lr * head.rate == pytest.approx(0.05 * result.fit.lr)
