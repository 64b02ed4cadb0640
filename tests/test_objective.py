from __future__ import annotations

import math

import pytest
import torch

from llm_streamline.errors import UserError
from llm_streamline.losses import LOSSES, kl, next_token
from llm_streamline.objective import Part, parse_objective
from llm_streamline.recipe import Recipe

NMSE, MSE, KL, LM = Part("nmse"), Part("mse"), Part("kl"), Part("lm")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        *[(name, [name]) for name in ("nmse", "mse", "cosine", "kl", "lm", "kl:100", "kl:2")],
        ("mse:0.6,kl:0.4", ["mse", "kl"]),
        ("nmse:0.3,kl:100:0.7", ["nmse", "kl:100"]),
        ("nmse:.1,kl:.2,lm:.7", ["nmse", "kl", "lm"]),
        ("kl:5:0.5,kl:0.5", ["kl:5", "kl"]),
        *[(name, [name]) for name in ("kl+lm", "kl+0.3lm", "kl:100+lm", "kl:100+2lm")],
        ("nmse:0.3,kl:9+.5lm:0.7", ["nmse", "kl:9+0.5lm"]),
        ("kl+1lm:0.5,kl+1.5lm:0.5", ["kl+lm", "kl+1.5lm"]),
    ],
)
def test_what_is_written_is_what_is_meant(text, parts):
    recipe = Recipe(model="m", loss=text)
    assert recipe.loss == text and [str(part) for part in recipe.objective.parts] == parts
    assert str(recipe.objective.measure) == parts[-1]
    assert recipe.objective.above == any(part[:2] in ("kl", "lm") for part in parts)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nmsee", "'nmsee' is no loss; there are nmse, mse, cosine, kl, lm, kl:100 and kl+lm"),
        ("", "'' is no loss"),
        ("KL", "'KL' is no loss"),
        ("mse:100", "'mse:100' is no loss"),
        ("kl:-1", "'kl:-1' is no loss"),
        ("kl:1", "kl:1 compares fewer than two tokens"),
        ("kl:0", "kl:0 compares fewer than two tokens"),
        ("kl:0.5", "a share is for one of several losses"),
        ("mse,kl", "'mse' has no share between 0 and 1; write for example mse:0.5"),
        ("mse:0.5,kl:100", "'kl:100' has no share between 0 and 1; write for example kl:100:0.5"),
        ("mse:1,kl:0", "'mse:1' has no share between 0 and 1; write for example mse:0.5"),
        ("mse:60%,kl:40%", "'mse:60%' has no share between 0 and 1; write for example mse:0.5"),
        ("mse:0.0,kl:1.0", "'mse:0.0' has no share"),
        ("mse:0.5,", "'' has no share"),
        ("mse:0.6,kl:0.5", "the shares add up to 1.1; they have to add up to 1"),
        ("mse:0.6,kl:0.3", "the shares add up to 0.9"),
        ("mse:0.5,kl:1:0.5", "kl:1 compares fewer than two tokens"),
        ("mse:0.5, kl:0.5", "' kl' is no loss"),
        ("nmse+lm", "'nmse+lm' is no loss"),
        ("kl+", "'kl+' is no loss"),
        ("kl+-1lm", "'kl+-1lm' is no loss"),
        ("kl+0lm", "kl+0lm gives the text no weight; write kl"),
        ("kl:1+lm", "kl:1+lm compares fewer than two tokens"),
        ("kl+lm,nmse", "'kl+lm' has no share between 0 and 1; write for example kl+lm:0.5"),
    ],
)
def test_mistakes_are_one_sentence(text, words):
    with pytest.raises(UserError) as caught:
        Recipe(model="m", loss=text)
    assert words in str(caught.value) and "\n" not in str(caught.value) and "--loss was given" in str(caught.value)


def test_a_temperature_is_for_kl_alone():
    assert Recipe(model="m", loss="mse:0.5,kl:0.5", temperature=2).temperature == 2
    assert Recipe(model="m", loss="lm").temperature is None
    assert Recipe(model="m", loss="lm", heal="all", temperature=1.5).temperature == 1.5, "healing is by kl"
    with pytest.raises(UserError, match=r"--temperature 2 is for a loss of kl, and nothing trains by one here; leave"):
        Recipe(model="m", loss="mse:0.5,lm:0.5", temperature=2)
    with pytest.raises(UserError, match="--temperature was given 0"):
        Recipe(model="m", loss="kl", temperature=0)


