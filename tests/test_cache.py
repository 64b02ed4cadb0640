from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch

from llm_streamline import assemble as assemble_module
from llm_streamline import cache as cache_module
from llm_streamline import oracle, run, training
from llm_streamline.cache import Cached, StateCache, cache_bytes
from llm_streamline.errors import UserError
from llm_streamline.passages import streamed
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.snapshot import Snapshot
from llm_streamline.text import shuffled
from llm_streamline.workspace import RunFolder
from tests import tiny
from tests.test_train import WINDOW, same, trainer, weights

BLOCKS = tiny.random_ids(12, 16)
EPOCHS = torch.cat([shuffled(BLOCKS, seed) for seed in range(3)])


@pytest.fixture(autouse=True)
def used_however_slow(monkeypatch):
    monkeypatch.setattr(cache_module, "TRIALS", 0)


def cached(found, folder, owner="me", blocks=BLOCKS, dtype=torch.float32):
    cache = StateCache(folder, owner, blocks, found.model.config.hidden_size, dtype)
    calls = []

    def stream(batches):
        for passage in streamed(found.model, WINDOW, found.settings.autocast)(batches):
            calls.append(len(passage.entering))
            yield passage

    return Cached(found.model, WINDOW, stream, cache, quiet=False), calls


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_three_epochs_from_the_cache_are_three_streamed_ones(name, tmp_path):
    plain = trainer(name, batch=1)
    plain.fit(EPOCHS, BLOCKS[:2])
    found = trainer(name, batch=1)
    found.source, calls = cached(found, tmp_path / "cache")
    found.fit(EPOCHS, BLOCKS[:2])
    assert same(weights(plain), weights(found))
    assert sum(calls) == len(BLOCKS), "every block once; those of the validation are among them"


def test_batches_of_other_blocks_are_put_together_anew(tmp_path):
    plain, found = trainer(batch=4), trainer(batch=4)
    found.source, calls = cached(found, tmp_path / "cache")
    batches = list(EPOCHS.split(4))
    expected = streamed(plain.model, WINDOW, False)(batches)
    for one, other in zip(found.source(batches), expected, strict=True):
        torch.testing.assert_close(one.entering, other.entering, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.leaving, other.leaving, rtol=1e-5, atol=1e-6)
    assert sum(calls) == len(BLOCKS)


def test_what_has_no_place_is_streamed_and_changes_nothing(tmp_path):
    found = trainer()
    found.source, calls = cached(found, tmp_path / "cache")
    others = tiny.random_ids(4, 16, seed=9)
    for _ in range(2):
        assert len(list(found.source(others.split(2)))) == 2
    assert sum(calls) == 8 and not found.source.cache.sums


def test_a_later_process_reads_what_an_earlier_one_has_kept(tmp_path):
    found = trainer()
    for expected in (len(BLOCKS), 0):
        source, calls = cached(found, tmp_path / "cache")
        list(source(BLOCKS.split(2)))
        assert sum(calls) == expected


def test_anothers_cache_is_refused(tmp_path):
    found = trainer()
    list(cached(found, tmp_path / "cache")[0](BLOCKS.split(2)))
    with pytest.raises(UserError, match=r"cache holds states of another model, text, window or --compute; .* --fresh"):
        cached(found, tmp_path / "cache", owner="somebody else")


def test_a_damaged_cache_is_refused(tmp_path):
    found = trainer()
    list(cached(found, tmp_path / "cache")[0](BLOCKS.split(2)))
    file = tmp_path / "cache" / "states.bin"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    source, _ = cached(found, tmp_path / "cache")
    with pytest.raises(UserError, match=r"states.bin is damaged; delete .* repeat the command to continue"):
        list(source(BLOCKS.split(2)))


def test_a_cache_that_is_slower_is_not_used_and_that_is_said(tmp_path, capsys, monkeypatch):
    found = trainer()
    source, calls = cached(found, tmp_path / "cache")
    read = source.cache.read
    monkeypatch.setattr(cache_module, "TRIALS", 3)
    monkeypatch.setattr(source.cache, "read", lambda ids: (cache_module.time.sleep(0.2), read(ids))[1])
    batches = list(EPOCHS.split(2))
    assert len(list(source(batches))) == len(batches)
    assert sum(calls) == len(EPOCHS) and not source.used
    told = r"the cache is not used: reading a batch takes [0-9.]+ s, computing it [0-9.]+ s"
    assert re.search(told, capsys.readouterr().err)


