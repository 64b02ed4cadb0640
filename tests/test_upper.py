from __future__ import annotations

import pytest
import torch

from llm_streamline import upper as upper_module
from llm_streamline.cache import Cached, StateCache
from llm_streamline.checkpoint import Source, load_model
from llm_streamline.families import layers_of
from llm_streamline.forward import run_window, substituted
from llm_streamline.losses import kl, next_token
from llm_streamline.objective import Part
from llm_streamline.offload import is_offloaded
from llm_streamline.passages import streamed
from llm_streamline.records import Window
from llm_streamline.replacement import ReplacementLayers, build_replacement
from llm_streamline.snapshot import Snapshot
from llm_streamline.text import shuffled
from llm_streamline.upper import Upper, chunk_positions
from tests import tiny
from tests.test_snapshot import Killed, curves, killed_after
from tests.test_train import WINDOW, same, trainer, weights

IDS = tiny.random_ids(3, 11)  # of which a chunk of 5 leaves one: nothing comes after it
PARTS = [Part("kl"), Part("kl", 5), Part("lm"), Part("kl", 5, 0.7), Part("kl", text=0.1)]
SOME = ["llama-tied", "gemma2", "opt", "gpt2", "qwen3_moe", "cohere2", "granite", "falcon-alibi"]


@pytest.fixture
def chunks(monkeypatch):
    """Few positions at a time: 5 of 11, and as many of 10."""
    monkeypatch.setattr(upper_module, "CHUNK_LOGITS", 5 * len(IDS) * tiny.VOCABULARY)


