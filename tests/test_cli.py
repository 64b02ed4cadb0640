from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llm_streamline import assemble as assemble_module
from llm_streamline import oracle, text
from llm_streamline.checkpoint import Source
from llm_streamline.cli import COMMANDS, main
from llm_streamline.families import FAMILIES, layers_of
from llm_streamline.flags import SAID
from llm_streamline.runtimes.gguf import VARIABLE
from tests import tiny
from tests.test_adapters import adapter_of
from tests.test_tower import seeing_folder


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Run the command line here, in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assemble_module, "verify", oracle.check)

    def call(*arguments) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_sigterm_is_not_taken_for_a_failure_of_what_it_stops(cli, monkeypatch):
    from llm_streamline import checkpoint

    def killed(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(checkpoint.AutoModelForCausalLM, "from_pretrained", killed)
    code, _, err = cli("compress", "bundled", "--data", "bundled", "-o", "out", "--quiet")
    assert (code, err) == (143, "error: stopped; the same command continues after the last finished stage.\n")


def help_of(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "llm_streamline", *arguments, "--help"], capture_output=True, text=True, check=True
    )
    return done.stdout


def examples(text: str) -> list[str]:
    return [line.strip() for line in text.partition("Examples:")[2].splitlines() if line.strip()]


@pytest.mark.parametrize("arguments", [[], *[[command] for command in COMMANDS]])
def test_help_loads_neither_torch_nor_transformers(arguments):
    script = (
        "import sys; from llm_streamline.cli import main\n"
        f"try: main({[*arguments, '--help']!r})\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Usage: " in done.stdout


def write_items(folder: Path) -> None:
    row = {"label: 0": {"PPL": 2.0}, "label: 1": {"PPL": 3.0}, "prediction": "0", "gold": "0"}
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({str(number): row for number in range(9)}))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # which peft still asks for
def test_every_examples_of_the_help_pages_runs(cli, monkeypatch):
    for name in ("CALIBRATION_TOKENS", "VALIDATION_TOKENS"):
        monkeypatch.setattr(text, name, 4096)
    lines = [line for command in COMMANDS for line in examples(help_of(command))]
    assert {line.split()[1] for line in lines} == set(COMMANDS)
    for folder in ("predictions/before", "predictions/after", "logs/dense", "logs/shorter"):
        write_items(Path(folder))
    question = {"query": "Where is Mark? Answer:", "choices": ["Mark is in the harbour", "the box is blue"], "gold": 0}
    Path("questions.jsonl").write_text("".join(json.dumps({"id": i, **question}) + "\n" for i in range(3)))
    tiny.write_jsonl(Path("text.jsonl"), ["Nina is in the library.", "The drum went to Nina."])
    adapter_of(Source("bundled").path, Path("lora-of-bundled"))
    seeing_folder(Path("vision-model"), "llava")
    for line in lines:
        if line.split()[1] == "demo":
            continue  # tests/test_demo.py runs it
        if "--to onnx" in line:
            continue  # tests/test_onnx.py exports one
        if "--to gguf" in line and VARIABLE not in os.environ:
            continue  # tests/test_gguf.py says what it needs
        code, out, err = cli(*shlex.split(line)[1:])
        assert code == 0 and out.strip(), (line, err)
        if "--json" in line:
            json.loads(out)


def test_the_table_of_stability_says_all_it_has(cli):
    for folder in ("before", "after"):
        write_items(Path(folder))
    code, out, _ = cli("stability", "before", "after")
    assert code == 0 and "…" not in out and "1.000 [1.000, 1.000]" in out and "1.000 -> 1.000" in out
    assert "eff. n" in out and "task" in out


def test_every_field_is_a_flag_and_the_named_ones_exist():
    page = help_of("compress")
    for flag in (
        *("--data", "--remove", "--window", "--max-params", "--protect-first", "--protect-last", "--replace", "--loss"),
        *("--tokens", "--block", "--batch", "--accumulate", "--lr", "--seed", "--dtype", "--preset", "-o", "--dry-run"),
        *("--json", "--debug", "--recipe"),
    ):
        assert f" {flag}" in page, flag


def test_flags_that_are_something_else_than_of_compress_say_what():
    assert SAID
    for (command, field), said in SAID.items():
        page = " ".join(help_of(command).split())
        assert f"--{field}" in page
        assert said[:40] in page
    assert "--output" not in help_of("estimate"), "nothing is written"


