from __future__ import annotations

import dataclasses
import json
import os
from types import SimpleNamespace

import pytest
import torch

from llm_streamline import files, preview, run
from llm_streamline import memory as memory_module
from llm_streamline.errors import UserError
from llm_streamline.estimate import predict
from llm_streamline.probe import Rates, timed
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.sizes import sizes_of
from llm_streamline.workspace import Workspace
from tests import tiny

GB = 10**9


def workspace(folder, memory="16GB", **changes) -> Workspace:
    values = {"model": str(folder), "block": 32, "tokens": 3200, **changes}
    return Workspace(Recipe(**values), Runtime(memory=memory, compute="float32", quiet=True))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"loss": "kl:100000"}, "--loss kl:100000 is over more tokens"),
        ({"heal": "all", "heal_share": 0.0001}, "leaves nothing for one of the two"),
    ],
)
def test_lessons_that_a_run_refuses_are_not_estimated(values, sentence, llama_folder):
    with pytest.raises(UserError, match=sentence):
        preview.estimate_only(Recipe(model=str(llama_folder), block=32, tokens=3200, **values), Runtime(quiet=True))


def test_a_loss_that_trains_nothing_is_no_reason_not_to_estimate(llama_folder):
    recipe = Recipe(model=str(llama_folder), block=32, tokens=3200, replace="none", loss="kl:100000")
    assert preview.estimate_only(recipe, Runtime(quiet=True)).fits


def stages(work, offloaded=False):
    return {stage.name: stage for stage in predict(sizes_of(work), offloaded, offloaded)}


@pytest.mark.parametrize("name", tiny.one_of_each_type())
def test_every_family_is_estimated_and_timed(name, tmp_path):
    folder = tiny.make_folder(tmp_path / "model", name)
    for file in folder.glob("*.safetensors"):
        file.unlink()  # the configuration is all that is read
    recipe = Recipe(model=str(folder), block=32, tokens=3200, remove=2)
    found = preview.estimate_only(recipe, Runtime(quiet=True))
    assert [stage.name for stage in found.stages] == [
        *("analysis", "ranking", "start", "training", "assembly", "verification", "scores")
    ]
    assert found.fits and not found.offloaded and found.disk > 0
    timed = {stage.name for stage in found.stages if stage.seconds is not None}
    assert timed == {"analysis", "ranking", "start", "training", "scores"} and all(
        stage.seconds != 0 for stage in found.stages
    )


def test_what_is_read_layer_by_layer_takes_less_and_does_not_grow_with_depth(llama_folder):
    work = workspace(llama_folder)
    sizes = sizes_of(work)
    sizes = dataclasses.replace(sizes, layer=10**9, total=sizes.outside + 10**9 * sizes.layers)
    deep = dataclasses.replace(sizes, layers=sizes.layers + 100, total=sizes.total + 10**11)
    for offloaded in (True, False):
        pairs = list(zip(predict(sizes, offloaded, offloaded), predict(deep, offloaded, offloaded), strict=True))
        assert all((one.memory == other.memory) == offloaded for one, other in pairs)
    held = {stage.name: stage.memory for stage in predict(deep, False, False)}
    assert all(stage.memory < held[stage.name] for stage in predict(deep, True, True))


def test_memory_does_not_grow_with_tokens(llama_folder):
    few, many = (
        stages(workspace(llama_folder, tokens=tokens, batch=2, optimizer="adamw")) for tokens in (3200, 320000)
    )
    assert {name: stage.memory for name, stage in few.items()} == {name: stage.memory for name, stage in many.items()}
    assert few["training"].tokens < many["training"].tokens


def test_muon_remembers_less_than_adamw():
    one, other = (sizes_of(workspace("bundled", optimizer=name)) for name in ("muon", "adamw"))
    large = [dataclasses.replace(sizes, trained=10**9, turned=sizes.turned and 10**7) for sizes in (one, other)]
    memory = [{stage.name: stage.memory for stage in predict(sizes, False, False)}["training"] for sizes in large]
    assert memory[1] - memory[0] == 4 * 10**9 - 16 * 10**7
    few, many = (sizes_of(workspace("bundled", tokens=tokens)) for tokens in (3200, 32000))
    assert (few.copies, many.copies) == (4, 3)


def test_nothing_is_trained_for_none(llama_folder):
    assert "training" not in stages(workspace(llama_folder, replace="none"))


def test_layers_stay_on_the_disk_as_far_as_they_must(llama_folder, monkeypatch):
    from llm_streamline import estimate

    monkeypatch.setattr(estimate, "LIBRARIES", 0)
    monkeypatch.setattr(estimate, "CHECKER", 0)
    monkeypatch.setattr(estimate, "STATES", 0)
    work = workspace(llama_folder)
    work.config.hidden_size = work.config.vocab_size = 1
    work.__dict__["shape"] = work.shape.model_copy(update={"total": 8 * GB, "layers": [GB] * 8})
    work.__dict__["checkpoint_dtype"] = work.__dict__["compute_dtype"] = torch.float32
    seen = []
    for memory in (80, 69, 30):
        work.__dict__["memory"] = work.__dict__["ram"] = memory * GB
        found = estimate.estimate_of(work)
        seen.append((found.offloaded, found.writes_offloaded, found.fits))
    assert seen == [(False, False, True), (False, True, True), (True, True, True)]


