from __future__ import annotations

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llm_streamline import assemble as assemble_module
from llm_streamline import oracle
from llm_streamline.assemble import Parts, assemble
from llm_streamline.checkpoint import round_weights
from llm_streamline.errors import UserError, VerificationError
from llm_streamline.records import LayerPlan, Manifest, Verification, Window
from llm_streamline.replacement import ReplacementLayers, build_replacement
from tests import tiny
from tests.test_families import plan_for

WINDOW = Window(start=1, stop=4)


def make_parts(name: str = "llama", occupied: int = 1) -> Parts:
    model = tiny.make_model(name)
    plan = plan_for(model, WINDOW, occupied)
    replacement = build_replacement(model, plan.replaced(), "random", seed=1) if occupied else ReplacementLayers()
    return Parts(model, plan, replacement.requires_grad_(False), tiny.make_tokenizer())


def write(parts: Parts, target, dtype=torch.float32):
    manifest = Manifest(
        command="test",
        recipe={},
        plan=parts.plan,
        layer_map=parts.plan.layer_map(),
        tensors={},
        fit=None,
        data={},
        layer_similarities=[],
        versions={},
    )
    return assemble(parts, dtype, tiny.random_ids(4, 100), manifest, target)


@pytest.fixture
def in_this_process(monkeypatch):
    """The same check without the seconds that a fresh process costs; others here use the real thing."""
    monkeypatch.setattr(assemble_module, "verify", oracle.check)


@pytest.fixture(scope="module", params=[("llama", 1), ("opt-post-norm", 2)], ids=["llama", "opt-post-norm"])
def published(request, tmp_path_factory):
    parts = make_parts(*request.param)
    folder = tmp_path_factory.mktemp("assembled") / "model"
    return parts, folder, write(parts, folder)


def test_a_fresh_process_finds_the_model_right(published):
    parts, folder, verification = published
    assert verification.passed and verification.logits_error <= 1e-5 and verification.cached_equals_uncached
    assert verification.parameters == parts.plan.parameters_after
    assert oracle.verify(folder).passed
    assert {path.name for path in folder.parent.iterdir()} == {"model"}


def test_so_does_a_process_that_begins_from_nothing(published, monkeypatch):
    monkeypatch.setattr(oracle, "subprocess", subprocess)  # as for a user, imports and all
    parts, folder, _ = published
    if parts.plan.model_type != "llama":
        pytest.skip("one is enough")
    assert oracle.verify(folder).passed