def test_states_in_another_format_are_not_squeezed_in(tmp_path, capsys):
    found = trainer()
    source, calls = cached(found, tmp_path / "cache", dtype=torch.bfloat16)
    list(source(EPOCHS.split(2)))
    assert sum(calls) == len(EPOCHS) and "not in torch.bfloat16" in capsys.readouterr().err


def test_the_whole_run_with_and_without(llama_folder, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(assemble_module, "verify", oracle.check)
    results = []
    for name, size in (("none", None), ("cache", "1GB"), ("small", "1kB")):
        sizes = {"block": 32, "tokens": 640, "calibration_tokens": 640, "validation_tokens": 320, "batch": 1}
        recipe = Recipe(model=str(llama_folder), data=text_file, select="cosine", remove=2, epochs=3, **sizes)
        runtime = Runtime(output=tmp_path / name, tasks="none", compute="float32", cache=size)
        results.append(run.compress(recipe, runtime))
        err = capsys.readouterr().err
        assert ("states are kept in" in err) == (name == "cache")
        assert ("are more than --cache" in err) == (name == "small")
        assert not (tmp_path / name / "cache").exists()
    assert results[0].fit.tokens == 3 * 640
    assert results[0].fit.curve == results[1].fit.curve == results[2].fit.curve


def test_a_cache_for_one_epoch_is_refused(llama_folder, text_file, tmp_path):
    with pytest.raises(UserError, match=r"--cache is for several epochs"):
        recipe = Recipe(model=str(llama_folder), data=text_file, block=32, tokens="2k", remove=2)
        run.compress(recipe, Runtime(output=tmp_path / "out", cache="1GB", quiet=True))
    assert not (tmp_path / "out").exists()


def test_a_cache_where_nothing_stands_in_is_refused(llama_folder, text_file, tmp_path):
    with pytest.raises(UserError, match=r"--cache is for what stands in, and --replace none trains none"):
        recipe = Recipe(model=str(llama_folder), data=text_file, replace="none", heal="norm", epochs=2, remove=2)
        run.compress(recipe, Runtime(output=tmp_path / "out", cache="1GB", quiet=True))


def test_its_size_is_known_beforehand(tmp_path):
    source, _ = cached(trainer(), tmp_path / "cache")
    file = tmp_path / "cache" / "states.bin"
    width = source.cache.width
    assert file.stat().st_size == cache_bytes(BLOCKS, width, torch.float32) == 2 * 12 * 16 * width * 4
    list(source(BLOCKS.split(2)))
    assert len(json.loads((tmp_path / "cache" / "states.json").read_text())["sums"]) == 12


@pytest.mark.parametrize("text", ['{"owner": "m', "{}", '{"owner": "me", "sums": 3}'])
def test_a_damaged_index_is_refused(text, tmp_path):
    found = trainer()
    list(cached(found, tmp_path / "cache")[0](BLOCKS.split(2)))
    (tmp_path / "cache" / "states.json").write_text(text)
    with pytest.raises(UserError, match=r"states.json is damaged; delete .* repeat the command to continue"):
        cached(found, tmp_path / "cache")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only")))
    with pytest.raises(UserError, match=r"cannot write .*states.bin"):
        cached(trainer(), tmp_path / "cache")


def test_a_full_disk_gets_back_what_had_been_reserved(tmp_path, monkeypatch):
    def half(number, start, count):
        os.ftruncate(number, count // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "posix_fallocate", half)
    with pytest.raises(UserError, match="the disk is full"):
        cached(trainer(), tmp_path / "cache")
    assert (tmp_path / "cache" / "states.bin").stat().st_size == 0


def test_a_run_killed_after_its_training_leaves_no_cache(tmp_path):
    fit = trainer().fit(BLOCKS, BLOCKS[:2])
    folder = RunFolder(tmp_path, Recipe(model="m"))
    (tmp_path / "replacement").mkdir()
    fit.write(tmp_path / "replacement" / "fit.json")
    cached(trainer(), tmp_path / "cache")
    snapshot = Snapshot(tmp_path / "checkpoint.safetensors", 1.0)
    assert training.trained_before(folder, snapshot, "replacement") == fit
    assert not (tmp_path / "cache").exists()