def test_shares_are_of_the_tokens_and_exact():
    assert parse_objective("mse:0.6,kl:0.4").schedule([16] * 5) == [MSE] * 3 + [KL] * 2
    assert parse_objective("mse:0.1,kl:0.2,lm:0.7").schedule([7] * 10) == [MSE] + [KL] * 2 + [LM] * 7
    assert parse_objective("mse:0.5,kl:0.5").schedule([10, 10, 10, 2]) == [MSE] * 2 + [KL] * 2, "the last step is short"
    assert parse_objective("mse:0.999,kl:0.001").schedule([1] * 4) == [MSE] * 4, "which a run says before it begins"
    assert parse_objective("nmse").schedule([3] * 4) == [NMSE] * 4 and parse_objective("kl").schedule([]) == []


def test_steps_are_told_before_they_are_taken():
    told = parse_objective("mse:0.6,kl:5:0.39,lm:0.01").describe([16] * 5)
    losses = "mse in steps 1 to 3, kl:5 in steps 4 to 5, lm in no step, as its share is too small"
    assert told == f"the loss is {losses}; every validation is by lm"


def test_more_tokens_than_the_vocabulary_has_are_refused():
    parse_objective("nmse:0.5,kl:259:0.5").check(259)
    with pytest.raises(UserError, match=r"--loss kl:260 is over more tokens than the model's 259; give kl, or fewer"):
        parse_objective("nmse:0.5,kl:260:0.5").check(259)


def test_cosine_by_hand():
    target = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    prediction = torch.tensor([[[30.0, 40.0], [5.0, 0.0]]])
    assert LOSSES["cosine"](prediction, target).item() == pytest.approx((0 + 1) / 2)


def test_kl_by_hand():
    teacher = torch.tensor([[[0.5, 0.25, 0.25]]]).log() + 3  # logits are up to a constant
    student = torch.tensor([[[0.25, 0.25, 0.5]]]).log() - 1
    assert kl(student, teacher).item() == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert kl(teacher - 7, teacher).item() == pytest.approx(0, abs=1e-6)
    assert kl(student, teacher).shape == (1, 1)


def test_a_temperature_softens_and_keeps_the_scale():
    teacher, student = torch.tensor([[[math.log(4), 0.0]]]), torch.tensor([[[0.0, 0.0]]])
    p, q = (2 / 3, 1 / 3), (1 / 2, 1 / 2)  # softmax(log 4 / 2, 0) = (2, 1) / 3
    expected = 4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert kl(student, teacher, temperature=2).item() == pytest.approx(expected)


def test_the_likeliest_tokens_are_the_teachers_and_the_student_is_renormalised_over_them():
    teacher = torch.tensor([[[0.1, 0.6, 0.3]]]).log()
    student = torch.tensor([[[0.8, 0.05, 0.15]]]).log()
    p, q = (2 / 3, 1 / 3), (1 / 4, 3 / 4)  # of tokens 1 and 2
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert kl(student, teacher, top=2).item() == pytest.approx(expected)
    student[..., 0] += 9
    assert kl(student, teacher, top=2).item() == pytest.approx(expected), "the others do not count"
    assert kl(student, teacher, top=3).item() == pytest.approx(kl(student, teacher).item())


def test_next_token_by_hand_and_half_formats_are_computed_in_float32():
    student = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]).log()
    assert next_token(student, torch.tensor([[0, 2]])).tolist()[0] == pytest.approx([-math.log(0.5), -math.log(0.8)])
    both = next_token(torch.cat([student, student.flip(-1)]), torch.tensor([[0, 2], [0, 2]])).exp()
    torch.testing.assert_close(1 / both, torch.tensor([[0.5, 0.8], [0.25, 0.1]]))
    rough = student.bfloat16()
    assert next_token(rough, torch.tensor([[0, 2]])).dtype == kl(rough, rough).dtype == torch.float32
    assert kl(student.double(), student.double()).dtype == torch.float64
