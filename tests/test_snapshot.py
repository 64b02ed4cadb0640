from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_streamline import history
from llm_streamline import snapshot as snapshot_module
from llm_streamline.errors import Stopped, UserError
from llm_streamline.recipe import Runtime
from llm_streamline.snapshot import Snapshot
from tests import tiny
from tests.fresh import Fresh
from tests.test_train import same, trainer, weights

TRAINING, VALIDATION = tiny.random_ids(30, 16), tiny.random_ids(2, 16, seed=1)


def curves(fit) -> dict[str, object]:
    return fit.model_dump(exclude={"seconds", "tokens_per_second"})


class Killed(BaseException):
    pass


def killed_after(run, steps: int) -> None:
    """Let a trainer die in the middle of the step after `steps`."""
    real, taken = run.step, []

    def step(*args):
        if len(taken) == steps:
            raise Killed
        taken.append(True)
        return real(*args)

    run.step = step


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize(("every", "lost"), [(0.0, 0), (1e9, None)])
def test_a_killed_training_goes_on_to_the_same_bits(name, every, lost, optimizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(history, "CURVE_POINTS", 4)  # so that losses wait for their point when it is killed
    undisturbed = trainer(name, init="random", accumulate=2, optimizer=optimizer)
    whole = undisturbed.fit(TRAINING, VALIDATION)
    path, resumed = tmp_path / "checkpoint.safetensors", []
    for steps in (3, 2, 100):
        run = trainer(name, init="random", accumulate=2, batch=2, optimizer=optimizer)
        run.snapshot, run.quiet = Snapshot(path, every), False
        killed_after(run, steps)
        try:
            fit = run.fit(TRAINING, VALIDATION)
        except Killed:
            torch.rand(5)
        resumed += [line for line in capsys.readouterr().err.splitlines() if line.startswith("resumed")]
    assert resumed == ([] if lost is None else ["resumed at step 3 of 8", "resumed at step 5 of 8"])
    assert same(weights(undisturbed), weights(run))
    assert curves(fit) == curves(whole)


def test_the_random_state_comes_back(tmp_path):
    run = trainer()
    run.snapshot = Snapshot(tmp_path / "s", 0)
    killed_after(run, 2)
    with pytest.raises(Killed):
        run.fit(TRAINING, VALIDATION)
    expected = torch.rand(4)
    torch.rand(9)
    again = trainer()
    again.snapshot = Snapshot(tmp_path / "s", 0)
    killed_after(again, 0)
    with pytest.raises(Killed):
        again.fit(TRAINING, VALIDATION)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_training_after_the_step_with_a_snapshot(number, code, tmp_path):
    run, before = trainer(), signal.getsignal(number)
    run.snapshot = Snapshot(tmp_path / "s", 1e9)
    real, taken = run.step, []

    def step(*args):
        taken.append(True)
        if len(taken) == 4:
            os.kill(os.getpid(), number)
        return real(*args)

    run.step = step
    with pytest.raises(Stopped, match="the same command continues at step 4 of 15") as stopped:
        run.fit(TRAINING, VALIDATION)
    assert stopped.value.exit_code == code and signal.getsignal(number) == before
    again = trainer()
    again.snapshot = Snapshot(tmp_path / "s", 1e9)
    again.fit(TRAINING, VALIDATION)
    undisturbed = trainer()
    undisturbed.fit(TRAINING, VALIDATION)
    assert same(weights(again), weights(undisturbed))


def test_a_full_disk_leaves_the_snapshot_before(tmp_path, monkeypatch):
    run = trainer()
    run.snapshot = Snapshot(tmp_path / "s", 0)
    killed_after(run, 3)
    with pytest.raises(Killed):
        run.fit(TRAINING, VALIDATION)
    before = (tmp_path / "s").read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(snapshot_module, "save_file", full)
        again = trainer()
        again.snapshot = Snapshot(tmp_path / "s", 0)
        with pytest.raises(UserError, match=r"the disk is full: .* repeat the command to continue"):
            again.fit(TRAINING, VALIDATION)
    assert {path.name for path in tmp_path.iterdir()} == {"s", "s-best"} and (tmp_path / "s").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_snapshot_is_refused(content, tmp_path):
    run = trainer()
    run.snapshot = Snapshot(tmp_path / "s", 0)
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(UserError, match=r"s is damaged .* delete it and repeat the command to train anew"):
        run.fit(TRAINING, VALIDATION)


def test_a_snapshot_of_another_training_is_refused_and_its_batch_is_kept(tmp_path):
    run = trainer()
    run.snapshot = Snapshot(tmp_path / "s", 0)
    run.settings.continued(run.snapshot)
    killed_after(run, 2)
    with pytest.raises(Killed):
        run.fit(TRAINING, VALIDATION)
    smaller = trainer(batch=1)
    smaller.snapshot = Snapshot(tmp_path / "s", 0)
    assert smaller.settings.continued(smaller.snapshot).batch == 2
    other = trainer(lr=0.5)
    other.snapshot = Snapshot(tmp_path / "s", 0)
    other.settings.continued(other.snapshot)
    with pytest.raises(UserError, match=r"another training \(lr 0.01 then, 0.5 now\); .* --fresh"):
        other.fit(TRAINING, VALIDATION)


@pytest.mark.parametrize(("given", "seconds"), [("2s", 2), ("5m", 300), ("1.5h", 5400), ("7", 7), (0.5, 0.5)])
def test_times_are_read(given, seconds):
    assert Runtime(checkpoint_every=given).checkpoint_every == seconds


@pytest.mark.parametrize("given", ["soon", "5d", "-3s", "0"])
def test_what_is_no_time_is_refused(given):
    with pytest.raises(UserError, match=r"--checkpoint-every was given"):
        Runtime(checkpoint_every=given)


def compress(model: Path, text: Path, out: Path) -> Fresh:
    options = ["--data", str(text), "-o", str(out), "--replace", "layer", "--block", "32", "--tasks", "none"]
    options += ["--select", "cosine", "--loss", "nmse", "--validation-tokens", "2k", "--calibration-tokens", "2k"]
    options += ["--tokens", "15k", "--batch", "1", "--checkpoint-every", "0.05s", "--threads", "1"]
    return Fresh(["llm_streamline", "compress", str(model), *options])


@pytest.fixture(scope="module")
def undisturbed(llama_folder, text_file, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights of a run that nobody has killed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run = compress(llama_folder, text_file, out)
    err = run.communicate()[1]
    assert run.returncode == 0, err
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_in_training_continues_there(number, llama_folder, text_file, tmp_path, undisturbed):
    out = tmp_path / "out"
    first, snapshot = compress(llama_folder, text_file, out), out / "checkpoint.safetensors"
    while not snapshot.exists() and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(number)
    err = first.communicate()[1]
    assert first.returncode == (-9 if number == signal.SIGKILL else 143) and not (out / "model").exists()
    if number == signal.SIGTERM:
        assert "error: stopped; the same command continues at step" in err
    again = compress(llama_folder, text_file, out)
    err = again.communicate()[1]
    assert again.returncode == 0, err
    (line,) = [line for line in err.splitlines() if line.startswith("resumed at step")]
    assert int(line.split()[3]) > 0
    assert not snapshot.exists()
    assert same(load_file(out / "model" / "model.safetensors"), undisturbed)
