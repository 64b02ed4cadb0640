"""Checkpoints in the shapes they really come in: read rightly, or refused in a sentence before anything is measured."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import add_handler, remove_handler

from llm_streamline import assemble, checkpoint, oracle, preview, run
from llm_streamline.checkpoint import Source, load_model
from llm_streamline.errors import UserError
from llm_streamline.estimate import Estimate
from llm_streamline.fingerprints import fingerprint, whole_fingerprint
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.scoring.subject import Subject
from tests import tiny

SHARDS = 10
KEPT = {0: 0, 1: 1, 4: 2, 5: 3}  # old layer -> new, of six without 2 and 3
WEIGHTS = "model.safetensors"


@pytest.fixture
def compress(monkeypatch, text_file, tmp_path):
    """Two of six layers go; `little` memory leaves the layers on the disk. Pages and checks elsewhere are left out."""
    monkeypatch.setattr(assemble, "verify", oracle.check)
    monkeypatch.setattr(Estimate, "problem", lambda *_: None)  # torch alone takes more than these models
    monkeypatch.setattr(run, "draw_choice", lambda *_: None)
    monkeypatch.setattr(run, "write_report", lambda *_: None)
    monkeypatch.setattr(run, "publish_scores", lambda *_: None)
    monkeypatch.setattr(run.memory, "release", lambda: None)

    def call(model, little=False, **allowed):
        sizes = {"tokens": 2000, "block": 32, "calibration_tokens": 320, "validation_tokens": 320}
        recipe = Recipe(model=str(model), data=(str(text_file),), window="2:4", replace="none", **sizes)
        more = {"tasks": ("none",), "compute": "float32", **({"memory": "0.1GB"} if little else {}), **allowed}
        return run.compress(recipe, Runtime(output=tmp_path / "out", **more))

    return call


@pytest.fixture
def folder_of(tmp_path):
    """A tiny model's folder, put into a shape."""

    def make(shape, name="llama", dtype=torch.float32):
        folder = tiny.make_folder(tmp_path / "model", name, dtype)
        shape(folder)
        return folder

    return make


@pytest.fixture
def overheard():
    """What transformers says."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    add_handler(handler)
    yield said
    remove_handler(handler)


def as_it_is(folder):
    """An ordinary folder."""


def all_of(*shapes):
    def change(folder):
        for shape in shapes:
            shape(folder)

    change.__name__ = "_".join(shape.__name__ for shape in shapes)
    return change


def config(**changes):
    """Other values in config.json."""

    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    change.__name__ = "-".join(f"{key}-{value}" for key, value in changes.items())[:60]
    return change


def tensors(change, number=0):
    """Other tensors in the weights, or in one of the shards."""

    def edit(folder):
        file = folder / WEIGHTS
        file = file if file.exists() else folder / shard_name(number)
        stored = load_file(file)
        change(stored)
        save_file(stored, file, metadata={"format": "pt"})

    edit.__name__ = change.__name__
    return edit


def without(name):
    def lost(stored):
        del stored[name]

    lost.__name__ = f"without_{name}"
    return tensors(lost)


def having(name, *shape, dtype=torch.float32):
    def added(stored):
        stored[name] = torch.ones(shape, dtype=dtype)

    added.__name__ = f"with_{name}"
    return tensors(added)


def one_more_layer(stored):
    stored |= {k.replace(".5.", ".6."): value.clone() for k, value in stored.items() if ".5." in k}


def shard_name(number, ending="safetensors"):
    return f"model-{number + 1:05d}-of-{SHARDS:05d}.{ending}"


def sharded(folder):
    stored = load_file(folder / WEIGHTS)
    names = sorted(stored)
    for number in range(SHARDS):
        part = {name: stored[name] for name in names[number::SHARDS]}
        save_file(part, folder / shard_name(number), metadata={"format": "pt"})
    _index(folder / f"{WEIGHTS}.index.json", {name: shard_name(i % SHARDS) for i, name in enumerate(names)})
    (folder / WEIGHTS).unlink()


def _index(file, places):
    file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def shard(change):
    """Sharded, with one shard's bytes changed; None for no such file."""

    def damage(folder):
        sharded(folder)
        file = folder / shard_name(3)
        content = change(file.read_bytes())
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)

    return damage


def first_of(stored):
    del stored[min(stored)]


