from __future__ import annotations

import dataclasses

import pytest
import torch

from llm_streamline.errors import UserError
from llm_streamline.history import checked
from llm_streamline.losses import LOSSES
from llm_streamline.memory import default_batch
from llm_streamline.objective import Part
from llm_streamline.recipe import Recipe
from llm_streamline.records import Window
from llm_streamline.replacement import build_replacement
from llm_streamline.train import Settings, Trainer, learning_rate
from tests import tiny

WINDOW = Window(start=1, stop=4)
SETTINGS = Settings(
    loss="nmse", batch=2, accumulate=1, lr=1e-2, min_lr=1e-3, weight_decay=1e-3, warmup=0.1, clip=5.0, autocast=False
)


def trainer(name: str = "llama", occupied: int = 1, init: str = "inherited", **changes) -> Trainer:
    model = tiny.make_model(name).requires_grad_(False)
    places = range(WINDOW.start, WINDOW.start + occupied)
    replacement = build_replacement(model, places, init, seed=0)
    return Trainer(model, WINDOW, replacement, dataclasses.replace(SETTINGS, **changes), quiet=True)


def stopping(*numbers: int, counted=lambda run: True):
    """`Trainer.step`, but that the run is interrupted in these of the counted steps."""
    real, steps = Trainer.step, []

    def step(self, *given):
        if counted(self):
            steps.append(True)
            if len(steps) in numbers:
                raise KeyboardInterrupt
        return real(self, *given)

    return step


def weights(found: Trainer) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in found.replacement.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items())


SLOW = ["olmo_hybrid", "lfm3"]  # learn less from so few steps
TWO = ["llama", "opt", "gemma2", "qwen3_moe"]  # of which two layers are trained, too


@pytest.mark.parametrize(("name", "occupied"), [*((name, 1) for name in tiny.NAMES), *((name, 2) for name in TWO)])
def test_training_lowers_the_loss_and_touches_only_the_replacement(name, occupied):
    found = trainer(name, occupied, init="random", lr=3e-3)
    before = {key: value.clone() for key, value in found.model.state_dict().items()}
    fit = found.fit(tiny.random_ids(40, 32), tiny.random_ids(4, 32, seed=1))
    assert fit.validation_best < (0.95 if name in SLOW else 0.9) * fit.validation_before
    assert found.validate(tiny.random_ids(4, 32, seed=1)) == pytest.approx(fit.validation_best, rel=1e-5)
    assert same(before, found.model.state_dict())
    assert all(parameter.grad is None for parameter in found.model.parameters())