def test_compress_refuses_what_cannot_fit_and_names_what_would_help(llama_folder, text_file, tmp_path):
    recipe = Recipe(model=str(llama_folder), data=text_file, remove=2, block=32)
    with pytest.raises(UserError, match=r"takes about .* GB and there are 0\.00 GB; give .*--memory"):
        run.compress(recipe, Runtime(output=tmp_path / "out", memory="1MB", quiet=True))
    assert not (tmp_path / "out").exists()


def test_windows_are_ranked_where_something_is_left_to_rank(llama_folder):
    ways = ({}, {"select": "loss"}, {"select": "replaceability"}, {"replace": "none"})
    costs = [stages(workspace(llama_folder, **way))["ranking"] for way in ways]
    auto, loss, every, none = ((stage.tokens, stage.memory) for stage in costs)
    assert loss == none or loss < none  # none has one more window
    assert loss < auto and loss[0] < every[0] and loss[1] < every[1]
    for way in ({"select": "cosine"}, {"preset": "paper"}, {"window": "1:4"}):
        assert "ranking" not in stages(workspace(llama_folder, **way))
    assert "ranking" not in stages(workspace(llama_folder), offloaded=True)
    assert "ranking" in stages(workspace(llama_folder, select="auto"), offloaded=True)


def test_a_disk_that_cannot_hold_the_result_is_told(llama_folder):
    estimate = workspace(llama_folder).estimate
    assert estimate.problem(estimate.disk) is None
    assert "choose another output folder" in estimate.problem(estimate.disk - 1)


def test_the_cache_counts_where_it_will_be_kept(llama_folder):
    def disk(**runtime):
        recipe = Recipe(model=str(llama_folder), block=32, tokens=6400, epochs=2)
        return Workspace(recipe, Runtime(compute="float32", **runtime)).estimate.disk

    states = 2 * 6400 * 32 * 4
    assert disk(cache=states) == disk() + states
    assert disk(cache=states - 1) == disk()


def test_a_batch_is_at_most_the_text(llama_folder):
    def training(batch):
        return stages(workspace(llama_folder, tokens=6400, batch=batch))["training"].memory

    assert training(200) == training(10**9)


