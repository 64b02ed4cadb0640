"""The linear map in closed form: what it finds, that folding it changes nothing else, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_streamline import assemble, folding, objective, oracle, run, verdict
from llm_streamline.architectures import FAMILIES
from llm_streamline.assemble import Parts, build
from llm_streamline.errors import UserError, VerificationError
from llm_streamline.families import layers_of, output_weights
from llm_streamline.files import remove
from llm_streamline.folding import FoldedLayer, check_fold, check_foldable
from llm_streamline.forward import mlp_mapped, mlp_outputs, run_window, substituted
from llm_streamline.linear import Reading, best_map, solve_window, window_moments
from llm_streamline.moments import Moments
from llm_streamline.preview import estimate_only, plan_only
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import Fit, LayerPlan, LinearFit, Window
from llm_streamline.train import Trainer
from llm_streamline.workspace import Workspace
from tests import tiny
from tests.test_families import plan_for
from tests.test_train import stopping

WINDOW = Window(start=2, stop=4)
UNFOLDABLE = [
    name for name in tiny.NAMES if not FAMILIES[tiny.CONFIGS[name].model_type].down or name == "opt-post-norm"
]
FOLDABLE = [name for name in tiny.NAMES if name not in UNFOLDABLE]
FOLDED, FREE = Reading(True, "nmse", 4), Reading(False, "nmse", 4)
WIDTH = 32


def near_identity(seed: int = 0) -> torch.Tensor:
    noise = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.eye(WIDTH, dtype=torch.float64) + 0.3 * noise


def linear_plan(model, window: Window = WINDOW) -> LayerPlan:
    return plan_for(model, window).model_copy(update={"replace": "linear"})


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def unfolded(model, window: Window, mapping: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    with substituted(model, window), mlp_mapped(model, window.start - 1, mapping):
        return logits(model, ids)


# what the MLP adds


@pytest.mark.parametrize("name", FOLDABLE)
@pytest.mark.parametrize("layer", [0, 4])
def test_what_the_mlp_adds_is_what_the_state_loses_without_it(name, layer):
    model, ids = tiny.make_model(name), tiny.random_ids(2, 20)
    above = Window(start=layer + 1, stop=layer + 2)
    with mlp_outputs(model, layer) as added:
        entering = run_window(model, above, ids).entering
    with mlp_mapped(model, layer, torch.zeros(WIDTH, WIDTH)):
        without = run_window(model, above, ids).entering
    mlp = added[0].view_as(entering)
    torch.testing.assert_close(without + mlp, entering, rtol=0, atol=1e-4 * float(entering.abs().max()))
    assert float(mlp.abs().max()) > 1e-3 * float(entering.abs().max()), "an MLP that adds nothing tests nothing"


# folding


@pytest.mark.parametrize("name", FOLDABLE)
def test_the_folded_model_is_the_one_with_the_unfolded_map(name, tmp_path):
    model, ids = tiny.make_model(name), tiny.random_ids(2, 40)
    for start, stop in ((1, 3), (2, 5), (5, 6)):
        window, mapping = Window(start=start, stop=stop), near_identity(start)
        plan, folded = linear_plan(model, window), FoldedLayer(model, start - 1, mapping)
        assert check_fold(model, plan, folded, ids) <= 1e-5
        built, counts = build(Parts(model, plan, folded, None), torch.float32)
        assert (
            counts["replaced"] == len(output_weights(layers_of(model)[start - 1], model.config)) == len(folded.changed)
        )
        assert sum(counts.values()) == len(model.state_dict())
        built.save_pretrained(tmp_path)
        loaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(loading.values()), loading
        wanted, found = unfolded(model, window, mapping, ids), logits(loaded.eval(), ids)
        assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()
        with substituted(model, window):
            merely_cut = logits(model, ids)
        assert (found - merely_cut).abs().max() > 1e-2 * wanted.abs().max(), "a map that changes nothing tests nothing"


def wrongly_folded(name: str, monkeypatch, mistake) -> None:
    """Errors: VerificationError where the check sees it. `mistake` makes wrong output weights of the right ones."""
    model = tiny.make_model(name)
    right = output_weights(layers_of(model)[1], model.config)
    assert mistake(right) != right
    monkeypatch.setattr(folding, "output_weights", lambda layer, config: mistake(right))
    check_fold(model, linear_plan(model), FoldedLayer(model, 1, near_identity()), tiny.random_ids(2, 40))


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("llama", lambda right: {}),
        ("mixtral", lambda right: {}),
        *((name, lambda right: {k: v for k, v in right.items() if "bias" not in k}) for name in ("gpt2", "opt", "phi")),
        *(
            (f"{name}-square", lambda right: {k: 1 - v if "weight" in k else v for k, v in right.items()})
            for name in ("gpt2", "llama")
        ),
    ],
)
def test_a_map_that_is_folded_wrongly_is_refused(name, mistake, monkeypatch):
    monkeypatch.setitem(tiny.CONFIGS, "gpt2-square", tiny._config("gpt2", n_inner=WIDTH))
    monkeypatch.setitem(tiny.CONFIGS, "llama-square", tiny._llama(intermediate_size=WIDTH))
    with pytest.raises(VerificationError, match="map folded into layer 1 gives logits that differ"):
        wrongly_folded(name, monkeypatch, mistake)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_every_expert_has_to_be_folded(name, monkeypatch):
    model = tiny.make_model(name)
    folded = FoldedLayer(model, 1, near_identity())
    experts, source = (layer.mlp.experts.down_proj for layer in (folded[0], layers_of(model)[1]))
    experts[3] = source[3]
    with pytest.raises(VerificationError, match="logits that differ"):
        check_fold(model, linear_plan(model), folded, tiny.random_ids(2, 40))


# what is found


def planted(model, window: Window, mapping: torch.Tensor, monkeypatch) -> None:
    """Let the window add what `mapping` makes of what the MLP below it adds, whatever its layers compute."""
    layers, seen = layers_of(model), {}

    def note(_, __, output):
        seen["added"] = (output[0] if isinstance(output, tuple) else output).clone()

    def add(_, args, kwargs, output):
        entering = args[0] if args else kwargs["hidden_states"]
        return entering + (seen["added"].double() @ mapping).to(entering.dtype)

    layers[window.start - 1].mlp.register_forward_hook(note)
    for layer in window.layers()[:-1]:
        layers[layer].register_forward_hook(lambda _, args, kwargs, output: args[0], with_kwargs=True)
    layers[window.stop - 1].register_forward_hook(add, with_kwargs=True)


@pytest.mark.parametrize("loss", ["nmse", "mse"])
def test_a_planted_map_is_found_and_the_folded_model_is_the_dense_one(loss, monkeypatch):
    model, ids = tiny.make_model("llama").double(), tiny.random_ids(40, 32)
    planted(model, WINDOW, near_identity() - torch.eye(WIDTH, dtype=torch.float64), monkeypatch)
    mapping, fit = solve_window(model, WINDOW, ids[8:], ids[:8], Reading(True, loss, 4))
    torch.testing.assert_close(torch.eye(WIDTH) + mapping, near_identity(), rtol=0, atol=1e-3, check_dtype=False)
    assert fit.validation_unexplained < 1e-8 and fit.unexplained < 1e-8 and fit.tokens == 32 * 32
    with mlp_mapped(model, 1, torch.eye(WIDTH) + mapping), substituted(model, WINDOW):
        found = logits(model, ids[:2])
    torch.testing.assert_close(found, logits(model, ids[:2]), rtol=1e-3, atol=1e-3)


def test_the_free_map_is_the_least_squares_one_of_the_window():
    model, ids = tiny.make_model("llama"), tiny.random_ids(40, 32)
    passage = run_window(model, WINDOW, ids[8:])
    x, leaving = passage.entering.flatten(0, 1).double(), passage.leaving.flatten(0, 1).double()
    root = 1 / leaving.norm(dim=-1, keepdim=True)
    moments = window_moments(model, WINDOW, ids[8:], FREE)
    wanted = torch.linalg.lstsq(x * root, (leaving - x) * root).solution
    torch.testing.assert_close(moments.solve(ridge=1e-12), wanted, rtol=0, atol=1e-6)
    before = float(((leaving - x) * root).square().sum(dim=-1).mean())
    assert moments.yy / moments.tokens == pytest.approx(before, rel=1e-9), "the distillation loss of no map"


@pytest.mark.parametrize("form", [FOLDED, FREE])
def test_a_map_lowers_the_distillation_loss_that_the_fit_tells(form):
    model, ids = tiny.make_model("llama"), tiny.random_ids(60, 32)
    mapping, fit = solve_window(model, WINDOW, ids[20:], ids[:20], form)
    passage = run_window(model, WINDOW, ids[:20])
    with mlp_outputs(model, 1) as held:
        run_window(model, WINDOW, ids[:20])
    x = held[0] if form.folded else passage.entering
    left = passage.leaving - passage.entering - (x.double() @ mapping).float()
    loss = float((left.square().sum(-1) / passage.leaving.square().sum(-1)).mean())
    assert loss == pytest.approx(fit.validation_after, rel=1e-4) and loss < 0.95 * fit.validation_before


@pytest.mark.parametrize("folded", [True, False])
def test_angles_fall_with_every_pass_and_below_those_of_least_squares(folded, monkeypatch):
    model, ids = tiny.make_model("llama"), tiny.random_ids(60, 32)
    with mlp_outputs(model, 1) as held:
        passage = run_window(model, WINDOW, ids[20:])
    x = (held[0] if folded else passage.entering).double()

    def cosines(mapping) -> torch.Tensor:
        return torch.cosine_similarity(passage.entering.double() + x @ mapping, passage.leaving.double(), dim=-1)

    angles = []
    for turns in (0, 1, 2, 3):
        monkeypatch.setattr(objective, "TURNS", turns)
        mapping, fit = solve_window(model, WINDOW, ids[20:], ids[20:], Reading(folded, "cosine", 4))
        angles.append(float((1 - cosines(mapping).square()).mean()))
        assert fit.validation_after == pytest.approx(float((1 - cosines(mapping)).mean()), rel=1e-4)
        assert fit.validation_before == pytest.approx(float((1 - cosines(0 * mapping)).mean()), rel=1e-4)
    squares, _ = solve_window(model, WINDOW, ids[20:], ids[20:], Reading(folded, "nmse", 4))
    assert angles[0] > angles[1] > angles[2] > angles[3], "1 - cos^2, which every pass lowers"
    assert angles[3] < float((1 - cosines(squares).square()).mean())


def test_cosines_are_of_the_streams_tokens_where_a_family_flattens_them_before_its_mlp():
    model, ids = tiny.make_model("opt"), tiny.random_ids(60, 32)
    _, fit = solve_window(model, WINDOW, ids[:40], ids[40:], Reading(True, "cosine", 4))
    assert fit.validation_after < 0.98 * fit.validation_before
    assert "unexplained" not in verdict.solved(fit), "a share of what is not the states"


def streams(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))


def moments_of(x: torch.Tensor, y: torch.Tensor) -> Moments:
    found = Moments.of_widths(WIDTH, WIDTH)
    found.add(x, y)
    return found


@pytest.mark.parametrize("repeats", [1, 50])
@pytest.mark.parametrize("tokens", [1, 8, 31])
def test_where_the_tokens_span_little_the_model_stays_near_the_merely_cut_one(tokens, repeats):
    model = tiny.make_model("llama")
    few = tiny.random_ids(1, tokens).repeat(repeats, 1)
    held_out = tiny.random_ids(30, 32, seed=1)
    for form in (FOLDED, FREE):
        mapping, fit = solve_window(model, WINDOW, few, held_out, form)
        assert mapping.isfinite().all() and fit.validation_after <= fit.validation_before
        all_of_it = window_moments(model, WINDOW, few, form)
        _, vectors = torch.linalg.eigh(all_of_it.xx)
        unseen = vectors[:, : WIDTH - tokens].T
        assert (unseen @ mapping).norm() < 1e-6, "directions that no token had stay as they are"


def test_noise_that_no_map_explains_leaves_the_identity():
    mapping, ridge = best_map(moments_of(*streams(40)), moments_of(*streams(4000, seed=1)))
    assert ridge is None and not mapping.any()
    x, _ = streams(4000, seed=1)
    mapping, ridge = best_map(moments_of(*[streams(400)[0]] * 2), moments_of(x, x))
    assert ridge == 1e-6 and torch.allclose(mapping, torch.eye(WIDTH, dtype=torch.float64), atol=1e-5)


# what is refused


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_where_no_projection_decides_what_the_mlp_adds_is_refused(name):
    why = FAMILIES[tiny.CONFIGS[name].model_type].unfoldable
    with pytest.raises(UserError, match=rf"{why}; use --replace layer"):
        check_foldable(tiny.CONFIGS[name], [1])


def test_slices_and_the_first_layer_are_refused():
    sliced = tiny._config("bloom", slow_but_exact=True, pretraining_tp=2)
    with pytest.raises(UserError, match="slow_but_exact"):
        check_foldable(sliced, [1])
    check_foldable(tiny.CONFIGS["bloom"], [1])
    with pytest.raises(UserError, match="begins at layer 0"):
        check_foldable(tiny.CONFIGS["bloom"], range(4))


def recipe(model: Path | str, text: Path, **changes) -> Recipe:
    values = {"window": "2:5", "replace": "linear", "block": 32, "tokens": 6400, "calibration_tokens": 640}
    return Recipe(model=str(model), data=str(text), **{**values, "validation_tokens": 1280, **changes})


def quiet(folder: Path | None = None, **changes) -> Runtime:
    return Runtime(output=folder, quiet=True, tasks=("none",), compute="float32", **changes)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("gemma2", {}, "a norm follows"),
        ("llama", {"window": "0:3", "protect_first": 0}, "begins at layer 0"),
        ("llama", {"window": None, "remove": "2", "protect_first": 0}, "--protect-first 1"),
    ],
)
def test_refused_before_anything_is_measured_or_written(name, changes, told, tmp_path, text_file, monkeypatch):
    folder = tiny.make_folder(tmp_path / "model", name)
    monkeypatch.setattr(run, "measure", lambda work: pytest.fail("measured"))
    with pytest.raises(UserError, match=told):
        run.compress(recipe(folder, text_file, **changes), quiet(tmp_path / "out"))
    assert not [file for file in (tmp_path / "out").rglob("*") if "lock" not in file.name]


@pytest.mark.parametrize("changes", [{"init": "random"}, {"init": "inherited"}, {"epochs": 2}])
@pytest.mark.parametrize("replace", ["linear", "linear:free"])
def test_what_only_training_has_is_refused(replace, changes):
    with pytest.raises(UserError, match=f"(not trained|its closed form): leave out --{next(iter(changes))}"):
        Recipe(model="m", replace=replace, custom_code=True, **changes)


def test_the_free_map_needs_code_of_its_own_and_is_for_every_family(tmp_path, text_file):
    with pytest.raises(UserError, match="--custom-code"):
        Recipe(model="m", replace="linear:free")
    folder = tiny.make_folder(tmp_path / "model", "gemma2")
    plan = plan_only(recipe(folder, text_file, replace="linear:free", custom_code=True), quiet())
    assert plan.occupied == 1 and plan.folded is None and plan.net == 2


# a whole run


@pytest.fixture
def in_process(monkeypatch) -> None:
    monkeypatch.setattr(assemble, "verify", oracle.check)


def test_a_whole_run_in_stock_form(llama_folder, text_file, tmp_path, monkeypatch):
    result = run.compress(recipe(llama_folder, text_file), quiet(tmp_path / "out"))
    monkeypatch.setattr(assemble, "verify", oracle.check)
    none = run.compress(recipe(llama_folder, text_file, replace="none"), quiet(tmp_path / "none"))
    assert result.verification.passed and any("unfolded one in float32" in one for one in result.verification.limits)
    assert result.plan.parameters_after == none.plan.parameters_after and result.plan.net == 3
    assert result.fit.validation_after < result.fit.validation_before
    model, plain = (AutoModelForCausalLM.from_pretrained(one.model) for one in (result, none))
    shapes, plain_shapes = ({k: v.shape for k, v in one.state_dict().items()} for one in (model, plain))
    assert shapes == plain_shapes
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, plain.state_dict()[key])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    layer_map = json.loads((Path(result.model) / "layer-map.json").read_text())
    assert layer_map == {"layers": [0, 1, 5], "changed": [1]}
    told = f"into the MLP of layer {result.plan.folded}"
    for page in (Path(result.report), Path(result.model) / "README.md"):
        text = page.read_text(encoding="utf-8")
        assert told in text and "Layer 1, the one below the window" in text and "is left unexplained" in text
    counts = json.loads((Path(result.model) / "streamline.json").read_text())["tensors"]
    assert counts["replaced"] == 1 and counts["removed"] == 3 * 9


def test_a_run_that_was_stopped_is_continued_with_the_map_it_has(
    llama_folder, text_file, tmp_path, in_process, monkeypatch
):
    asked = recipe(llama_folder, text_file)
    first = run.compress(asked, quiet(tmp_path / "out"))
    weights = oracle.weight_hashes(Path(first.model))
    remove(tmp_path / "out" / "model")
    monkeypatch.setattr("llm_streamline.linear.solve_window", lambda *_: pytest.fail("solved again"))
    again = run.compress(asked, quiet(tmp_path / "out"))
    assert again == first and oracle.weight_hashes(Path(again.model)) == weights
    with pytest.raises(UserError, match="--replace changed"):
        run.compress(recipe(llama_folder, text_file, replace="none"), quiet(tmp_path / "out"))


@pytest.mark.parametrize("replace", ["linear:free", "linear:patch"])
def test_the_free_map_is_saved_with_the_code_that_computes_it(llama_folder, text_file, tmp_path, in_process, replace):
    asked = recipe(llama_folder, text_file, replace=replace, custom_code=True)
    result = run.compress(asked, quiet(tmp_path / "out"))
    assert result.verification.passed and result.fit.validation_after != result.fit.validation_before
    assert (result.fit.ridge == 0) == (replace == "linear:patch")
    model = AutoModelForCausalLM.from_pretrained(result.model, trust_remote_code=True)
    weight = layers_of(AutoModelForCausalLM.from_pretrained(llama_folder))[2].self_attn.q_proj.weight
    assert model.get_submodule("model.layers.2.network").weight.shape == (WIDTH, WIDTH) == weight.shape
    assert model.num_parameters() == result.plan.parameters_after
    source, ids = AutoModelForCausalLM.from_pretrained(llama_folder).eval(), tiny.random_ids(2, 24)
    matrix = model.get_submodule("model.layers.2.network").weight.T

    class Map(torch.nn.Module):
        def forward(self, hidden, *_, **__):
            return hidden + hidden @ matrix

    with substituted(source, Window(start=2, stop=5), [Map()]):
        torch.testing.assert_close(logits(model.eval(), ids), logits(source, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "granite-tied"])
def test_a_bfloat16_checkpoint_is_verified_with_its_rounding(name, text_file, tmp_path, in_process):
    folder = tiny.make_folder(tmp_path / "model", name, torch.bfloat16)
    result = run.compress(recipe(folder, text_file), quiet(tmp_path / "out"))
    assert result.verification.passed and result.verification.logits_error <= 1e-5
    assert any("rounded to bfloat16" in one for one in result.verification.limits)


@pytest.mark.parametrize(
    ("name", "how"),
    [("qwen3_moe", {}), ("llama", {"replace": "linear:free", "loss": "kl", "custom_code": True, "optimizer": "adamw"})],
)
def test_from_the_disk_the_same_weights_come_out(name, how, text_file, tmp_path, in_process, monkeypatch):
    folder, made = tiny.make_folder(tmp_path / "model", name), {}
    # layer 0 is folded, which is also run to see what layers return
    asked = recipe(folder, text_file, window="1:4", **how)
    for offloads in (False, True):
        monkeypatch.setattr(Workspace, "offloads", offloads)
        out = tmp_path / str(offloads)
        if offloads:
            found = Workspace(asked, quiet()).estimate
            monkeypatch.setattr(
                Workspace, "estimate", found.model_copy(update={"offloaded": True, "writes_offloaded": True})
            )
        made[offloads] = run.compress(asked, quiet(out))
    if not how:
        assert made[True].fit.ridge == made[False].fit.ridge
    states = [load_file(next(Path(one.model).glob("*.safetensors"))) for one in made.values()]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-5, atol=1e-6 if not how else 1e-5)


@pytest.mark.parametrize("loss", [None, "kl"])
def test_a_map_is_healed_with_the_rest(llama_folder, text_file, tmp_path, in_process, loss):
    asked = recipe(llama_folder, text_file, replace="linear:free", loss=loss, heal="all", custom_code=True)
    result = run.compress(asked, quiet(tmp_path / "out"))
    assert isinstance(result.fit, LinearFit if loss is None else Fit) and result.verification.passed
    assert result.fit.tokens + result.healing.tokens == 6400, "no text is seen by both"
    assert result.healing.validation[0].loss > result.healing.validation_best
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Healed (all)" in page and ("Solved for, then healed with the rest:" in page) == (loss is None)


def test_the_estimate_has_a_stage_for_it(llama_folder, text_file):
    found = {one.name: one for one in estimate_only(recipe(llama_folder, text_file), quiet()).stages}
    assert "training" not in found and found["closed form"].tokens == 6400 + 1280
    assert found["closed form"].seconds > 0 and found["closed form"].memory > found["closed form"].disk > 0
    free = recipe(llama_folder, text_file, replace="linear:free", custom_code=True)
    assert {one.name for one in estimate_only(free, quiet()).stages} == set(found)


def test_a_dry_run_says_which_layer_changes(llama_folder, text_file, tmp_path):
    plan = plan_only(recipe(llama_folder, text_file), quiet(tmp_path / "out"))
    assert "a map folded into layer 1, net 3" in str(plan) and not (tmp_path / "out").exists()
    assert plan.sources() == [0, 1, 5] and plan.rewritten() == [(Window(start=1, stop=5), 1)] and plan.replaced() == [1]


@pytest.mark.parametrize(
    ("replace", "loss"),
    [("linear", "kl"), ("linear", "nmse:0.5,mse:0.5"), ("linear", "lm")],
)
def test_what_it_cannot_be_solved_for_is_refused(replace, loss):
    with pytest.raises(
        UserError, match=rf"--loss {loss} is not what --replace {replace} can be solved for; give one of"
    ):
        Recipe(model="m", replace=replace, loss=loss, custom_code=True)


@pytest.mark.parametrize(("replace", "loss"), [("linear:free", "kl"), ("linear:patch", "nmse:0.5,kl:0.5")])
def test_a_map_is_trained_from_its_closed_form_by_what_it_cannot_be_solved_for(
    llama_folder, text_file, tmp_path, in_process, replace, loss
):
    asked = recipe(llama_folder, text_file, replace=replace, custom_code=True)
    still = asked.model_copy(update={"loss": loss, "lr": 1e-9, "min_lr": 0.0})
    solved, begun = (run.compress(one, quiet(tmp_path / one.loss_used)) for one in (asked.model_copy(), still))
    maps = [
        load_file(tmp_path / one.loss_used / "replacement/replacement.safetensors")["0.network.weight"]
        for one in (asked, still)
    ]
    assert isinstance(begun.fit, Fit) and begun.verification.passed and begun.plan.custom_code
    apart = torch.nn.functional.cosine_similarity(*(one.flatten() for one in maps), dim=0)
    assert apart > 0.6 and not torch.equal(*maps), "of the training part, and of the calibration part"
    learned = run.compress(still.model_copy(update={"lr": 1e-3}), quiet(tmp_path / "learned"))
    assert learned.fit.validation[0].loss == begun.fit.validation[0].loss
    assert learned.fit.validation[-1].loss < begun.fit.validation[-1].loss
    assert solved.fit.tokens == learned.fit.tokens == 6400


def test_a_map_whose_training_was_stopped_is_not_solved_for_again(
    llama_folder, text_file, tmp_path, in_process, monkeypatch
):
    asked = recipe(llama_folder, text_file, replace="linear:free", loss="kl", custom_code=True)
    whole = run.compress(asked, quiet(tmp_path / "whole"))
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(Trainer, "step", stopping(12))
        run.compress(asked, quiet(tmp_path / "cut", checkpoint_every=0.0001))
    monkeypatch.setattr("llm_streamline.training.solved_start", lambda *_: pytest.fail("solved again"))
    again = run.compress(asked, quiet(tmp_path / "cut", checkpoint_every=0.0001))
    assert oracle.weight_hashes(Path(again.model)) == oracle.weight_hashes(Path(whole.model))


def test_a_map_has_no_other_start():
    with pytest.raises(UserError, match="begins as its closed form: leave out --init random"):
        Recipe(model="m", replace="linear:free", loss="kl", init="random", custom_code=True)