@pytest.mark.parametrize("accumulate", [1, 3, 16])
@pytest.mark.parametrize("blocks", [17, 32])
def test_the_learning_rate_ends_at_min_lr_whatever_the_accumulation(accumulate, blocks):
    found = trainer(accumulate=accumulate, batch=1)
    made, real = [], found.optimizer
    found.optimizer = lambda: (made.append(real()), made[0])[1]  # type: ignore[method-assign]
    fit = found.fit(tiny.random_ids(blocks, 16), tiny.random_ids(2, 16))
    assert fit.last_lr == fit.min_lr == 1e-3
    assert made[0].param_groups[0]["lr"] == 1e-3, "what the optimizer last used, not what was computed"
    assert fit.steps == -(-blocks // accumulate)
    assert fit.tokens == blocks * 16


def test_the_schedule_rises_then_falls():
    settings = dataclasses.replace(SETTINGS, warmup=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[0] > 0 and max(rates) == pytest.approx(settings.lr) and rates[-1] == settings.min_lr
    assert rates[55] == pytest.approx((settings.lr + settings.min_lr) / 2, rel=0.05)
    assert learning_rate(0, 1, settings) == settings.min_lr


def test_accumulated_micro_batches_are_one_big_batch():
    ids = tiny.random_ids(12, 16)
    found = []
    for batch, accumulate in ((4, 1), (1, 4)):
        run = trainer(batch=batch, accumulate=accumulate)
        run.fit(ids, ids[:2])
        found.append(weights(run))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-3, atol=1e-4)


def test_gradients_are_clipped_to_the_asked_norm():
    run = trainer(clip=1e-3)
    norms = []

    class Optimizer:
        def __init__(self):
            self.param_groups = [{}]

        def step(self):
            norms.append(torch.stack([p.grad.norm() for p in run.replacement.parameters()]).norm().item())

        def zero_grad(self):
            pass

    run.step(Optimizer(), run.passages([tiny.random_ids(2, 16)]), 2, 1e-3, Part("nmse"))
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", tiny.one_of_each_type())
def test_a_bfloat16_model_trains_a_float32_replacement(name):
    run = trainer(name, init="random", lr=3e-3, autocast=True)
    run.model.to(torch.bfloat16)
    fit = run.fit(tiny.random_ids(40, 32), tiny.random_ids(4, 32, seed=1))
    assert fit.validation_best < 0.9 * fit.validation_before
    assert {parameter.dtype for parameter in run.replacement.parameters()} == {torch.float32}


def test_twice_is_the_same_to_the_bit():
    found = []
    for _ in range(2):
        run = trainer(init="random")
        run.fit(tiny.random_ids(12, 16), tiny.random_ids(2, 16, seed=1))
        found.append(weights(run))
        torch.rand(3)  # the global random state plays no part
    assert same(*found)


def test_when_nothing_improves_the_start_is_kept_and_said(capsys):
    run = trainer(lr=5.0, min_lr=5.0, clip=100.0)
    run.quiet = False
    start = weights(run)
    fit = run.fit(tiny.random_ids(12, 16), tiny.random_ids(2, 16, seed=1))
    assert fit.best_step == 0 and fit.validation_best == fit.validation_before
    assert same(start, run.replacement.state_dict())
    assert "did not lower the validation loss" in capsys.readouterr().err


def test_the_best_weights_are_kept_not_the_last():
    run = trainer()
    losses = iter([3.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    kept: list[dict[str, torch.Tensor]] = []
    run.validate = lambda _: (kept.append(weights(run)), next(losses))[1]  # type: ignore[method-assign]
    fit = run.fit(tiny.random_ids(10, 16), tiny.random_ids(2, 16))
    assert fit.validation_best == 1.0 and fit.best_step == 2
    assert same(kept[2], run.replacement.state_dict()) and not same(kept[-1], kept[2])


def test_a_diverging_loss_is_refused():
    run = trainer(lr=float("1e30"), clip=1e30)
    with pytest.raises(UserError, match=r"training loss is .* with a smaller --lr"):
        run.fit(tiny.random_ids(12, 16), tiny.random_ids(2, 16))


def test_random_layers_are_fresh_and_seeded():
    model = tiny.make_model("llama")
    one, again = (build_replacement(model, [2], "random", seed=3).state_dict() for _ in range(2))
    other, inherited = (build_replacement(model, [2], kind, seed=4).state_dict() for kind in ("random", "inherited"))
    assert same(one, again) and not same(one, other)
    for key in one:
        assert not torch.equal(one[key], inherited[key]), key
    assert one["0.mlp.up_proj.weight"].std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert torch.equal(one["0.input_layernorm.weight"], torch.ones(32))


def test_losses_by_hand():
    target = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    prediction = torch.tensor([[[3.0, 3.0], [1.0, 1.0]]])
    assert LOSSES["mse"](prediction, target).item() == pytest.approx(2 / 4)
    assert LOSSES["nmse"](prediction, target).item() == pytest.approx((1 / 25 + 1) / 2)


def test_open_settings_follow_the_text_and_the_width():
    recipe = Recipe(model="m")
    blocks = torch.zeros(4000, 256, dtype=torch.int32)
    settings = Settings.resolve(recipe, blocks, (32, 4096), 2**36, autocast=False)
    assert settings.lr == pytest.approx(2.5e-4) and settings.min_lr == pytest.approx(2.5e-5)
    assert settings.optimizer == "muon"
    few = Settings.resolve(recipe, blocks[:100], (32, 4096), 2**36, autocast=False)
    assert few.optimizer == "adamw" and few.lr == pytest.approx(1.25e-4)
    assert default_batch((4000, 256), 1, (2, 64), 2**36) == 4
    assert default_batch((100, 256), 1, (2, 64), 2**36) == 1
    assert default_batch((10**7, 2048), 1, (2, 64), 2**36) == 8
    assert default_batch((4000, 256), 4, (2, 64), 2**36) == 1
    assert default_batch((4000, 256), 1, (2, 4096), 2**33) == 4


@pytest.mark.parametrize(("training", "found"), [(13, 16), (390, 32), (1953, 129), (10**6, 129)])
def test_checks_read_no_more_than_half_of_what_training_does(training, found):
    assert checked(training, 129) == found and checked(training, 5) == 5


def test_only_what_is_asked_for_is_judged():
    run, seen = trainer(), []
    run.validate = lambda blocks: seen.append(len(blocks)) or 1.0
    run.fit(tiny.random_ids(4, 16), tiny.random_ids(40, 16))
    assert set(seen) == {16}
