"""Two processes against one. `python -m tests.test_parallel` is what each of the two runs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_streamline import run
from llm_streamline.analyze import analyze
from llm_streamline.checkpoint import Source, load_model
from llm_streamline.errors import Dismissed, Stopped, StreamlineError, UserError
from llm_streamline.files import sha256
from llm_streamline.linear import Reading, solve_window
from llm_streamline.lock import run_lock
from llm_streamline.parallel import ALONE, World
from llm_streamline.rank import rank, survey
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import Fit, Similarity, Window
from llm_streamline.snapshot import Snapshot
from llm_streamline.workspace import MADE, RunFolder, Workspace
from tests import tiny
from tests.fresh import Fresh
from tests.test_train import trainer

TRAINING = tiny.random_ids(13, 16)  # the last step of four sequences has one, and the second process has it
VALIDATION = tiny.random_ids(5, 16, seed=1)
SETUPS = {
    "plain": ("llama", {"batch": 4}),
    "accumulated": ("llama", {"batch": 1, "accumulate": 4}),
    "experts": ("qwen3_moe", {"batch": 2, "accumulate": 2}),
    "curriculum": ("llama", {"batch": 1, "accumulate": 4, "loss": "mse:0.3,lm:0.3,kl:0.4"}),
}
LAUNCHER = (  # which goes through torchrun
    "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
)
SIMILARITY = ("cosine", "relative_change", "cosine_se", "relative_change_se")


def start(arguments: list[str], **environment: str) -> list[Fresh]:
    """Two processes that know of one another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [Fresh(arguments, {**os.environ, **common, **place, **environment}) for place in places]


def ended(processes: list[Fresh]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    found = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, found, strict=True)]


def trained(world: World, name: str, changes: dict) -> dict[str, object]:
    run = trainer(name, init="random", **changes)
    run.world = world
    fit = run.fit(TRAINING, VALIDATION)
    weights = [value.numpy().tobytes() for value in run.replacement.state_dict().values()]
    curves = {
        "curve": [p.loss for p in fit.curve],
        "validation": [c.loss for c in fit.validation],
        "tokens": fit.tokens,
    }
    return {**curves, "weights": sha256(*weights)}


def measured(world: World, model=None) -> list[list[list[float]]]:
    found = analyze(model or tiny.make_model("llama"), tiny.random_ids(7, 16), batch=2, quiet=True, world=world)
    return [*(getattr(found, name) for name in SIMILARITY), *found.halves]


def solved(world: World) -> list[list[float]]:
    model, reading = tiny.make_model("llama"), Reading(True, "nmse", 2)
    mapping, fit = solve_window(
        model, Window(start=2, stop=4), TRAINING, VALIDATION[:1], reading, world
    )  # one has none
    return [*mapping.tolist(), [fit.tokens, fit.unexplained, fit.validation_after]]


def ranked(world: World) -> str:
    windows = [Window(start=start, stop=start + 2) for start in range(1, 4)]
    found = rank(tiny.make_model("llama"), tiny.random_ids(7, 16), 2, windows, "patched", quiet=True, world=world)
    return found.model_dump_json()


def surveyed(world: World) -> str:
    windows = [Window(start=start, stop=start + 2) for start in range(1, 4)]
    found = survey(tiny.make_model("llama"), tiny.random_ids(7, 16), 2, windows, "patched", quiet=True, world=world)
    return json.dumps([json.loads(one.model_dump_json()) for one in found])


def broken_survey(world: World) -> None:
    """Of a model that gives no numbers on the second process's share."""
    model, ids = tiny.make_model("llama"), tiny.random_ids(4, 16) % (tiny.VOCABULARY - 1)
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] = float("nan")
    ids[3, 5] = tiny.VOCABULARY - 1
    survey(model, ids, 2, [Window(start=1, stop=3)], "loss", quiet=True, world=world)