def pickled(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def pickled_shards(folder):
    stored = load_file(folder / WEIGHTS)
    names, files = sorted(stored), [f"pytorch_{shard_name(number, 'bin')}" for number in range(SHARDS)]
    for number, file in enumerate(files):
        torch.save({name: stored[name] for name in names[number::SHARDS]}, folder / file)
    _index(folder / "pytorch_model.bin.index.json", {name: files[i % SHARDS] for i, name in enumerate(names)})
    (folder / WEIGHTS).unlink()


def without_first_part_of_names(stored):
    for name in list(stored):
        stored[name.partition(".")[2]] = stored.pop(name)


def masks(stored):
    for layer in range(tiny.LAYERS):
        stored[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)
        stored[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)


def old_buffers(stored):
    for layer in range(tiny.LAYERS):
        stored[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        stored[f"model.layers.{layer}.self_attn.masked_bias"] = torch.tensor(-1e4)
        stored[f"model.layers.{layer}.self_attn.bias"] = torch.ones(1, 1, 8, 8)
    stored["lm_head.bias"] = torch.ones(tiny.VOCABULARY)


def further_tokens(folder):
    """As models do that predict several tokens at once: transformers knows the names and passes over them."""
    tensors(lambda stored: stored.update({"mtp.fc.weight": torch.ones(32, 64), "mtp.norm.weight": torch.ones(32)}))(
        folder
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))


def stale_index(folder):
    """Of other weights, beside the single file that every tool reads."""
    whole = (folder / WEIGHTS).read_bytes()
    tensors(halved)(folder)
    sharded(folder)
    (folder / WEIGHTS).write_bytes(whole)


def halved(stored):
    for name in stored:
        stored[name] = stored[name] / 2


def head_stored_too(stored):
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()


def only_the_head(stored):
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")


def norms_in_float32(stored):
    torch.manual_seed(1)
    stored |= {name: torch.randn(value.shape) + 1 for name, value in stored.items() if "norm" in name}


def in_a_cache(folder):
    """As the Hub's cache has it: names that point to contents, with the publisher's own format beside."""
    (folder / "original").mkdir()
    save_file({"tok_embeddings.weight": torch.ones(3)}, folder / "original" / "consolidated.00.safetensors")
    save_file({"tok_embeddings.weight": torch.ones(3)}, folder / "consolidated.safetensors")
    sharded(folder)
    (folder / "pytorch_model.bin").write_bytes(b"an older form, which is not read")
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(path for path in folder.iterdir() if path.is_file()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(blobs / str(number))


OWN_CODE = config(auto_map={"AutoModelForCausalLM": "modeling.Mine"})  # of a type that transformers has come to know
# shape, configuration, number format, weights on the disk or held, what is allowed
RIGHT = [
    (sharded, "llama", torch.float32, False, {}),
    (sharded, "llama-tied", torch.float32, True, {}),
    (sharded, "phi", torch.float16, False, {}),
    (sharded, "qwen2", torch.bfloat16, True, {}),
    (all_of(tensors(without_first_part_of_names), tensors(masks)), "gpt2", torch.float32, True, {}),
    (stale_index, "llama", torch.float32, True, {}),
    (tensors(head_stored_too), "llama-tied", torch.float32, True, {}),
    (tensors(only_the_head), "llama-tied", torch.float32, True, {}),
    (pickled_shards, "opt", torch.float32, True, {"allow_pickle": True}),
    (all_of(OWN_CODE, in_a_cache), "llama", torch.float32, False, {"allow_pickle": True}),
]


def expected(name, dtype):
    """The weights that stay, under their new names, in the order of the files' names."""
    found = {}
    for key, value in tiny.make_model(name, dtype).state_dict().items():
        number = next((int(part) for part in key.split(".") if part.isdigit()), None)
        if number is None or number in KEPT:
            found[key if number is None else key.replace(f".{number}.", f".{KEPT[number]}.")] = value
    return found


def saved(folder):
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("shape", "name", "dtype", "little", "allowed"),
    RIGHT,
    ids=[f"{shape.__name__}-{name}-{'disk' if little else 'held'}" for shape, name, _, little, _ in RIGHT],
)
def test_the_weights_that_stay_are_the_sources(compress, folder_of, tmp_path, shape, name, dtype, little, allowed):
    result = compress(folder_of(shape, name, dtype), little, quiet=True, **allowed)
    assert result.verification.passed
    found, wanted = saved(tmp_path / "out" / "model"), expected(name, dtype)
    tied = (
        {"lm_head.weight"}
        if json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"]
        else {}
    )
    assert wanted.keys() - tied == found.keys() - tied
    assert all(torch.equal(value, wanted[key]) and value.dtype == dtype for key, value in found.items())
    assert not list((tmp_path / "out").glob(".*"))


def test_what_is_left_out_is_said(compress, folder_of, tmp_path, capsys):
    compress(folder_of(tensors(old_buffers)), little=True)
    said = capsys.readouterr().err
    assert "13 stored tensors have no place in the model and are left out, such as lm_head.bias\n" in said
    assert saved(tmp_path / "out" / "model").keys() == expected("llama", torch.float32).keys()


def test_layers_that_predict_further_tokens_are_left_out_and_that_is_said(compress, folder_of, tmp_path, capsys):
    compress(folder_of(further_tokens, "qwen3_next"))
    said = capsys.readouterr().err
    assert "2 stored tensors predict tokens after the next one and are left out, such as mtp.fc.weight\n" in said
    assert "have no place" not in said
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("little", [False, True], ids=["held", "disk"])
def test_single_tensors_in_a_wider_format_are_rounded_and_that_is_said(compress, folder_of, tmp_path, capsys, little):
    folder = folder_of(tensors(norms_in_float32), dtype=torch.bfloat16)
    assert compress(folder, little).verification.passed
    said = "13 tensors are stored in a wider format than bfloat16 and are rounded to that, such as model.layers.0.inp"
    assert said in capsys.readouterr().err
    source, found = load_file(folder / WEIGHTS), saved(tmp_path / "out" / "model")
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert torch.equal(found[name], source[name].bfloat16())


def test_a_format_that_the_configuration_names_and_that_cannot_hold_the_weights_is_refused(compress, folder_of):
    def too_large(stored):
        stored["lm_head.weight"] = torch.full_like(stored["lm_head.weight"], 1e6, dtype=torch.float32)

    with pytest.raises(UserError, match="--dtype float16 cannot hold"):
        compress(folder_of(tensors(too_large), dtype=torch.float16))


def only(name, content):
    """A folder that holds one file, and no model."""

    def write(folder):
        for path in folder.iterdir():
            path.unlink()
        if name:
            (folder / name).write_bytes(content)

    write.__name__ = f"only_{name}"
    return write


def beside(name, content):
    def write(folder):
        (folder / name).write_text(content)

    write.__name__ = f"{name}_beside"
    return write


def gguf(folder):
    shutil.rmtree(folder)
    folder.write_bytes(b"GGUF")


def index_of_numbers(folder):
    sharded(folder)
    _index(folder / f"{WEIGHTS}.index.json", {"a": 5})


def float8(stored):
    for name in list(stored):
        if "proj" in name:
            stored[name] = stored[name].to(torch.float8_e4m3fn)


def quantised_before_configurations_said_so(stored):
    name = "model.layers.0.mlp.up_proj"
    del stored[f"{name}.weight"]
    stored |= {f"{name}.qweight": torch.ones(4, 64, dtype=torch.int32), f"{name}.scales": torch.ones(1, 64)}


def half_a_pickle(folder):
    pickled(folder)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lost_pickle(folder):
    pickled_shards(folder)
    (folder / f"pytorch_{shard_name(2, 'bin')}").unlink()


def another_head(stored):
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] * 2


