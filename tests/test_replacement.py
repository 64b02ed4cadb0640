"""What can stand in for a window: how each begins, what of it is trained, and that it loads and generates later."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_streamline import assemble, oracle
from llm_streamline.errors import UserError
from llm_streamline.families import family_of, layers_of
from llm_streamline.networks import FeedForward, GatedFeedForward, NetworkLayer
from llm_streamline.preview import plan_only
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.replacement import build_replacement
from llm_streamline.run import compress
from tests import tiny

FAMILIES = ["llama", "opt", "gemma2", "gpt_neox", "qwen3_moe"] if tiny.MATRIX else ["gemma2", "qwen3_moe"]
NETWORKS = ("ffn", "swiglu", "ffn:residual", "swiglu:residual")
HIDDEN = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


def network(replace: str, name: str = "llama", init: str = "random", seed: int = 0) -> NetworkLayer:
    return build_replacement(tiny.make_model(name), [2], init, seed, replace)[0]


def test_the_papers_networks_are_as_the_paper_has_them():
    ffn, swiglu = network("ffn"), network("swiglu")
    up, down = ffn.network.fc1, ffn.network.fc2
    expected = torch.relu(HIDDEN @ up.weight.T + up.bias) @ down.weight.T + down.bias
    torch.testing.assert_close(ffn(HIDDEN), expected)
    assert isinstance(ffn.network, FeedForward) and up.weight.shape == (128, 32)
    gate, up, down = (getattr(swiglu.network, f"{name}_proj").weight for name in ("gate", "up", "down"))
    inner = HIDDEN @ gate.T
    torch.testing.assert_close(swiglu(HIDDEN), (inner * torch.sigmoid(inner) * (HIDDEN @ up.T)) @ down.T)
    assert isinstance(swiglu.network, GatedFeedForward) and gate.shape == (64, 32), "as wide as the model's own MLP"


@pytest.mark.parametrize("replace", ["ffn:residual", "swiglu:residual"])
def test_the_residual_form_starts_as_the_identity_and_normalises(replace):
    layer = network(replace)
    assert torch.equal(layer(HIDDEN), HIDDEN)
    torch.nn.init.normal_(list(layer.network.children())[-1].weight)
    torch.testing.assert_close(layer(HIDDEN * 9) - HIDDEN * 9, layer(HIDDEN) - HIDDEN, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("replace", NETWORKS)
def test_random_networks_follow_their_seed_and_leave_the_callers_state(replace):
    model = tiny.make_model("llama")
    state = torch.get_rng_state()
    one, again, other = (build_replacement(model, [2], "random", seed, replace).state_dict() for seed in (3, 3, 4))
    key = next(key for key in one if one[key].dim() == 2)
    assert torch.equal(one[key], again[key]) and not torch.equal(one[key], other[key])
    assert torch.equal(state, torch.get_rng_state())


def test_swiglu_inherits_the_first_pruned_layers_mlp():
    model = tiny.make_model("llama")
    layer = build_replacement(model, [2], "inherited", 0, "swiglu")[0]
    for key, value in layers_of(model)[2].mlp.state_dict().items():
        assert torch.equal(layer.network.state_dict()[key], value)


def test_the_residual_form_inherits_the_norm_too_and_so_is_the_mlp_at_first():
    model = tiny.make_model("llama")
    layer, source = build_replacement(model, [2], "inherited", 0, "swiglu:residual")[0], layers_of(model)[2]
    with torch.no_grad():
        expected = HIDDEN + source.mlp(source.post_attention_layernorm(HIDDEN))
        torch.testing.assert_close(layer(HIDDEN), expected)


def test_a_refusal_is_judged_where_the_window_begins(folder, tmp_path):
    # layers 0 and 4 have an MLP, the others experts
    model, text = folder("qwen3_moe"), tiny.write_jsonl(tmp_path / "text.jsonl", tiny.make_documents(200))
    settings = {"replace": "swiglu", "init": "inherited"}
    assert plan_only(recipe(model, text, window="4:6", protect_last=0, **settings), Runtime(quiet=True)).custom_code
    with pytest.raises(UserError, match="cannot inherit"):
        plan_only(recipe(model, text, window="2:4", **settings), Runtime(quiet=True))


def test_ffn_inherits_where_the_model_has_the_same_network():
    model = tiny.make_model("opt-wide")
    layer = build_replacement(model, [2], "inherited", 0, "ffn")[0]
    assert torch.equal(layer.network.fc1.weight, layers_of(model)[2].fc1.weight)


@pytest.mark.parametrize(
    ("replace", "name"),
    [("ffn", "llama"), ("swiglu", "opt"), ("ffn:residual", "opt-wide"), ("swiglu", "llama-tied"), ("swiglu", "gemma2")],
)
def test_what_has_nothing_to_inherit_is_refused(replace, name):
    with pytest.raises(UserError, match=r"cannot inherit.*--init random"):
        network(replace, name, "inherited")


WITH_MLP = [name for name in tiny.NAMES if family_of(tiny.CONFIGS[name]).mlp and "post-norm" not in name]
INHERITED = [(name, "inherited") for name in WITH_MLP]
RANDOM = [(name, "random") for name in tiny.one_of_each_type() if "post-norm" not in name]


@pytest.mark.parametrize("replace", ["ffn", "swiglu:residual", "linear:free"])
@pytest.mark.parametrize("name", ["mamba", "lfm2", "falcon_h1"])
def test_a_network_among_layers_that_recur_is_refused(name, replace):
    with pytest.raises(
        UserError, match=f"the cache of a model whose layers recur cannot hold .'{name}'.; use --replace"
    ):
        build_replacement(tiny.make_model(name), [2], "random", 0, replace)


def test_an_mlp_of_layers_without_one_is_refused():
    with pytest.raises(UserError, match=r"--replace mlp needs layers with an MLP .* this 'mamba'; use --replace layer"):
        build_replacement(tiny.make_model("mamba"), [2], "inherited", 0, "mlp")


@pytest.mark.parametrize(("name", "init"), INHERITED + RANDOM)
def test_an_mlp_has_silent_attention_and_trains_only_what_still_acts(name, init):
    model = tiny.make_model(name)
    layer = build_replacement(model, [2], init, 0, "mlp")[0]
    grads = {}
    handle = layers_of(model)[2].register_forward_hook(
        lambda module, args, kwargs, output: grads.update(call=(args, kwargs)), with_kwargs=True
    )
    model(tiny.random_ids(1, 12), use_cache=False)
    handle.remove()
    args, kwargs = grads["call"]
    hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
    hidden = hidden.detach()

    def run(state):
        output = layer(state, *rest, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    other = hidden.clone()
    other[:, :6] += torch.randn_like(other[:, :6])
    torch.testing.assert_close(run(hidden)[:, 6:], run(other)[:, 6:])
    run(hidden).square().sum().backward()
    acts = {key for key, value in layer.named_parameters() if value.grad is not None and bool(value.grad.any())}
    trained = {key for key, value in layer.named_parameters() if value.requires_grad}
    idle = ("norm", "ln_", "router", "bias")  # norms of other options, and routers that only choose
    assert acts <= trained and all(any(one in key for one in idle) for key in trained - acts)
    source = layers_of(model)[2].state_dict()
    inherited = [key for key, parameter in layer.named_parameters() if parameter.requires_grad]
    drawn = [key for key in inherited if init == "inherited" or source[key].unique().numel() > 1]  # not a constant
    same = [torch.equal(layer.state_dict()[key], source[key]) for key in drawn]
    assert inherited and (all(same) if init == "inherited" else not any(same))


def test_an_mlp_is_refused_where_no_layer_can_be_the_identity():
    with pytest.raises(UserError, match="normalises the sum"):
        network("mlp", "opt-post-norm", "inherited")


@pytest.fixture
def folder(tmp_path):
    def make(name: str) -> Path:
        return tiny.make_folder(tmp_path / name, name)

    return make


def recipe(model: Path, text: Path, **changes) -> Recipe:
    values = {"window": "2:5", "tokens": 2500, "block": 64, "batch": 4, "lr": 3e-3, "calibration_tokens": 1000}
    values |= {"validation_tokens": 1000, "custom_code": True}
    return Recipe(model=str(model), data=str(text), **{**values, **changes})


LOAD = """
import sys, torch
sys.modules["llm_streamline"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, custom in zip(sys.argv[1::2], sys.argv[2::2]):
    trust = {"trust_remote_code": custom == "True"}
    model = AutoModelForCausalLM.from_pretrained(folder, **trust).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    batch = tokenizer(["the old man saw a", "a small red boat near"], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    cached, uncached = (model.generate(**batch, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, uncached), folder
    states = model(**batch, output_hidden_states=True).hidden_states
    print(len(states), sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_saved_loaded_in_a_fresh_process_and_generating(name, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "verify", oracle.check)  # a fresh process follows below, one for all of them
    text = tiny.write_jsonl(tmp_path / "text.jsonl", tiny.make_documents(200))
    model, made = folder(name), {}
    for replace in ("mlp", *NETWORKS):
        runtime = Runtime(output=tmp_path / replace.replace(":", "-"), quiet=True, tasks=("none",))
        made[replace] = result = compress(recipe(model, text, replace=replace), runtime)
        assert result.verification.passed and result.fit.validation_best < result.fit.validation_before
        assert math.isfinite(result.scores.saved.nats)
        assert (Path(result.model) / "modeling_streamlined.py").exists() == (replace in NETWORKS)
    arguments = [part for key, result in made.items() for part in (result.model, str(key in NETWORKS))]
    command = [sys.executable, "-c", LOAD, *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    layers = 1 + tiny.LAYERS - 2  # a window of three for one: hidden states leave all of them
    assert done.stdout.split() == [
        str(number) for result in made.values() for number in (layers, result.plan.parameters_after)
    ]


def test_code_in_a_folder_is_never_run_unasked_nor_silently_left_out(folder, tmp_path):
    text = tiny.write_jsonl(tmp_path / "text.jsonl", tiny.make_documents(200))
    result = compress(recipe(folder("llama"), text, replace="ffn"), Runtime(output=tmp_path / "out", quiet=True))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(result.model, trust_remote_code=False)
    with pytest.raises(UserError, match="--trust-remote-code"):
        oracle.verify(result.model)
    assert oracle.verify(result.model, trust_remote_code=True).passed
    with pytest.raises(UserError, match="--trust-remote-code"):
        compress(
            recipe(Path(result.model), text, replace="none"),
            Runtime(output=tmp_path / "again", quiet=True, tasks=("none",)),
        )
    config = json.loads((Path(result.model) / "config.json").read_text())
    assert config["streamlined"]["place"] == 2 and config["num_hidden_layers"] == 4


@pytest.mark.parametrize("replace", NETWORKS)
def test_networks_are_refused_before_anything_where_code_is_not_allowed(replace):
    with pytest.raises(UserError, match=r"--replace .* --custom-code, or use --replace mlp"):
        Recipe(model="m", replace=replace)
