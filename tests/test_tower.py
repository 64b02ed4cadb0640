"""The text model that is taken out of one that sees or hears: the same weights, and what the whole predicts of text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer

from llm_streamline import tower
from llm_streamline.checkpoint import Source
from llm_streamline.cli import main
from llm_streamline.errors import UserError
from llm_streamline.families import family_of
from tests import tiny

_SIGLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_PICTURES = {"image_size": 16, "patch_size": 4, "num_channels": 3}
WHOLES = {
    "gemma3": {"text": "gemma3_text", "vision_config": {**_SIGLIP, **_PICTURES}, "mm_tokens_per_image": 4},
    "mistral3": {"text": "mistral", "vision_config": {"model_type": "pixtral", **_SIGLIP, **_PICTURES}},
    "llava": {"text": "llama-tied", "vision_config": {"model_type": "clip_vision_model", **_SIGLIP, **_PICTURES}},
    "voxtral": {
        "text": "llama",
        "audio_config": {**_SIGLIP, "num_mel_bins": 8, "max_source_positions": 16},
    },
    "qwen3_5": {
        "text": "qwen3_5_text",
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 16,
            "out_hidden_size": 32,
        },
    },
}


def seeing_folder(folder: Path, kind: str) -> Path:
    """A folder with a tiny model that sees or hears, and its tokenizer."""
    own = dict(WHOLES[kind])
    text = tiny.CONFIGS[own.pop("text")]
    tokens = {"image_token_id": tiny.VOCABULARY - 1, "tie_word_embeddings": text.tie_word_embeddings}
    config = AutoConfig.for_model(kind, text_config=text.to_dict(), **own, **tokens)
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def whole(tmp_path):
    return lambda kind: seeing_folder(tmp_path / "whole", kind)


@pytest.mark.parametrize("kind", WHOLES)
def test_the_text_model_is_the_wholes_to_the_bit(kind, whole, tmp_path):
    folder, ids = whole(kind), tiny.random_ids(2, 30)[:, :-1] % (tiny.VOCABULARY - 1)
    found = tower.write_text_model(Source(str(folder)), tmp_path / "text")
    loaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(loaded.config).model_type == found.text_type and family_of(loaded.config)
    assert found.parameters == loaded.num_parameters() and found.left_out > 0
    with torch.no_grad():
        seeing = AutoModelForMultimodalLM.from_pretrained(folder).eval()
        assert torch.equal(loaded.eval()(ids).logits, seeing(input_ids=ids).logits)
    stored, kept = load_file(folder / "model.safetensors"), load_file(tmp_path / "text" / "model.safetensors")
    assert all(any(torch.equal(value, one) for one in stored.values()) for value in kept.values())


def test_a_text_model_that_was_taken_out_is_shortened_by_the_command(whole, tmp_path, capsys):
    folder = whole("gemma3")
    with pytest.raises(SystemExit):
        main(["compress", str(folder), "--data", "bundled", "-o", str(tmp_path / "out")])
    assert "'gemma3' does not only read; take its text model ('gemma3_text') out of it with" in capsys.readouterr().err
    main(["text-model", str(folder), "-o", str(tmp_path / "text"), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["text_type"] == "gemma3_text" and said["logits_error"] == 0
    text = tiny.write_jsonl(tmp_path / "text.jsonl", tiny.make_documents(60))
    few = ["--tokens", "2000", "--block", "32", "--calibration-tokens", "320", "--validation-tokens", "320"]
    main(["compress", str(tmp_path / "text"), "--data", str(text), "--window", "2:4", "--dry-run", *few])


def test_a_head_that_only_the_whole_calls_tied_is_tied(whole, tmp_path):
    folder = whole("llava")
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["text_config"].pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(config))
    tower.write_text_model(Source(str(folder)), tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" not in load_file(tmp_path / "text" / "model.safetensors")


def test_what_predicts_something_else_alone_is_not_written(whole, tmp_path, monkeypatch):
    folder = whole("llava")
    real = tower.load_model

    def other(*given):
        model = real(*given)
        model.get_output_embeddings().weight.mul_(1.01)
        return model

    monkeypatch.setattr(tower, "load_model", other)
    with pytest.raises(UserError, match=r"predicts something else alone than in the whole .*nothing was written"):
        tower.write_text_model(Source(str(folder)), tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_what_has_no_text_model_to_take_out_is_refused(whole, tmp_path, llama_folder):
    with pytest.raises(UserError, match=r"is a model of text alone \('llama'\); give it as it is"):
        tower.write_text_model(Source(str(llama_folder)), tmp_path / "text")
    folder = whole("llava")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_config": {"model_type": "xlstm"}}))
    with pytest.raises(UserError, match="is of type 'xlstm', which is not proven"):
        tower.write_text_model(Source(str(folder)), tmp_path / "text")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match="is quantised, and cannot be cut"):
        tower.write_text_model(Source(str(folder)), tmp_path / "text")
    (tmp_path / "text").mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is there already"):
        tower.write_text_model(Source(str(folder)), tmp_path / "text")


def test_settings_and_the_tokenizer_come_along(whole, tmp_path):
    folder = whole("llava")
    settings = {"do_sample": False, "temperature": 0.3, "eos_token_id": [2, 5]}  # which transformers refuses to save
    (folder / "generation_config.json").write_text(json.dumps(settings))
    tower.write_text_model(Source(str(folder)), tmp_path / "text")
    assert settings.items() <= json.loads((tmp_path / "text" / "generation_config.json").read_text()).items()
    text = "the old man"
    made = [AutoTokenizer.from_pretrained(place)(text)["input_ids"] for place in (folder, tmp_path / "text")]
    assert made[0] == made[1]


def test_layers_for_further_tokens_are_left_out_and_that_is_said(whole, tmp_path, capsys):
    folder = whole("qwen3_5")
    stored = load_file(folder / "model.safetensors")
    save_file(stored | {"mtp.fc.weight": torch.ones(32, 64)}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    tower.write_text_model(Source(str(folder)), tmp_path / "text")
    assert "1 stored tensors predict tokens after the next one and are left out" in capsys.readouterr().err
    assert json.loads((tmp_path / "text" / "config.json").read_text())["mtp_num_hidden_layers"] == 0


def test_a_weight_that_is_missing_is_named(whole, tmp_path):
    file = whole("llava") / "model.safetensors"
    stored = load_file(file)
    gone = next(name for name in stored if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file({name: value for name, value in stored.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight is missing from"):
        tower.write_text_model(Source(str(file.parent)), tmp_path / "text")