def model_of(name: str, dtype: torch.dtype) -> torch.nn.Module:
    return tiny.make_model(name, dtype).requires_grad_(False)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_logits_of_slices_through_the_layers_above_are_the_models_own(name):
    model = model_of(name, torch.float32)
    upper = Upper(model, WINDOW.stop, autocast=False)
    passage = run_window(model, WINDOW, IDS)
    (flow,) = upper._layerwise.enter([passage.ids])
    with torch.no_grad():
        state = upper.rise(passage.leaving, flow.calls)
        slices = [upper.logits(IDS[:, cut : cut + 5], state[:, cut : cut + 5]) for cut in (0, 5, 10)]
    torch.testing.assert_close(torch.cat(slices, dim=1), model(IDS, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def plainly(model, replacement: ReplacementLayers, part: Part, temperature: float) -> torch.Tensor:
    """The loss of the whole spliced model on all logits at once, by hooks."""
    teacher = model(IDS, use_cache=False).logits
    with substituted(model, WINDOW, replacement):
        student = model(IDS, use_cache=False).logits
    if part.kind == "lm":
        return next_token(student[:, :-1], IDS[:, 1:]).mean()
    text = next_token(student[:, :-1], IDS[:, 1:]).mean() if part.text else 0.0
    return kl(student, teacher, part.top, temperature).mean() + part.text * text


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("name", SOME)
def test_loss_and_gradients_are_those_of_the_whole_spliced_model(name, part, chunks):
    dtype, near = (torch.float32, 1e-4) if name == "qwen3_moe" else (torch.float64, 1e-5)  # whose experts need it
    model, found = model_of(name, dtype), []
    for chunked in (False, True):
        replacement = build_replacement(model, [WINDOW.start], "random", seed=0).to(dtype)
        if chunked:
            passage = run_window(model, WINDOW, IDS)
            upper = Upper(model, WINDOW.stop, autocast=False, temperature=2.0)
            loss = upper.loss(passage, replacement.run(passage.entering, passage.calls), part)
        else:
            loss = plainly(model, replacement, part, 2.0)
        (3 * loss).backward()
        found.append((loss.item(), [parameter.grad for parameter in replacement.trained()]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:  # some families' norms compute in float32 whatever they are given
            assert (one - other).norm() <= near * one.norm() + 1e-3 * near
    assert sum(gradient.norm() for gradient in found[0][1] if gradient is not None) > 1e-3
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_the_dense_model_says_is_no_loss(chunks):
    model = model_of("llama", torch.float32)
    passage = run_window(model, WINDOW, IDS)
    upper = Upper(model, WINDOW.stop, autocast=False)
    assert upper.loss(passage, passage.leaving, Part("kl")).item() == pytest.approx(0, abs=1e-6)
    own = model(IDS, labels=IDS, use_cache=False).loss.item()
    assert upper.loss(passage, passage.leaving, Part("lm")).item() == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_no_more_logits_are_made_at_once_than_a_chunk(part, chunks):
    model, seen = model_of("llama", torch.float32), []
    passage = run_window(model, WINDOW, IDS)
    model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.shape[:2].numel()))
    state = passage.leaving.clone().requires_grad_()
    Upper(model, WINDOW.stop, autocast=False).loss(passage, state, part).backward()
    seen = seen[1:] if seen[0] == len(IDS) else seen  # of the last position alone, when calls were captured
    assert max(seen) == 5 * len(IDS) and sum(seen) == len(IDS) * (10 if part.kind == "lm" else 2 * 11)


def test_one_position_at_least():
    assert chunk_positions(8, 128_000) == upper_module.CHUNK_LOGITS // (8 * 128_000)
    assert chunk_positions(10**6, 10**6) == 1


def test_a_model_that_would_get_gradients_is_refused():
    with pytest.raises(ValueError, match=r"call model\.requires_grad_"):
        Upper(tiny.make_model("llama"), WINDOW.stop, autocast=False)


@pytest.mark.parametrize("loss", ["kl", "kl:5", "lm", "cosine"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_training_lowers_it_and_touches_only_the_replacement(name, loss, chunks):
    found = trainer(name, init="random", lr=3e-3, loss=loss)
    before = {key: value.clone() for key, value in found.model.state_dict().items()}
    training = tiny.random_ids(1, 16).repeat(40, 1)  # which can be learned by heart
    fit = found.fit(training, training[:2])
    assert fit.validation_best < 0.9 * fit.validation_before and fit.loss == loss
    assert same(before, found.model.state_dict())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in found.model.parameters())


def test_a_window_that_ends_at_the_last_layer_has_only_norm_and_head_above():
    found = trainer(loss="kl")
    found.window = Window(start=3, stop=tiny.LAYERS)
    fit = found.fit(tiny.random_ids(20, 16), tiny.random_ids(2, 16, seed=1))
    assert fit.validation_best < fit.validation_before


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3_moe", "opt"])
def test_a_bfloat16_model_is_looked_through(name):
    run = trainer(name, init="random", lr=3e-3, autocast=True, loss="kl")
    run.model.to(torch.bfloat16)
    passage = next(run.passages([IDS]))
    run.loss(passage, Part("kl")).backward()
    assert run.upper.loss(passage, passage.leaving, Part("kl")).item() == 0, "both go the same way, to the bit"
    rough = torch.cat([p.grad.flatten() for p in run.replacement.trained() if p.grad is not None])
    exact = trainer(name, init="random", loss="kl")
    exact.loss(next(exact.passages([IDS])), Part("kl")).backward()
    fine = torch.cat([p.grad.flatten() for p in exact.replacement.trained() if p.grad is not None])
    assert torch.cosine_similarity(rough, fine, dim=0) > 0.95 and rough.dtype == torch.float32


TRAINING, VALIDATION = tiny.random_ids(30, 16), tiny.random_ids(2, 16, seed=1)
CURRICULUM = "mse:0.3,kl:5:0.3,lm:0.4"


def test_a_curriculum_switches_at_its_shares_and_is_measured_by_its_last_loss():
    run, trained, measured = trainer(loss=CURRICULUM), [], []
    real, step, validate = run.loss, run.step, run.validate
    run.loss = lambda passage, part: (measured.append(str(part)), real(passage, part))[1]  # type: ignore[method-assign]
    run.step = lambda *args: (trained.append(str(args[-1])), step(*args), measured.clear())[1]  # type: ignore
    checked: list[list[str]] = []
    run.validate = lambda ids: (validate(ids), checked.append(measured.copy()), measured.clear())[0]  # type: ignore
    fit = run.fit(TRAINING, VALIDATION)
    assert trained == ["mse"] * 5 + ["kl:5"] * 4 + ["lm"] * 6, "15 steps; the 5th begins before 0.3 of the tokens"
    assert checked == [["lm"]] * 6
    lasts = [point.step for point in fit.curve]
    assert {5, 9} <= set(lasts) and fit.loss == CURRICULUM
    alone = trainer(loss="lm")
    assert fit.validation_before == alone.validate(VALIDATION)


def test_no_point_of_the_curve_mixes_two_losses(monkeypatch):
    from llm_streamline import history

    monkeypatch.setattr(history, "CURVE_POINTS", 2)
    fit = trainer(loss=CURRICULUM).fit(TRAINING, VALIDATION)
    assert [point.step for point in fit.curve] == [5, 7, 9, 14, 15]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_training_killed_around_its_switches_goes_on_to_the_same_bits(name, tmp_path, monkeypatch):
    from llm_streamline import history

    monkeypatch.setattr(history, "CURVE_POINTS", 4)
    undisturbed = trainer(name, init="random", loss=CURRICULUM)
    whole = undisturbed.fit(TRAINING, VALIDATION)
    for steps in (4, 1, 3, 2, 100):
        run = trainer(name, init="random", loss=CURRICULUM)
        run.snapshot = Snapshot(tmp_path / "s", 0.0)
        killed_after(run, steps)
        try:
            fit = run.fit(TRAINING, VALIDATION)
        except Killed:
            torch.rand(5)
    assert same(weights(undisturbed), weights(run)) and curves(fit) == curves(whole)


@pytest.mark.parametrize("loss", ["kl", "lm"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2"])
def test_layers_on_the_disk_give_the_same_bits(name, loss, tmp_path, chunks):
    folder, found = tiny.make_folder(tmp_path / "model", name), []
    for place in (None, tmp_path / "rewritten"):
        run = trainer(name, loss=loss)
        run.model = load_model(Source(str(folder)), torch.float32, offload=place)
        assert is_offloaded(run.model) == (place is not None)
        fit = run.fit(TRAINING[:6], VALIDATION)
        found.append((weights(run), [point.loss for point in fit.curve], fit.validation))
        assert is_offloaded(run.model) == (place is not None), "weights were let go of"
    assert same(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


def test_layers_on_the_disk_are_let_go_of_and_read_again_on_the_way_back(tmp_path, monkeypatch):
    run, read = trainer(loss="kl"), []
    folder = tiny.make_folder(tmp_path / "model", "llama")
    run.model = load_model(Source(str(folder)), torch.float32, offload=tmp_path / "rewritten")
    layers = list(layers_of(run.model))
    real = upper_module.onloaded
    monkeypatch.setattr(upper_module, "onloaded", lambda layer: (read.append(layers.index(layer)), real(layer))[1])
    loss = run.loss(next(run.passages([IDS])), Part("kl"))
    assert read == [4, 5, 4, 5], "the student's, then the teacher's"
    loss.backward()
    assert read == [4, 5, 4, 5, 5, 4]


def test_states_from_the_cache_give_the_same_bits(tmp_path):
    blocks = tiny.random_ids(6, 16)
    epochs = torch.cat([shuffled(blocks, seed) for seed in range(2)])
    plain, found = (trainer(loss="nmse:0.5,kl:0.5", batch=1) for _ in range(2))
    plain.fit(epochs, blocks[:2])
    cache = StateCache(tmp_path / "cache", "me", blocks, found.model.config.hidden_size, torch.float32)
    found.source = Cached(found.model, WINDOW, streamed(found.model, WINDOW, False), cache)
    found.fit(epochs, blocks[:2])
    assert same(weights(plain), weights(found))