def numbers(nest: object) -> list[float]:
    """All numbers in JSON, in order."""
    if isinstance(nest, (dict, list)):
        return [one for part in (nest.values() if isinstance(nest, dict) else nest) for one in numbers(part)]
    return [nest] if isinstance(nest, (int, float)) else []


def refused(act) -> str:
    try:
        act()
    except StreamlineError as error:
        return f"{type(error).__name__} {error.exit_code}"
    return "nothing"


def refuse_in(world: World, rank: int) -> None:
    if world.rank == rank:
        raise UserError("no")


def stopped_by_the_second(world: World, folder: str) -> dict[str, object]:
    """SIGTERM to the second process alone, in its fourth step."""
    run, taken = trainer(batch=1), []
    run.world, run.snapshot = world, Snapshot(Path(folder) / "snapshot", 1e9, world=world)
    real = run.step

    def step(*args):
        taken.append(True)
        if len(taken) == 4 and not world.first:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    run.step = step
    try:
        run.fit(TRAINING, VALIDATION)
    except (Stopped, Dismissed) as error:
        return {"steps": len(taken), "code": error.exit_code, "error": type(error).__name__}
    return {}


def resumed(world: World, folder: str) -> list[float]:
    run = trainer(batch=1)
    run.world, run.snapshot = world, Snapshot(Path(folder) / "snapshot", 1e9, world=world)
    return [point.loss for point in run.fit(TRAINING, VALIDATION).curve]


def main(folder: str) -> None:
    with World.opened(60) as world:
        found = {
            "similarity": measured(world),
            "from the disk": measured(world, load_model(Source(folder), torch.float32, offload=Path(folder) / "none")),
            "ranking": ranked(world),
            "survey": surveyed(world),
            "broken survey": refused(lambda: broken_survey(world)),
            "fits": {key: trained(world, *setup) for key, setup in SETUPS.items()},
            "solved": solved(world),
            "led": world.led(lambda: f"by {world.rank}"),
            "refused": [refused(lambda: world.led(lambda: refuse_in(world, 0)))]
            + [refused(lambda rank=rank: world.attempt(lambda: refuse_in(world, rank))) for rank in range(2)],
            "stopped": stopped_by_the_second(world, folder),
            "resumed": resumed(world, folder),
            "marks": sorted({"RANK", "WORLD_SIZE"} & set(os.environ)),
        }
    print(json.dumps({**found, "size after": world.size}))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[dict]:
    """What the first and the second of two processes found."""
    folder = tiny.make_folder(tmp_path_factory.mktemp("pair"), "llama")
    found = ended(start(["tests.test_parallel", str(folder)]))
    assert [code for code, _, _ in found] == [0, 0], found
    return [json.loads(out.splitlines()[-1]) for _, out, _ in found]


def test_two_processes_measure_what_one_does(pair):
    one = torch.tensor(measured(ALONE), dtype=torch.float64)
    for found in pair:
        torch.testing.assert_close(torch.tensor(found["similarity"], dtype=torch.float64), one, rtol=0, atol=1e-12)
        assert found["from the disk"] == found["similarity"]


def test_two_processes_solve_for_the_map_that_one_does(pair):
    one = solved(ALONE)
    for found in pair:
        for wanted, row in zip(one, found["solved"], strict=True):
            assert row == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_two_processes_rank_as_one_does(pair):
    one = json.loads(ranked(ALONE))
    for found in pair:
        assert numbers(json.loads(found["ranking"])) == pytest.approx(numbers(one), abs=1e-5)
    assert pair[0]["ranking"] == pair[1]["ranking"]


def test_two_processes_survey_as_one_does_and_end_together(pair):
    one = json.loads(surveyed(ALONE))
    for found in pair:
        assert numbers(json.loads(found["survey"])) == pytest.approx(numbers(one), abs=1e-5)
        assert json.loads(found["survey"])[1] == json.loads(found["ranking"])
    assert [found["broken survey"] for found in pair] == ["StreamlineError 2", "Dismissed 2"]