def test_the_folder_loads_without_this_package(published):
    parts, folder, _ = published
    script = (
        "import sys, torch; sys.modules['llm_streamline'] = None;"
        "from transformers import AutoModelForCausalLM, AutoTokenizer;"
        f"m = AutoModelForCausalLM.from_pretrained({str(folder)!r}); t = AutoTokenizer.from_pretrained(m.name_or_path);"
        "m.generate(**t('the old man', return_tensors='pt'), max_new_tokens=5);"
        "print(sum(p.numel() for p in m.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == parts.plan.parameters_after


def test_tokenizer_settings_map_and_manifest_travel_along(published):
    parts, folder, verification = published
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tiny.make_tokenizer().chat_template
    assert json.loads((folder / "layer-map.json").read_text()) == {"layers": parts.plan.layer_map()}
    manifest = Manifest.read(folder / oracle.MANIFEST)
    assert manifest.verification == verification and manifest.plan == parts.plan
    assert (folder / "generation_config.json").is_file()


@pytest.mark.parametrize("name", [*tiny.VARIED, "gptj", "codegen"])  # these two compute buffers within a layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_are_stored_once_in_the_asked_format(name, dtype, tmp_path, in_this_process):
    parts = make_parts(name)
    round_weights(parts.source, dtype)  # the source has to hold what the saved format can hold
    write(parts, tmp_path / "model", dtype)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tied = parts.source.config.tie_word_embeddings
    assert sum(tensor.dim() == 2 and len(tensor) == tiny.VOCABULARY for tensor in tensors.values()) == 2 - tied
    assert sum(tensor.numel() for tensor in tensors.values()) == parts.plan.parameters_after
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == dtype


def test_a_tokenizer_with_code_of_its_own_is_checked_where_that_is_trusted(tmp_path, in_this_process, monkeypatch):
    folder = tmp_path / "model"
    write(make_parts("llama"), folder)
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert oracle.check(folder, True).passed
    with pytest.raises((ValueError, EOFError, OSError)):  # it asks first, and nobody answers
        oracle.check(folder)
    said = []
    answer = SimpleNamespace(returncode=1, stderr="no", stdout="")
    monkeypatch.setattr(
        oracle, "subprocess", SimpleNamespace(run=lambda command, **_: said.append(command) or answer, DEVNULL=None)
    )
    oracle.verify(folder, True)
    oracle.verify(folder)
    assert [oracle._TRUST in command for command in said] == [True, False]


def test_one_fresh_process_finds_several_families_right(tmp_path, in_this_process):
    names = ["gemma3_text", "gpt_neo", "falcon-alibi", "qwen3_moe-period"]
    for name in names:
        write(make_parts(name), tmp_path / name)
    script = (
        "import pathlib, sys; from llm_streamline.oracle import check\n"
        "for folder in sys.argv[1:]: print(check(pathlib.Path(folder)).problems)"
    )
    command = [sys.executable, "-c", script, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"] * len(names)


@pytest.mark.parametrize("name", ["llama", "opt", "opt-post-norm"])
@pytest.mark.parametrize("wrong", [[0, 1, 3, 5], [0, 1, 5, 4], [1, 0, 4, 5]], ids=["other layer", "swapped", "turned"])
def test_wrong_surgery_is_not_published(name, wrong, tmp_path, monkeypatch, in_this_process):
    monkeypatch.setattr(LayerPlan, "sources", lambda self: wrong)
    with pytest.raises(VerificationError, match="not published: logits differ"):
        write(make_parts(name), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_wrong_surgery_is_not_published_by_the_fresh_process_either(tmp_path, monkeypatch):
    monkeypatch.setattr(LayerPlan, "sources", lambda self: [0, 1, 3, 5])
    with pytest.raises(VerificationError, match="not published: logits differ"):
        write(make_parts(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_replacement_put_in_untrained_is_not_published(tmp_path, monkeypatch, in_this_process):
    real = assemble_module._moved_weights

    def untrained(parts, sources):
        weights, counts = real(parts, sources)
        place = f"model.layers.{WINDOW.start}."
        source = parts.source.state_dict()
        return {key: source[key] if key.startswith(place) else value for key, value in weights.items()}, counts

    monkeypatch.setattr(assemble_module, "_moved_weights", untrained)
    with pytest.raises(VerificationError, match="logits differ"):
        write(make_parts(occupied=1), tmp_path / "model")


def test_a_cache_that_disagrees_is_not_published(tmp_path, monkeypatch, in_this_process):
    real = LlamaDecoderLayer.forward

    def forgets(self, hidden_states, *args, past_key_values=None, **kwargs):
        return real(self, hidden_states, *args, past_key_values=past_key_values, **kwargs) * (
            1.5 if past_key_values is not None and hidden_states.shape[1] == 1 else 1.0
        )

    parts = make_parts()
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forgets)
    with pytest.raises(VerificationError, match="with the cache differs"):
        write(parts, tmp_path / "model")


def copy_of(published, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(published[1], folder)
    return folder


def damage_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("layers.2.self_attn.v_proj.weight"))
    tensors[name][0] *= 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_an_unread_row(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[next(key for key in tensors if "embed_tokens" in key)][3] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_number(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[next(key for key in tensors if "layers.2.self_attn.v_proj.weight" in key)][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(key for key in tensors if "layers.1.self_attn.q_proj.weight" in key))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_text(
        path.read_text()
        .replace('"add_prefix_space":false', '"add_prefix_space":true')
        .replace('"add_prefix_space": false', '"add_prefix_space": true')
    )


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (change_an_unread_row, "not the ones that were written"),
        (no_number, "logits differ"),
        (damage_weights, "logits differ"),
        (drop_tensor, "missing keys"),
        (change_tokenizer, "other ids"),
    ],
)
def test_a_folder_damaged_later_fails_the_check(published, tmp_path, damage, problem):
    folder = copy_of(published, tmp_path)
    damage(folder)
    found = oracle.check(folder)
    assert any(problem in one for one in found.problems)
    again = Verification.model_validate_json(found.model_dump_json())  # how it comes from the fresh process
    assert again.problems == found.problems


def test_a_folder_that_does_not_load_is_a_problem_not_a_crash(published, tmp_path):
    folder = copy_of(published, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-200])
    found = oracle.verify(folder)
    assert not found.passed and "does not load in a fresh process" in found.problems[0]


def test_only_our_folders_can_be_verified(tmp_path):
    with pytest.raises(UserError, match="no model made by llm-streamline"):
        oracle.verify(tmp_path)


def test_prompts_outrun_the_sliding_window_or_the_claim_is_limited():
    config = tiny.CONFIGS["llama"]
    assert oracle.prompt_length(config, None) == (48, [])
    assert oracle.prompt_length(config, 60) == (76, [])
    length, limits = oracle.prompt_length(config, 500)
    assert length == tiny.CONTEXT - oracle.NEW_TOKENS and "within the sliding window of 500" in limits[0]