TOKENIZER = json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization.Mine", None]}})
ANY = {"allow_pickle": True}
REFUSED = [
    # files
    (shard(lambda _: None), "llama", f"shard {shard_name(3)} of .* is missing or damaged", {}),
    (
        shard(lambda content: content[: len(content) // 2]),
        "llama",
        f"shard {shard_name(3)} of .* not fully covered",
        {},
    ),
    (shard(lambda content: content[:8] + b"x" * 32 + content[40:]), "llama", f"{shard_name(3)} .* JSON in header", {}),
    (all_of(shard(lambda _: None), config(dtype=None)), "llama", f"shard {shard_name(3)} of .* is missing", {}),
    (index_of_numbers, "llama", r"index.json is damaged \(it names no files\)", {}),
    (tensors(dict.clear), "llama", "files without a tensor", {}),
    (pickled, "llama", "in pickle form only, which can run code; .* --allow-pickle", {}),
    (half_a_pickle, "llama", "shard pytorch_model.bin of .* is missing or damaged", ANY),
    (lost_pickle, "llama", "shard pytorch_model-00003-of-00010.bin of .* is missing or damaged", ANY),
    (beside("generation_config.json", "{"), "llama", "generation_config.json cannot be used .*; fetch it again", {}),
    # tensors
    (
        all_of(sharded, tensors(first_of, 2)),
        "llama",
        r"layers.0.input_layernorm.weight is missing from .* \(1 such",
        {},
    ),
    (without("model.layers.3.mlp.up_proj.weight"), "llama", "layers.3.mlp.up_proj.weight is missing from", {}),
    (without("model.norm.weight"), "llama", "model.norm.weight is missing from", {}),
    (without("model.layers.1.self_attn.q_proj.bias"), "qwen2", "q_proj.bias is missing from", {}),
    (without("model.layers.2.mlp.experts.1.up_proj.weight"), "qwen3_moe", "do not fit its config.json", {}),
    (tensors(one_more_layer), "llama", "layers.6.input_layernorm.weight is unknown to the configuration of", {}),
    (all_of(tensors(without_first_part_of_names), tensors(one_more_layer)), "gpt2", "h.6.attn.* is unknown to", {}),
    (having("model.layers.2.self_attn.q_proj.bias", 32), "llama", "q_proj.bias is unknown to the configuration", {}),
    (having("model.layers.2.mlp.up_proj.weight", 60, 32), "llama", r"has the shape \(60, 32\), not \(64, 32\), in", {}),
    (tensors(float8), "llama", r"is quantised \(.* is in no float format\)", {}),
    (tensors(quantised_before_configurations_said_so), "llama", r"is quantised \(.*qweight", {}),
    # configurations
    (config(num_hidden_layers=8), "llama", "layers.6.* is missing from .* such weights", {}),
    (config(num_hidden_layers=5), "llama", "layers.5.* is unknown to the configuration of", {}),
    (
        config(layer_types=["full_attention"] * 4),
        "qwen3",
        r"\(6\) must be equal to the number of `layer_types` \(4\)",
        {},
    ),
    (config(vocab_size=300), "llama", r"has the shape \(259, 32\), not \(300, 32\)", {}),
    (config(vocab_size=200), "llama", r"has the shape \(259, 32\), not \(200, 32\)", {}),
    (config(tie_word_embeddings=True), "llama", "lm_head.weight is stored with other values; set tie_word", {}),
    (tensors(another_head), "llama-tied", "lm_head.weight is stored with other values; set tie_word", {}),
    (all_of(tensors(another_head), pickled), "llama-tied", "lm_head.weight is stored with other values", ANY),
    (config(tie_word_embeddings=False), "llama-tied", "lm_head.weight is missing from", {}),
    (config(pad_token_id=999), "llama", r"no model can be built from .* \(AssertionError: Padding_idx", {}),
    (config(hidden_act="nosuch"), "llama", "no model can be built from .*'nosuch'", {}),
    (config(intermediate_size=48), "llama", r"has the shape \(32, 64\), not \(32, 48\)", {}),
    (config(dtype="int8"), "llama", "says that the weights are int8; give a model in float32 or float16 or", {}),
    (config(dtype="float8_e4m3fn"), "llama", "says that the weights are float8_e4m3fn", {}),
    *[
        (config(quantization_config={"quant_method": method}), "llama", rf"is quantised \({method}\)", {})
        for method in ("bitsandbytes", "gptq", "fp8", "mxfp4")
    ],
    (config(compression_config={"format": "pack"}), "llama", r"is quantised \(of unknown method\)", {}),
    (config(architectures=["BertModel"]), "llama", "holds BertModel, which is no causal LM", {}),
    (config(model_type="mine", auto_map={"AutoConfig": "mine.Mine"}), "llama", "allow it with --trust-remote-code", {}),
    (beside("tokenizer_config.json", TOKENIZER), "llama", "its own model code.* allow it with --trust-remote-code", {}),
    # what is no model
    (only("adapter_config.json", b"{}"), "llama", r"holds an adapter \(adapter_config.json\); merge it into", {}),
    (beside("adapter_config.json", "{}"), "llama", "holds an adapter", {}),
    (only("model.gguf", b"GGUF"), "llama", "holds no config.json; give the folder", {}),
    (gguf, "llama", "is a file; give the folder", {}),
    (only(None, b""), "llama", "holds no config.json", {}),
]


def _content(folder):
    files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    return {path: path.read_bytes() for path in files if path.is_file()}


@pytest.mark.parametrize(
    ("shape", "name", "words", "allowed"),
    REFUSED,
    ids=[f"{number}-{shape.__name__}" for number, (shape, *_) in enumerate(REFUSED)],
)
def test_what_cannot_be_read_gets_one_sentence_before_anything_is_measured(
    compress, folder_of, tmp_path, monkeypatch, capsys, overheard, shape, name, words, allowed
):
    folder = folder_of(shape, name)
    before = _content(folder)
    capsys.readouterr()
    monkeypatch.setattr(run, "measure", None)
    with pytest.raises(UserError, match=words) as refusal:
        compress(folder, **allowed)
    said = str(refusal.value)
    assert refusal.value.exit_code == 2 and said.endswith(".") and "\n" not in said and "; " in said
    assert not capsys.readouterr().err and not any("REPORT" in line for line in overheard), "nothing else"
    assert {path.name for path in tmp_path.iterdir()} == {"model"} and _content(folder) == before


OF_THE_DISK = [
    tensors(one_more_layer),
    config(tie_word_embeddings=True),
    having("model.layers.2.mlp.up_proj.weight", 60, 32),
    having("model.layers.2.self_attn.q_proj.bias", 32),
]


@pytest.mark.parametrize("shape", OF_THE_DISK, ids=lambda shape: shape.__name__)
def test_layers_that_stay_on_the_disk_are_held_against_the_configuration_too(folder_of, tmp_path, shape):
    folder = folder_of(shape)
    with pytest.raises(UserError, match="config"):
        load_model(Source(str(folder)), torch.float32, offload=tmp_path / "rewritten")
    with pytest.raises(UserError, match="config"):
        Subject(str(folder), Runtime())  # before another model has been asked


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (config(tie_word_embeddings=True), "the head's weight is stored with other values"),
        (having("model.layers.2.mlp.up_proj.weight", 60, 32), "has the shape"),
    ],
    ids=["tied", "shape"],
)
def test_models_of_the_hub_are_held_against_the_configuration_once_they_are_loaded(
    folder_of, monkeypatch, shape, words
):
    folder = folder_of(shape)
    monkeypatch.setattr(checkpoint, "check_fit", lambda *_: [])  # which sees local files only
    with pytest.raises(UserError, match=words):
        load_model(Source(str(folder)), torch.float32)


