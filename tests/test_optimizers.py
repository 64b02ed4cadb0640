from __future__ import annotations

import copy

import pytest
import torch

from llm_streamline import optimizers
from llm_streamline.optimizers import Float32Muon, Pace, Several, default_rate, make_optimizer, optimizer_for
from llm_streamline.recipe import Recipe


def weights(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8,), (8, 12), (3, 4, 4), (6, 8)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def stepped(optimizer: torch.optim.Optimizer, own: list[torch.nn.Parameter], steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for weight in own:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


def test_matrices_get_orthogonal_steps_and_all_else_adamws():
    own, plain = weights(), weights()
    before = [weight.detach().clone() for weight in own]
    stepped(make_optimizer("muon", [Pace(1.0, own)], 0.01, 0.0), own, 1, 1)
    stepped(torch.optim.AdamW(plain, lr=0.01, weight_decay=0.0), plain, 1, 1)
    for weight, other, old in zip(own, plain, before, strict=True):
        if weight.ndim == 2:
            singular = torch.linalg.svdvals(weight.detach() - old)
            assert singular.max() < 1.8 * singular.min(), "a step of equal size in all directions"
            assert float((weight.detach() - old).square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.3), (
                "of the size of AdamW's"
            )
        else:
            torch.testing.assert_close(weight, other)


def test_a_rate_is_for_all_and_adamw_is_as_it_was():
    own = weights()
    optimizer = make_optimizer("muon", [Pace(1.0, own)], 0.01, 0.0)
    before = [weight.detach().clone() for weight in own]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    stepped(optimizer, own, 2, 1)
    assert all(torch.equal(weight, old) for weight, old in zip(own, before, strict=True))
    assert type(make_optimizer("adamw", [Pace(1.0, own)], 0.01, 0.0)) is torch.optim.AdamW
    assert type(make_optimizer("muon", [Pace(1.0, own[:1])], 0.01, 0.0)) is torch.optim.AdamW, "no matrix, no Muon"


@pytest.mark.parametrize(
    ("sequences", "changes", "wanted"),
    [
        (249, {}, "adamw"),
        (250, {}, "muon"),
        (499, {"batch": 2}, "adamw"),
        (1000, {"batch": 2, "accumulate": 2}, "muon"),
        (9, {"optimizer": "muon"}, "muon"),
        (9999, {"optimizer": "adamw"}, "adamw"),
        (9999, {"preset": "paper"}, "adamw"),
    ],
)
def test_many_steps_are_muons(sequences, changes, wanted):
    assert optimizer_for(Recipe(model="m", **changes), sequences) == wanted


def test_rates_fall_with_the_width_and_adapters_are_adamws():
    assert [default_rate("adamw", width) for width in (32, 256, 4096)] == [5e-3, 2e-3, 1.25e-4]
    assert [default_rate("muon", width) for width in (32, 256, 4096)] == [1e-2, 4e-3, 2.5e-4]
    recipe = Recipe(model="m", replace="none", heal="lora")
    assert optimizer_for(recipe.healing, 9999) == "adamw"
    assert optimizer_for(Recipe(model="m", replace="none", heal="all").healing, 9999) == "muon"


def test_its_state_can_be_kept_and_put_back_to_the_bit():
    whole, first, again = weights(), weights(), weights(5)
    stepped(make_optimizer("muon", [Pace(1.0, whole)], 0.01, 0.1), whole, 3, 1)
    one = make_optimizer("muon", [Pace(1.0, first)], 0.01, 0.1)
    stepped(one, first, 3, 1)
    state = one.state_dict()
    assert isinstance(one, Several) and sorted(state["state"]) == [0, 1, 2, 3]
    other = make_optimizer("muon", [Pace(1.0, again)], 0.01, 0.1)
    for weight, source in zip(again, first, strict=True):
        weight.data.copy_(source.data)
    other.load_state_dict({"state": copy.deepcopy(state["state"]), "param_groups": other.state_dict()["param_groups"]})
    for optimizer, own in ((one, first), (other, again)):
        for group in optimizer.param_groups:
            group["lr"] = 0.003
        stepped(optimizer, own, 2, 9)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[1], whole[1])


def test_muon_in_float32_takes_the_steps_of_torchs():
    own, theirs = ([weight for weight in weights() if weight.ndim == 2] for _ in range(2))
    arguments = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    one, other = Float32Muon(own, **arguments), torch.optim.Muon(theirs, **arguments)
    before = [weight.detach().clone() for weight in own]
    stepped(one, own, 3, 1)
    stepped(other, theirs, 3, 1)
    for weight, wanted, old in zip(own, theirs, before, strict=True):
        assert (weight - wanted).norm() < 0.02 * (wanted - old).norm(), "but for its rounding to bfloat16"
    assert all(one.state[weight].keys() == {"momentum_buffer"} for weight in own), (
        "so that either goes on from the other"
    )
    one.load_state_dict(other.state_dict())


@pytest.mark.parametrize(("fast", "kind"), [(True, torch.optim.Muon), (False, Float32Muon)])
def test_bfloat16_is_used_where_it_is_fast(fast, kind, monkeypatch):
    monkeypatch.setattr(optimizers, "multiplies_bfloat16", lambda device: fast)
    optimizer = make_optimizer("muon", [Pace(1.0, weights()[1:2])], 0.01, 0.0)
    assert type(optimizer.parts[0]) is kind