def test_a_flag_that_has_another_name_in_python_reaches_its_recipe(cli):
    arguments = ("compress", "bundled", "--data", "bundled", "--remove", "2", "--for", "gguf", "--select", "cosine")
    arguments += ("--calibration-tokens", "4k")
    for more in (["--dry-run", "--json"], ["--family-from", "model.layers", "-o", "x"]):
        code, out, err = cli(*arguments, *more)
        assert (code, bool(out)) == ((0, True) if "--dry-run" in more else (2, False))
    assert "--family-from model.layers was given, but model type" in err


def test_results_go_to_stdout_and_chatter_to_stderr(cli, llama_folder, text_file):
    small = ("--tokens", "4k", "--calibration-tokens", "2k", "--validation-tokens", "2k")
    code, out, err = cli("compress", llama_folder, "--data", text_file, "-o", "out", "--remove", "2", *small)
    assert code == 0 and "training" not in out
    for words in (
        "validation loss",
        "layers ",
        "verified",
        "out/model",
        "kl ",
        "parameters",
        "report    out/report.html\n",
    ):
        assert words in out, words
    assert "of 6 -> 1 layer, net 2" in err
    code, out, err = cli("compress", llama_folder, "--data", text_file, "-o", "out", "--remove", "2", *small, "--json")
    assert code == 0 and json.loads(out)["plan"]["num_layers"] == tiny.LAYERS
    code, out, _ = cli("verify", "out")
    assert code == 0 and out.startswith("verified: ")


def test_a_failed_verification_has_its_own_exit_code(cli, llama_folder, text_file, tmp_path):
    cli("compress", llama_folder, "--data", text_file, "-o", "out", "--remove", "2", "--replace", "none")
    file = tmp_path / "out" / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    code, out, _ = cli("verify", "out")
    assert code == 1 and "problem: logits differ" in out


def test_a_recipe_file_is_as_good_as_flags(cli, llama_folder, text_file, tmp_path):
    (tmp_path / "r.yaml").write_text(f"model: {llama_folder}\ndata: [{text_file}]\nremove: '2'\n")
    by_file = cli("compress", "--recipe", "r.yaml", "--dry-run", "--json")
    by_flags = cli("compress", llama_folder, "--data", text_file, "--remove", "2", "--dry-run", "--json")
    assert by_file[0] == 0 and by_file[1] == by_flags[1]


def not_a_model(folder):
    (folder / "config.json").unlink()


def change_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def encoder(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))


def encoder_decoder(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))


def sharing_weights(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "zamba", "architectures": ["ZambaForCausalLM"]}))


def config_of(**keys):
    """A configuration of another kind in the place of the model's."""

    def replace(folder):
        (folder / "config.json").write_text(json.dumps(keys))

    return replace


def remote_code(folder):
    change_config(model_type="mine", auto_map={"AutoConfig": "configuration_mine.MyConfig"})(folder)
    (folder / "configuration_mine.py").write_text("raise SystemExit('remote code ran')")


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def garbage(folder):
    (folder / "model.safetensors").write_bytes(b"not a tensor in sight")


def lost_shard(folder):
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def broken_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map":')
    (folder / "model.safetensors").unlink()


def missing_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def small_vocabulary(folder):
    model = tiny.make_model("llama")
    model.resize_token_embeddings(200)
    model.save_pretrained(folder)


