"""What llm-compressor makes of a shortened model, and what is refused before anything is measured."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from llm_streamline import assemble as assemble_module
from llm_streamline import lighter as lighter_module
from llm_streamline import oracle, run
from llm_streamline.chain import PLACES, check_asked, kinds, standing
from llm_streamline.errors import UserError, VerificationError
from llm_streamline.evaluation import Lighter
from llm_streamline.lighter import by_llm_compressor, group_size, write_lighter
from llm_streamline.oracle import LOSSY, MANIFEST
from llm_streamline.records import Loss, Manifest
from llm_streamline.scoring.given import Prompts, Questions
from llm_streamline.workspace import RunFolder, Workspace
from tests import tiny
from tests.test_run import quiet, recipe

__all__ = ["recipe"]  # a fixture
compressor = pytest.mark.skipif(find_spec("llmcompressor") is None, reason="pip install 'llm-streamline[vllm]'")
BLOCKS = tiny.random_ids(8, 32)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(assemble_module, "verify", oracle.check)
    monkeypatch.setattr(lighter_module, "verify", oracle.check)


@pytest.mark.parametrize(("kind", "library"), [("int8", "torchao"), ("w4a16", "llmcompressor")])
def test_what_is_not_there_is_refused_first(kind, library, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(lighter_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{library}'s, which is not installed: pip install 'llm-streamline\["):
        run.compress(recipe(), quiet(tmp_path / "run", then=kind))
    assert not (tmp_path / "run").exists()


def test_rows_that_are_no_whole_groups_are_refused_first(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(lighter_module, "find_spec", lambda name: "there")
    narrow = tiny.make_model("llama")
    narrow.model.layers[0].mlp.up_proj = nn.Linear(24, 3)
    monkeypatch.setattr(Workspace, "skeleton", narrow)
    with pytest.raises(UserError, match=r"torch's linear layers, .* none; use --then int4"):
        group_size(tiny.make_model("gpt2").transformer.h)
    with pytest.raises(UserError, match=r"every 32 weights of a row or more, .* 24, 32.*--then int8"):
        run.compress(recipe(), quiet(tmp_path / "run", then="w4a16"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("widths", "size"), [((256, 1024), 128), ((256, 704), 64), ((32, 96), 32)])
def test_scales_are_for_as_many_weights_as_every_row_has_groups_of(widths, size):
    assert group_size(nn.ModuleList(nn.Linear(width, 3) for width in widths)) == size


@compressor
@pytest.mark.filterwarnings("default")
def test_a_run_goes_on_to_four_bits(recipe, tmp_path):
    found = run.compress(recipe(replace="none"), quiet(tmp_path / "run", then="w4a16"))
    assert [one.name for one in found.chain.links] == ["dense", "shortened", "and w4a16"]
    folder = tmp_path / "run" / "model-w4a16"
    verified = Manifest.read(folder / MANIFEST).verification
    assert verified.passed and 1e-5 < verified.logits_error < LOSSY["w4a16"]
    stored = load_file(folder / "model.safetensors")
    assert {one.dtype for name, one in stored.items() if name.endswith("_proj.weight_packed")} == {torch.int32}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape == (1, 7)


@compressor
@pytest.mark.filterwarnings("default")
def test_what_is_rounded_wrongly_is_not_published(recipe, tmp_path):
    run.compress(recipe(replace="none"), quiet(tmp_path / "run"))

    def wrong(source, folder):
        by_llm_compressor(BLOCKS, True)(source, folder)
        file = folder / "model.safetensors"
        stored = load_file(file)
        packed = {name: one.flip(0) for name, one in stored.items() if name.endswith("weight_packed")}
        save_file({**stored, **packed}, file, {"format": "pt"})

    with pytest.raises(VerificationError, match=r"the w4a16 model is not published: logits differ"):
        write_lighter("w4a16", wrong, tmp_path / "run" / "model", tmp_path / "lighter")
    assert not (tmp_path / "lighter").exists()


def test_a_gguf_file_is_asked_what_it_can_be(recipe, tmp_path):
    folder = RunFolder(tmp_path, recipe())
    chosen, written = Questions("boolq", "d", []), Prompts("written", "d", [])
    check_asked([chosen], kinds("int4", folder))
    check_asked([chosen, written], kinds("int8", folder))
    with pytest.raises(UserError, match="--tasks written is not for the int4 model"):
        check_asked([chosen, written], kinds("int4", folder))
    for name in ("int4.json", PLACES["int4"]):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="--tasks written is not for the int4 model"):
        check_asked([written], kinds(None, folder))
    check_asked([written], kinds(None, folder, afresh=True))


def test_a_gguf_file_holds_a_block_of_the_runs_text(recipe, tmp_path):
    work = Workspace(recipe(), quiet(tmp_path))
    work.__dict__["parts"] = SimpleNamespace(validation=torch.zeros(1, 8192))
    saved = SimpleNamespace(fingerprint="f", context=131072)
    made = Lighter(kind="int4", path="m.gguf", bytes=1, loss=Loss(nats=1, se=0, tokens=1, sequences=1), claim="")
    found = standing(work, made, saved, tmp_path)
    assert found.context == 8192 == found.load.args[1], "and is asked nothing longer"
    work.parts.validation = torch.zeros(1, 32)
    assert standing(work, made, saved, tmp_path).context == 4096
