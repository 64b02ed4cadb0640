from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import pytest

from llm_streamline import preview, run
from llm_streamline.errors import UserError
from llm_streamline.lock import run_lock
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.workspace import MADE, own_contents

HOLD = """
import sys
from pathlib import Path
from llm_streamline.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder):
    """Another process that holds the folder until it is killed."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout.readline() == "held\n"
            yield owner
        finally:
            owner.kill()


@pytest.fixture
def recipe(llama_folder, text_file):
    def make(**changes) -> Recipe:
        small = {"tokens": 4000, "calibration_tokens": 1000, "validation_tokens": 1000, "remove": "2"}
        return Recipe(**{"model": str(llama_folder), "data": (str(text_file),), "replace": "none", **small, **changes})

    return make


def quiet(folder, **changes) -> Runtime:
    return Runtime(output=folder, quiet=True, tasks=("none",), compute="float32", **changes)


def earlier_run(folder, recipe: Recipe) -> None:
    """A folder as a run leaves it that was stopped early, with results that no run would read."""
    run.RunFolder.open(folder, recipe).file("similarity.json").write_text("of an earlier run")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")


def test_a_lock_leaves_nothing_behind(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new" / "nested", tmp_path / "empty"):
        with run_lock(folder):
            assert folder.is_dir() and own_contents(folder) == set()
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    with run_lock(tmp_path / "full"):
        (tmp_path / "full" / "result").write_text("")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["result"]


def test_a_second_run_is_refused_and_told_who_has_the_folder(recipe, tmp_path):
    with held(tmp_path / "out") as owner:
        for second in (run.compress, preview.analyze_model):
            with pytest.raises(UserError, match=rf"out is in use by another run \(process {owner.pid} on .* since 2"):
                second(recipe(), quiet(tmp_path / "out", fresh=True))
        assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", ".lock-owner"}


def test_a_killed_owner_frees_the_folder(recipe, tmp_path):
    with held(tmp_path / "out") as owner:
        owner.kill()
        owner.wait()
    assert (tmp_path / "out" / ".lock-owner").exists()
    run.compress(recipe(), quiet(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} <= MADE


def test_a_refused_run_leaves_no_folder(recipe, tmp_path):
    with pytest.raises(UserError, match="--remove"):
        run.compress(recipe(remove="99"), quiet(tmp_path / "new" / "out"))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), run_lock(tmp_path / "file" / "out"):
        pass


def test_fresh_deletes_a_run_of_another_recipe(recipe, tmp_path):
    earlier_run(tmp_path / "out", recipe(seed=1))
    with pytest.raises(UserError, match=r"--seed changed.*--fresh"):
        run.compress(recipe(), quiet(tmp_path / "out"))
    result = run.compress(recipe(), quiet(tmp_path / "out", fresh=True))
    assert result.plan.net == 2 and result.verification.passed
    assert {path.name for path in (tmp_path / "out").iterdir()} <= MADE


def test_what_is_refused_deletes_nothing(recipe, tmp_path):
    earlier_run(tmp_path / "out", recipe())
    preview.plan_only(recipe(), quiet(tmp_path / "out", fresh=True))
    inside = str(tmp_path / "out" / "model")
    for changes, words in (({"remove": "99"}, "--remove"), ({"model": inside}, "reads"), ({"data": inside}, "reads")):
        with pytest.raises(UserError, match=words):
            run.compress(recipe(**changes), quiet(tmp_path / "out", fresh=True))
    assert (tmp_path / "out" / "similarity.json").exists() and (tmp_path / "out" / "model" / "config.json").exists()


@pytest.mark.parametrize("ours", [False, True])
def test_fresh_deletes_nothing_that_no_run_made(recipe, tmp_path, ours):
    (tmp_path / "out").mkdir()
    if ours:
        earlier_run(tmp_path / "out", recipe())
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    before = own_contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"delete .*thesis\.tex" if ours else "not a run of this tool"):
        run.compress(recipe(), quiet(tmp_path / "out", fresh=True))
    assert own_contents(tmp_path / "out") == before