@pytest.mark.parametrize("setup", SETUPS)
def test_two_processes_train_as_one_does_and_hold_the_same_bits(setup, pair):
    one, (first, second) = trained(ALONE, *SETUPS[setup]), (found["fits"][setup] for found in pair)
    assert first == second
    assert first["tokens"] == one["tokens"]
    assert first["curve"] == pytest.approx(one["curve"], rel=1e-4)
    assert first["validation"] == pytest.approx(one["validation"], rel=1e-4)


def test_the_first_leads_and_errors_end_all(pair):
    assert [found["led"] for found in pair] == ["by 0", "by 0"]
    assert pair[1]["refused"] == ["Dismissed 2"] * 3
    assert pair[0]["refused"] == ["UserError 2", "UserError 2", "StreamlineError 2"]
    assert all(found["marks"] == [] and found["size after"] == 1 for found in pair)


def test_a_signal_to_one_stops_all_at_the_same_step_and_all_continue(pair):
    assert pair[0]["stopped"] == {"steps": 4, "code": 143, "error": "Stopped"}
    assert pair[1]["stopped"] == {"steps": 4, "code": 143, "error": "Dismissed"}
    one = [point.loss for point in trainer(batch=1).fit(TRAINING, VALIDATION).curve]
    assert pair[0]["resumed"] == pair[1]["resumed"] == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_shares_are_contiguous_even_and_whole(size, count):
    shares = [World(rank, size).share(range(count)) for rank in range(size)]
    assert [one for share in shares for one in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_world_of_one_does_nothing():
    assert dataclasses.astuple(ALONE) == (0, 1, 0.0, 0, 1) and ALONE.first
    assert ALONE.sum_(torch.ones(2)).tolist() == [1, 1]
    assert ALONE.broadcast(3) == ALONE.led(lambda: 3) == ALONE.alone(lambda: 3) == ALONE.attempt(lambda: 3) == 3
    with World.opened(5) as world:
        assert (world.rank, world.size) == (0, 1) and not torch.distributed.is_initialized()


def options(model: Path, text: Path, out: Path) -> list[str]:
    sizes = ["--tokens", "30k", "--batch", "2", "--block", "32", "--remove", "2", "--compute", "float32"]
    sizes += ["--select", "cosine", "--loss", "nmse", "--calibration-tokens", "2k", "--validation-tokens", "2k"]
    often = ["--tasks", "none", "--checkpoint-every", "0.05s", "--worker-timeout", "10s"]
    return ["llm_streamline", "compress", str(model), "--data", str(text), "-o", str(out), *sizes, *often]


@pytest.mark.slow
def test_what_the_first_refuses_ends_both_with_one_line(llama_folder, text_file, tmp_path):
    for more in (["--data", str(tmp_path / "absent.txt")], ["--remove", "40"], ["--clip", "-1"]):
        found = ended(start([*options(llama_folder, text_file, tmp_path / "out"), *more]))
        assert [code for code, _, _ in found] == [2, 2], found
        assert [err.count("error:") for _, _, err in found] == [1, 0]
    assert not (tmp_path / "out").exists()
    with run_lock(tmp_path / "held"):
        found = ended(start(options(llama_folder, text_file, tmp_path / "held")))
    assert [code for code, _, _ in found] == [2, 2] and not (tmp_path / "held").exists()
    assert "held is in use by another run" in found[0][2] and not found[1][2]


@pytest.mark.slow
def test_a_launcher_starts_one_run_of_two_processes(llama_folder, text_file, tmp_path):
    sizes = ["--block", "32", "--device", "cpu", "--compute", "float32", "--worker-timeout", "60s"]
    measure = ["-m", "llm_streamline", "analyze", str(llama_folder), "--data", str(text_file), *sizes, "--json"]
    command = [sys.executable, "-m", *LAUNCHER.split(), *measure]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cosine"], "said by the first alone: two would have been two documents"


@pytest.mark.slow
def test_two_share_a_model_that_stays_on_the_disk_and_begin_afresh(text_file, tmp_path):
    model, out = tiny.make_folder(tmp_path / "model", "qwen3_moe"), tmp_path / "out"
    sizes = {"block": 32, "tokens": "4k", "calibration_tokens": 2000, "validation_tokens": 2000}
    recipe = Recipe(model=str(model), data=text_file, remove=2, seed=1, **sizes)
    RunFolder.open(out, recipe).file("plan.json").write_text("of an earlier run")
    (out / ".partial-leftover").write_text("")
    (tmp_path / "tmp").mkdir()
    more = ["--tokens", "4k", "--memory", "0.1GB", "--fresh"]
    command = ["tests.unlimited", *options(model, text_file, out)[1:], *more]
    found = ended(start(command, TMPDIR=str(tmp_path / "tmp")))
    assert [code for code, _, _ in found] == [0, 0], found
    assert ["its layers are read from the disk" in err for _, _, err in found] == [True, False]
    assert {path.name for path in out.iterdir()} <= MADE and not list((tmp_path / "tmp").iterdir())
    alone = run.measure(Workspace(recipe.model_copy(update={"seed": 0}), Runtime(compute="float32", quiet=True)))
    two = Similarity.read(out / "similarity.json")
    for name in SIMILARITY:
        values = (torch.tensor(getattr(one, name), dtype=torch.float64) for one in (two, alone))
        torch.testing.assert_close(*values, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("here", "offloads"), [(1, False), (2, True)])
def test_processes_of_one_machine_share_its_memory(here, offloads, llama_folder):
    recipe, runtime = Recipe(model=str(llama_folder), replace="none"), Runtime(memory="800MB", device="cpu", quiet=True)
    assert Workspace(recipe, runtime, World(0, 2, local_size=here)).offloads == offloads


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_ends_the_first_with_a_snapshot_and_the_command_continues(
    number, llama_folder, text_file, tmp_path
):
    command, snapshot = options(llama_folder, text_file, tmp_path / "out"), tmp_path / "out" / "checkpoint.safetensors"
    first, second = start(command)
    while not snapshot.exists() and first.poll() is None:
        time.sleep(0.01)
    second.send_signal(number)
    began = time.monotonic()
    err = first.communicate(timeout=60)[1]
    second.kill()
    second.communicate()
    assert first.returncode == 4 and time.monotonic() - began < 20, err
    assert "error: a worker was lost or did not answer within 10 s" in err
    assert "the same command continues at step" in err and snapshot.exists()
    step = err.rpartition("at step ")[2].split()[0]
    found = ended(start(command))
    assert [code for code, _, _ in found] == [0, 0], found
    assert f"resumed at step {step} of" in found[0][2]
    assert "resumed" not in found[1][2] and (tmp_path / "out" / "model").exists()


@pytest.mark.slow
def test_two_processes_heal_as_one_does(llama_folder, text_file, tmp_path):
    more = ["--tokens", "4k", "--heal", "lora:2+norm", "--heal-lr", "0.02"]
    found = ended(start([*options(llama_folder, text_file, tmp_path / "two"), *more]))
    assert [code for code, _, _ in found] == [0, 0], found
    alone = [sys.executable, "-m", *options(llama_folder, text_file, tmp_path / "one"), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(alone, env=environment, capture_output=True, timeout=120, check=True)
    fits = [Fit.read(tmp_path / name / "healed" / "fit.json") for name in ("one", "two")]
    assert fits[0].tokens == fits[1].tokens and fits[0].trained_parameters == fits[1].trained_parameters
    assert fits[1].validation_best < fits[1].validation_before
    assert fits[1].validation_best == pytest.approx(fits[0].validation_best, rel=1e-4)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    main(sys.argv[1])