def not_finite(folder):
    model = tiny.make_model("llama")
    layers_of(model)[2].mlp.down_proj.weight.data[0, 0] = float("inf")
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (not_a_model, "holds no config.json"),
        (encoder, "holds BertForMaskedLM, which is no causal LM"),
        (encoder_decoder, "is an encoder-decoder"),
        (sharing_weights, "'zamba' is one whose layers share weights, and not proven"),
        (config_of(model_type="bert", architectures=["BertLMHeadModel"]), "'bert' is an encoder, and not proven"),
        (config_of(model_type="minimax"), "'minimax' is computed with the number of each layer"),
        (config_of(model_type="gpt2", scale_attn_by_inverse_layer_idx=True), "scaled by the layer's number"),
        (
            config_of(model_type="doge", num_hidden_layers=2),
            r"at model.layers: try --family-from model.layers, or add a row, see CONTRIBUTING.md",
        ),
        (change_config(model_type="nosuchmodel"), "cannot be used"),
        (remote_code, "allow it with --trust-remote-code"),
        (pickled, "allow them with --allow-pickle"),
        (no_weights, "holds no model.safetensors"),
        (cut_short, "shard model.safetensors of .* is missing or damaged"),
        (garbage, "shard model.safetensors of .* is missing or damaged"),
        (lost_shard, "shard model-00001-of-00002.safetensors of .* is missing or damaged"),
        (broken_index, "index.json is damaged"),
        (missing_weight, "mlp.up_proj.weight is missing from"),
        (change_config(num_hidden_layers=8), "such weights.; fetch the weights that belong to its config.json"),
        (change_config(quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised"),
        (change_config(num_attention_heads=5), "cannot be used"),
        (no_tokenizer, "has no tokenizer that loads"),
        (small_vocabulary, "makes ids up to 258 but the model embeds 200 tokens"),
        (not_finite, "output of layer 2 has infinite or undefined values"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models_that_cannot_be_used_get_one_sentence(cli, tmp_path_factory, tmp_path, text_file, damage, words):
    folder = tiny.make_folder(tmp_path_factory.mktemp("damaged") / "model", "llama")
    damage(folder)
    refused(cli("compress", folder, "--data", text_file, "-o", "out", "--remove", "2"), words)
    assert not list(tmp_path.iterdir())


def test_code_of_its_own_is_refused_even_when_it_is_trusted(cli, tmp_path_factory, tmp_path, text_file):
    folder = tiny.make_folder(tmp_path_factory.mktemp("remote") / "model", "llama")
    remote_code(folder)
    code = "from transformers import PretrainedConfig\nclass MyConfig(PretrainedConfig):\n    model_type = 'mine'\n"
    (folder / "configuration_mine.py").write_text(code)
    given = ("compress", folder, "--data", text_file, "-o", "out", "--remove", "2", "--trust-remote-code")
    refused(cli(*given), "'mine' runs its own code, which is not proven")
    change_config(model_type="llama", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})(folder)
    refused(cli(*given), "model code of its own, which is not proven")
    assert not list(tmp_path.iterdir())


def test_families_lists_the_proven_first_and_a_reason_for_each(cli):
    code, out, _ = cli("families", "--json")
    rows = json.loads(out)
    others = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {row["model_type"] for row in rows}
    assert code == 0 and others == {"gpt-sw3"}  # which has the configuration of another kind, and its row
    assert [row["model_type"] for row in rows if row["status"] == "proven"] == list(FAMILIES)
    assert [row["status"] for row in rows] == sorted(row["status"] for row in rows)
    assert all(row["reason"] for row in rows)
    code, table, _ = cli("families")
    assert code == 0 and all(row["model_type"] in table for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("MODEL --data TEXT -o out --remove 6", "leaves no layer of 6"),
        ("MODEL --data TEXT -o out --remove 5", "would take the protected ends"),
        ("MODEL --data TEXT -o out --window 0:3", "takes protected layers"),
        ("MODEL --data TEXT -o out --remove 2 --window 1:3", "give one of --remove, --window and --max-params"),
        ("MODEL -o out", "no --data was given; .*--data bundled"),
        ("MODEL --data nothing.txt -o out", "is no file here"),
        ("MODEL --data nothing*.txt -o out", "matches no file with text"),
        ("MODEL --data TEXT --data TEXT -o out", "names .*text.jsonl twice"),
        ("MODEL --data TEXT@0 -o out", "gives the weight '0'"),
        ("MODEL --data TEXT@1 --data bundled -o out", "bundled has no weight and .*text.jsonl@1 has"),
        ("MODEL --data TEXT@1 --mixture slimpajama -o out", "--mixture and the weight in --data .* both set shares"),
        ("MODEL --data TEXT --data hub:x -o out", "hub:x is a stream of unknown size"),
        ("MODEL --data TEXT --mixture slimpyjama -o out", "--mixture slimpyjama has 'slimpyjama'"),
        ("MODEL --data TEXT --mixture slimpajama -o out", "line 2*[0-9]*, has no domain in 'meta.redpajama_set_name'"),
        ("MODEL --data TEXT --mixture a=1 --domain text -o out", "a=1 names no domain that occurs"),
        ("MODEL --data TEXT", "no output folder was given"),
        ("MODEL --data TEXT -o out --tokens 9M", "--tokens 9000000 is more than"),
        ("MODEL --data TEXT -o out --block 4096", "longer than the model's context of 128"),
        ("MODEL --data TEXT -o out --loss huber", "--loss was given 'huber'"),
        ("MODEL --data TEXT -o out --device cuda", "--device cuda is not to be had here; there is cpu"),
        ("MODEL --data TEXT -o out --device gpu", "--device gpu is not to be had here"),
        ("MODEL --data TEXT -o TEXT/out", "cannot write|is a file"),
        ("MODEL --data TEXT -o out --tokens 20", "less than one block"),
        ("MODEL --data TEXT -o out --min-lr 0.1", "--min-lr 0.1 is above the learning rate of 0.01"),
        ("MODEL --data TEXT -o out --heal all --heal-loss kl:9999", "--heal-loss kl:9999 is over more tokens than"),
        ("MODEL --data TEXT -o out --preset lora --lr 1e-3", "--lr 0.001 is for what stands in, and --replace none"),
        ("MODEL --data TEXT -o out --preset lora --temperature 4", "--temperature 4 is for a loss of kl, and nothing"),
        ("MODEL --data TEXT -o out --remov 2", "No such option.*--remove"),
        ("MODEL --data TEXT -o out --preset papyrus", "preset 'papyrus' is not known"),
        ("nosuch/model --data TEXT -o out", "neither a folder here nor a model that the Hub gives now"),
        ("--data TEXT -o out", "no MODEL was given"),
    ],
)
def test_requests_that_cannot_be_met_get_one_sentence(cli, tmp_path, llama_folder, text_file, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    named = arguments.replace("MODEL", str(llama_folder)).replace("TEXT", str(text_file))
    refused(cli("compress", *named.split()), words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "is empty"),
        ("binary.txt", b"text\0more", "is binary"),
        ("latin.txt", b"caf\xe9 " * 9, "is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"\n', "is not JSON"),
        ("field.jsonl", b'{"words": "a"}\n', "name the right one with --field"),
        ("short.txt", b"a few words", "give more text with --data or a smaller --block"),
        ("empty.parquet", b"", "is damaged or no Parquet file"),
        ("chat.jsonl", b'{"messages": ["hello"]}\n', "line 1, holds a chat with a malformed turn"),
        ("empty", None, "is a folder without text"),
    ],
)
def test_text_that_cannot_be_used_gets_one_sentence(
    cli, tmp_path, tmp_path_factory, llama_folder, name, content, words
):
    file = tmp_path_factory.mktemp("text") / name
    file.mkdir() if content is None else file.write_bytes(content)
    refused(cli("compress", llama_folder, "--data", file, "-o", "out"), words)
    assert not list(tmp_path.iterdir())


def refused(result: tuple[int, str, str], words: str) -> None:
    """Exit 2, nothing on stdout, and one sentence of explanation as the last line of stderr."""
    code, out, err = result
    last = err.strip().splitlines()[-1]
    assert code == 2 and not out, (code, out, err)
    assert last.startswith("error: ") and last.endswith((".", "'--help'.")), last
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
    assert len(re.findall(r"[a-z)]\. [A-Z]", last)) <= ("See 'llm" in last), "one sentence"
    assert re.search(words, last), last


def test_debug_shows_the_trace(cli, text_file):
    _, _, err = cli("compress", "nosuch/model", "--data", text_file, "-o", "out", "--debug")
    assert "Traceback" in err and err.strip().splitlines()[-1].startswith("error: ")


def test_pickle_loads_when_allowed(cli, tmp_path_factory, text_file):
    folder = tiny.make_folder(tmp_path_factory.mktemp("pickled") / "model", "llama")
    pickled(folder)
    code, _, err = cli(
        "compress", folder, "--data", text_file, "-o", "out", "--remove", "2", "--replace", "none", "--allow-pickle"
    )
    assert code == 0, err


def test_version(cli):
    code, out, _ = cli("--version")
    assert code == 0 and out.startswith("llm-streamline 0.")


def test_an_interrupt_is_said_in_a_sentence(cli, monkeypatch, llama_folder, text_file):
    from llm_streamline import run

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "compress", interrupted)
    code, out, err = cli("compress", llama_folder, "--data", text_file, "-o", "out")
    assert code == 130 and not out and "error: interrupted; the same command continues" in err
