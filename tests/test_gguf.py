"""GGUF for real: converted by llama.cpp and run by it. Skipped where either is not here (`make gguf` brings both)."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_streamline import assemble as assemble_module
from llm_streamline import oracle, run
from llm_streamline.checkpoint import BUNDLED, Source
from llm_streamline.errors import UserError
from llm_streamline.export import compare_runtime, export
from llm_streamline.recipe import Recipe
from llm_streamline.runtimes.gguf import VARIABLE
from tests import tiny
from tests.test_run import quiet

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = [
    pytest.mark.skipif(VARIABLE not in os.environ, reason=f"${VARIABLE} does not name llama.cpp's source"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PERIOD = ["sliding_attention"] * 5 + ["full_attention"]
KINDS = {
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "layer_types": PERIOD * 3},
}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(assemble_module, "verify", oracle.check)


def dense(kind, folder):
    """A random model of 18 layers with the bundled tokenizer, and what its kind adds to that."""
    config = tiny._like_llama(kind, **KINDS[kind], num_hidden_layers=18, rope_theta=500.0)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(Source(BUNDLED).path).save_pretrained(folder)
    config.vocab_size = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def shortened(model, text, output, **recipe):
    given = {"data": str(text), "replace": "none", "calibration_tokens": 2000, "validation_tokens": 1000, **recipe}
    run.compress(Recipe(model=str(model), **given), quiet(output, tasks=("none",)))
    return output


def exact(found, error=1e-4):
    """20 prompts, every greedy token equal, logits as float32 gives them, every text cut alike."""
    assert (found.prompts, found.problems, found.tokenised) == (20, [], 20)
    return found.equal == found.tokens == 320 and found.logits_error < error


def test_a_shortened_model_of_real_text_is_the_same_in_llama_cpp(shared, tmp_path):
    text = shared / "data" / "text" / "redpajama_sample.jsonl"
    folder = shortened(shared / "models" / "prose-llama-10m", text, tmp_path / "short", remove="3", block=128)
    assert exact(compare_runtime(str(folder), "llama.cpp"))
    written = export(str(folder), "gguf", tmp_path / "short.gguf")
    assert (tmp_path / "short.gguf").stat().st_size == written.bytes and written.number_format == "bf16"
    (check,) = written.checks
    assert check.logits_error < check.tolerance and check.equal > 300


def test_fewer_bits_are_made_of_a_checked_file(shared, tmp_path):
    found = export(str(shared / "models" / "prose-llama-10m"), "gguf", tmp_path / "q4.gguf", "q4_k_m")
    whole, lossy = found.checks
    assert (whole.number_format, lossy.number_format, lossy.tolerance) == ("bf16", "q4_k_m", None)
    assert 10 * whole.divergence < lossy.divergence < 0.5 and lossy.equal > 200
    assert found.bytes < 9e6
    assert [path.name for path in tmp_path.iterdir()] == ["q4.gguf"]


def test_queries_and_keys_with_norms(text_file, tmp_path):
    folder = shortened(dense("qwen3", tmp_path / "dense"), text_file, tmp_path / "short", remove="5")
    assert exact(compare_runtime(str(folder), "llama.cpp"))


@pytest.mark.parametrize("replace", ["none", "layer"])
def test_whole_periods_go_where_llama_cpp_counts_layers(replace, text_file, tmp_path):
    model = dense("gemma3_text", tmp_path / "dense")
    recipe = {"remove": "25%", "for": "gguf", "replace": replace, "tokens": 2000}
    folder = shortened(model, text_file, tmp_path / "short", **recipe)
    config = AutoModelForCausalLM.from_pretrained(folder / "model").config
    assert config.layer_types == PERIOD * 2
    assert exact(compare_runtime(str(folder), "llama.cpp"), 3e-3)  # whose GELU comes from a table of float16


def test_other_windows_are_refused(text_file, tmp_path):
    folder = shortened(dense("gemma3_text", tmp_path / "dense"), text_file, tmp_path / "short", remove="4")
    with pytest.raises(UserError, match=r"cannot be written as GGUF, as llama.cpp tells its layers apart by their num"):
        export(str(folder), "gguf", tmp_path / "short.gguf")
    assert not (tmp_path / "short.gguf").exists()
