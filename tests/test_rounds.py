"""Rounds: the next window is chosen, and all are trained again, on the model with what was trained in place."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_streamline import assemble as assemble_module
from llm_streamline import oracle, preview, run, selection, starts, training
from llm_streamline.errors import UserError
from llm_streamline.estimate import predict
from llm_streamline.forward import shortened
from llm_streamline.records import LayerPlan, Manifest
from llm_streamline.scoring.perplexity import next_token_loss
from llm_streamline.sizes import sizes_of
from llm_streamline.train import Trainer
from llm_streamline.training import load_replacement
from llm_streamline.workspace import RunFolder, Workspace
from tests import tiny
from tests.test_run import equal, quiet, recipe, weights
from tests.test_train import stopping

__all__ = ["recipe"]  # a fixture
WAY = {"remove": "2", "windows": 2, "rounds": 2, "protect_last": 0, "tokens": 3000, "select": "loss", "lr": 0.01}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(assemble_module, "verify", oracle.check)


def test_the_second_round_goes_on_from_the_first(recipe, tmp_path, monkeypatch):
    way, ranked, trained = recipe(**{**WAY, "protect_first": 0, "select": "kl", "init": "inherited"}), [], []
    fit = Trainer.fit

    def noting(real):
        def noted(model, blocks, *rest):
            loss, found = next_token_loss(model, blocks, 4, "", quiet=True).nats, real(model, blocks, *rest)
            ranked.append((loss, found[1] if isinstance(found, tuple) else found))
            return found

        return noted

    def begun(self, blocks, validation):
        trained.append(({key: value.clone() for key, value in self.replacement.state_dict().items()}, blocks))
        return fit(self, blocks, validation)

    for stage in ("survey", "rank"):  # of the dense model, and of the one that the first round has made
        monkeypatch.setattr(selection, stage, noting(getattr(selection, stage)))
    monkeypatch.setattr(Trainer, "fit", begun)
    result = run.compress(way, quiet(tmp_path))
    assert result.verification.passed and len(result.plan.windows) == 2 and len(result.earlier) == 1
    before = LayerPlan.read(tmp_path / "rounds" / "plan-1.json")
    assert before.windows == [result.plan.window] and "replaced, " in result.plan.why and before.net == 1

    work = Workspace(way, quiet(tmp_path))
    kept = load_replacement(work, work.model, before, RunFolder(tmp_path, way), 1)
    with shortened(work.model, before, list(kept)):
        loss = next_token_loss(work.model, work.parts.calibration, 4, "", quiet=True).nats
    dense = next_token_loss(work.model, work.parts.calibration, 4, "", quiet=True).nats
    assert [one[0] for one in ranked] == pytest.approx([dense, loss]) and dense != loss

    (_, first), (start, second) = trained
    place = result.plan.replaced().index(before.replaced()[0])
    new = sorted({name.partition(".")[0] for name in start}, key=int)[place]
    source = load_file(f"{way.model}/model.safetensors")
    name = "self_attn.q_proj.weight"
    assert torch.equal(start[f"{new}.{name}"], kept.state_dict()[f"0.{name}"])
    other = next(number for number in {key.partition(".")[0] for key in start} if number != new)
    inherited = f"model.layers.{result.plan.replaced()[1 - place]}.{name}"
    assert torch.equal(start[f"{other}.{name}"], source[inherited])
    assert len(first) - len(second) in (0, 1) and not torch.equal(first[: len(second)], second)
    assert result.earlier[0].tokens + result.fit.tokens <= 3000
    assert RunFolder.open(tmp_path, way, fresh=True)  # nothing lies there that no run has made
    manifest, page = Manifest.read(tmp_path / "model" / oracle.MANIFEST), (tmp_path / "report.html").read_text()
    assert manifest.earlier == result.earlier and "round 1 of 2" in page and "round 2 of 2" in page


def test_only_what_is_new_looks_for_a_start(recipe, tmp_path, monkeypatch):
    looked, real = [], starts.best_start
    monkeypatch.setattr(starts, "best_start", lambda work, window: looked.append(window) or real(work, window))
    plan = run.compress(recipe(**WAY), quiet(tmp_path)).plan
    assert sorted(map(str, looked)) == sorted(map(str, plan.windows)) and len(plan.starts) == 2


def test_a_run_stopped_in_either_round_goes_on_to_the_same_bits(recipe, tmp_path, monkeypatch):
    whole, cut, way = tmp_path / "whole", tmp_path / "cut", recipe(**{**WAY, "select": "cosine"})
    run.compress(way, quiet(whole))
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stopping(5, 20))
        for done in (False, True):
            with pytest.raises(KeyboardInterrupt):
                run.compress(way, quiet(cut, checkpoint_every=0.0001))
            assert (cut / "rounds" / "replacement-1").exists() == done
    run.compress(way, quiet(cut, checkpoint_every=0.0001))
    assert equal(weights(whole), weights(cut)) and not (cut / training.SNAPSHOT).exists()


def test_what_is_trained_is_chosen_by_in_the_number_format_of_the_model(recipe, tmp_path):
    way = recipe(**{**WAY, "protect_first": 0, "tokens": 1000})
    assert run.compress(way, quiet(tmp_path, compute="bfloat16")).verification.passed


def test_a_dry_run_says_that_there_is_more(recipe, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(preview, "say", lambda text, quiet: said.append(text))
    plan = preview.plan_only(recipe(**WAY), quiet(tmp_path))
    assert len(plan.windows) == 1 and "round 1 of 2" in said[0]


def test_the_estimate_counts_the_rounds(recipe, tmp_path):
    def stage(rounds):
        sizes = sizes_of(Workspace(recipe(**{**WAY, "rounds": rounds}), quiet(tmp_path)))
        return sizes, next(each for each in predict(sizes, False, False) if each.name == "training")

    (sizes, one), (_, two) = stage(1), stage(2)
    assert two.tokens - one.tokens == 6 * 7 * sizes.block, "six checks of the 7 sequences in 1,000 tokens"
    assert two.disk > one.disk


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rounds": 3}, "--rounds 3 choose at least one window each, and --windows is 2"),
        ({"replace": "none"}, "--rounds 2 with --replace none has nothing to train"),
        (
            {"remove": None, "windows": 1, "select": None, "window": "1:3,4:6"},
            "--rounds 2 chooses windows one after the other, and --window names them",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_refused(values, sentence, recipe):
    with pytest.raises(UserError, match=sentence):
        recipe(**{**WAY, **values})


def test_a_round_without_text_is_refused(recipe, tmp_path):
    work = Workspace(recipe(**{**WAY, "tokens": 128}), quiet(tmp_path))
    with pytest.raises(UserError, match="--rounds 2 of 1 sequences leaves one without any"):
        training.lesson(work, 1)


def test_a_run_stopped_in_a_middle_round_goes_on_within_it(recipe, tmp_path, monkeypatch):
    three = {"remove": "3", "windows": 3, "rounds": 3, "protect_first": 0, "select": "cosine", "init": "inherited"}
    deep = copy.deepcopy(tiny.CONFIGS["llama"])
    deep.num_hidden_layers = 8
    AutoModelForCausalLM.from_config(deep).save_pretrained(tmp_path / "deep")
    tiny.make_tokenizer().save_pretrained(tmp_path / "deep")
    way = recipe(**{**WAY, **three, "model": str(tmp_path / "deep")})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    steps, real = [], Trainer.step

    def counted(self, *given):
        steps.append(self.snapshot.path.exists())
        return real(self, *given)

    monkeypatch.setattr(Trainer, "step", counted)
    run.compress(way, quiet(whole))
    every, each = len(steps), len(steps) // 3
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stopping(each + 8))
        with pytest.raises(KeyboardInterrupt):
            run.compress(way, quiet(cut, checkpoint_every=0.0001))
    steps.clear()
    run.compress(way, quiet(cut, checkpoint_every=0.0001))
    assert steps[0] and every - each - 9 <= len(steps) <= every - each - 6, "a snapshot is a step old"
    assert equal(weights(whole), weights(cut)) and not [*cut.rglob(f"*{training.SNAPSHOT}")]