def test_what_an_earlier_run_has_written_is_no_want_of_space(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert files.free_space(tmp_path / "new") == 1000
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(os.urandom(8192))
    assert files.free_space(tmp_path) == 1000 + 8192


def test_the_table_and_the_json_say_the_same(llama_folder, capsys):
    from llm_streamline import cli

    cli.main(["estimate", str(llama_folder), "--block", "32", "--json"])
    found = json.loads(capsys.readouterr().out)
    cli.main(["estimate", str(llama_folder), "--block", "32"])
    table = capsys.readouterr().out
    assert all(stage["name"] in table and f"{stage['tokens']:,}" in table for stage in found["stages"])
    assert "held in memory" in table


def test_a_loss_of_logits_takes_the_layers_above_and_a_chunk_of_logits(llama_folder):
    near, far, given = (
        workspace(llama_folder, batch=2, **changes)
        for changes in ({"loss": "nmse"}, {"loss": "kl"}, {"loss": "mse:0.5,kl:0.5", "window": "1:4"})
    )
    assert [sizes_of(work).above for work in (near, far, given)] == [0, tiny.LAYERS - 3, tiny.LAYERS - 4]
    assert sizes_of(near).logits == 0 and sizes_of(far).logits == 2 * 32 * tiny.VOCABULARY
    open_ = workspace(llama_folder, batch=2)  # the default looks through the layers above where they are held
    assert sizes_of(open_).logits == sizes_of(far).logits and sizes_of(open_, offloaded=True).logits == 0
    for offloaded in (False, True):
        plain, looking = (stages(work, offloaded)["training"].memory for work in (near, far))
        assert looking >= plain + 32 * sizes_of(far).logits
    others = [
        {name: stage.memory for name, stage in stages(work).items() if name != "training"} for work in (near, far)
    ]
    assert others[0] == others[1]


def test_a_large_vocabulary_does_not_add_all_its_logits(llama_folder):
    work = workspace(llama_folder, loss="kl", batch=8)
    work.config.vocab_size = 10**6
    assert sizes_of(work).logits == 8 * (2**25 // (8 * 10**6)) * 10**6 < 2**25


def test_the_default_batch_leaves_room_for_the_layers_above():
    from llm_streamline.memory import alive_layers, default_batch, layers_above

    near, far = (Recipe(model="m", loss=loss) for loss in ("nmse", "kl"))
    few, many = (default_batch((10**6, 2048), 1, (alive_layers(one, 32), 4096), 2**36) for one in (far, near))
    assert few < many
    assert layers_above(Recipe(model="m", loss="kl", window="21:30"), 32) == 2
    assert layers_above(Recipe(model="m", loss="kl", replace="none"), 32) == layers_above(near, 32) == 0


def test_looking_for_a_start_takes_a_pass_for_each_layer_of_the_windows(llama_folder):
    def tokens(**given):
        return stages(workspace(llama_folder, calibration_tokens=3200, **given))["start"].tokens

    assert tokens() == 3 * 3200 and tokens(window="1:3,4:6") == 4 * 3200  # net two of six layers, and one stands in
    free = {"replace": "linear:free", "loss": "kl", "custom_code": True}
    assert tokens(**free) == 3200 + sizes_of(workspace(llama_folder, **free)).validation
    assert tokens(**{**free, "replace": "linear:patch"}) == 3200, "which chooses no ridge"
    for given in ({"init": "inherited"}, {**free, "loss": "mse"}, {"replace": "none"}):
        assert "start" not in stages(workspace(llama_folder, **given))
    assert not sizes_of(workspace(llama_folder), offloaded=True).starting, "it is not looked for then"
    assert sizes_of(workspace(llama_folder, init="best"), offloaded=True).starting


def test_a_model_with_code_of_its_own_is_checked_and_scored_whole(llama_folder):
    free = {"replace": "linear:free", "loss": "nmse", "custom_code": True}
    sizes = sizes_of(workspace(llama_folder, **free), offloaded=True)
    large = dataclasses.replace(sizes, total=10**9 * sizes.layers, layer=10**9)
    whole, layered = (
        {one.name: one.memory for one in predict(dataclasses.replace(large, whole=whole), True, True)}
        for whole in (True, False)
    )
    assert whole["verification"] > layered["verification"] + 3 * large.total
    assert whole["scores"] - layered["scores"] == large.total * large.compute_bytes


def test_cosines_are_solved_for_in_several_passes():
    once, often = (stages(workspace("bundled", replace="linear", loss=loss)) for loss in ("mse", "cosine"))
    assert often["closed form"].tokens == 6 * once["closed form"].tokens


def test_ranking_holds_the_states_at_all_boundaries_of_a_model_that_is_held():
    sizes = sizes_of(workspace("bundled", replace="none", select="auto"))

    def memory(layers, offloaded):
        found = predict(dataclasses.replace(sizes, layers=layers), offloaded, False)
        return next(stage.memory for stage in found if stage.name == "ranking")

    state = sizes.forward // 2 * sizes.width * sizes.compute_bytes
    assert memory(1012, False) - memory(12, False) == 1000 * state
    assert memory(1012, True) - memory(12, True) < state


def test_numbers_are_held_stored_and_saved_in_formats_of_their_own(tmp_path):
    def formats(stored, saved):
        folder = tiny.make_folder(tmp_path / f"{stored}-{saved}", "llama", getattr(torch, stored))
        sizes = sizes_of(workspace(folder, dtype=saved))
        return sizes.compute_bytes, sizes.stored_bytes, sizes.saved_bytes

    assert formats("bfloat16", "float32") == (4, 2, 4)
    assert formats("float32", "bfloat16") == (4, 4, 2)


def test_the_first_rankings_first_pass_is_the_analysis_where_the_model_is_held():
    sizes = sizes_of(workspace("bundled", replace="none", select="loss"))

    def passes(offloaded, **other):
        found = predict(dataclasses.replace(sizes, **other), offloaded, False)
        return next(stage.tokens for stage in found if stage.name == "ranking") / sizes.calibration

    half = sizes.ranked / 2
    assert passes(False) == half and passes(True) == passes(False, shared=0) == 1 + half
    assert passes(False, windows=3) == 3 * (1 + half) - 1


def test_layers_taken_one_by_one_cost_a_ranking_each(llama_folder):
    one, three = (stages(workspace(llama_folder, preset="sleb", remove=count))["ranking"].tokens for count in (1, 3))
    assert three == 3 * one


def test_every_pass_of_a_closed_form_takes_time():
    def seconds(loss):
        work = workspace("bundled", replace="linear", loss=loss)
        found = timed(work.estimate, sizes_of(work), Rates(forward=1e-6, training=1e-6))
        return next(stage.seconds for stage in found.stages if stage.name == "closed form")

    assert seconds("cosine") == pytest.approx(6 * seconds("mse"))


def test_a_group_that_others_lie_in_limits_them(monkeypatch):
    files = {"/proc/self/cgroup": ["0::/job/step/task"], "/sys/fs/cgroup/job/memory.max": ["1000"]}
    files |= {"/sys/fs/cgroup/job/step/task/memory.max": ["max"]}
    monkeypatch.setattr(memory_module, "_lines", lambda path: files.get(str(path), []))
    assert memory_module.memory_limit() == 1000