def test_an_analysis_refuses_before_the_text_is_read(folder_of, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "measured", None)
    recipe = Recipe(model=str(folder_of(tensors(one_more_layer))), data=(str(text_file),))
    with pytest.raises(UserError, match="is unknown to the configuration"):
        preview.analyze_model(recipe, Runtime(output=tmp_path / "out", quiet=True))
    assert not (tmp_path / "out").exists()


def test_a_late_refusal_leaves_no_folder_where_layers_stay_on_the_disk(compress, folder_of, tmp_path, monkeypatch):
    def lost(*_, **__):
        raise UserError("the weights are gone; put them back.")

    monkeypatch.setattr(checkpoint, "open_stored", lost)
    with pytest.raises(UserError, match="are gone"):
        compress(folder_of(as_it_is), little=True, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_pickles_are_told_apart_by_what_they_hold(folder_of):
    file = folder_of(pickled) / "pytorch_model.bin"
    source = Source(str(file.parent), allow_pickle=True)
    settings = checkpoint.load_config(source)
    # in the older form, which holds no sums of its parts
    torch.save({"a": torch.zeros(2**20)}, file, _use_new_zipfile_serialization=False)
    first = fingerprint(source), whole_fingerprint(source, settings)
    _fill(file, file.stat().st_size // 2, 2**20)
    second = fingerprint(source), whole_fingerprint(source, settings)
    assert second[0] == first[0] and second[1] != first[1]
    _fill(file, file.stat().st_size - 100, 50)
    assert fingerprint(source) != first[0]


def _fill(file, middle, length):
    raw = bytearray(file.read_bytes())
    raw[middle - length // 2 : middle + length // 2] = b"\1" * length
    file.write_bytes(raw)


@pytest.mark.parametrize("shape", [as_it_is, pickled], ids=lambda shape: shape.__name__)
def test_without_a_word_in_the_configuration_the_format_is_the_stored_one(folder_of, shape):
    folder = folder_of(all_of(shape, config(dtype=None)), dtype=torch.float16)
    source = Source(str(folder), allow_pickle=True)
    assert checkpoint.checkpoint_dtype(source, checkpoint.load_config(source)) == torch.float16
