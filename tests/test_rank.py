"""Scores of windows against the plain way to each of them, and what is made of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llm_streamline import assemble as assemble_module
from llm_streamline import cli, crossing, oracle, preview, run, selection, upper
from llm_streamline import rank as rank_stage
from llm_streamline.analyze import analyze
from llm_streamline.checkpoint import Source, load_model
from llm_streamline.choose import choose, why_ranked
from llm_streamline.errors import UserError
from llm_streamline.families import layers_of
from llm_streamline.forward import run_window, substituted
from llm_streamline.rank import best_few, rank, survey
from llm_streamline.ranking import Candidate, Ranking, Score, Winner, confidences, table
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import ModelShape, Similarity, Window
from llm_streamline.scoring.perplexity import next_token_loss
from llm_streamline.text import read_parts
from llm_streamline.workspace import RunFolder, Workspace
from tests import tiny

WINDOWS = [Window(start=start, stop=start + 2) for start in range(1, 4)]
FAMILIES = ["llama", "gemma3_text", "opt-post-norm", "bloom", "falcon-alibi", "qwen3_moe", "gpt2", "cohere2"]


def logits_without(model, ids: torch.Tensor, window: Window) -> torch.Tensor:
    with torch.no_grad(), substituted(model, window):
        return model(ids).logits[:, :-1].double()


def matrices(similarity) -> list[list[list[float]]]:
    return [getattr(similarity, name) for name in ("cosine", "cosine_se", "relative_change", "relative_change_se")]


@pytest.mark.parametrize("name", FAMILIES)
def test_deleted_scores_equal_the_model_with_its_window_skipped(name, monkeypatch):
    model, ids = tiny.make_model(name), tiny.random_ids(5, 20)
    monkeypatch.setattr(upper, "CHUNK_LOGITS", 2 * 7 * tiny.VOCABULARY)  # seven places of two sequences at a time
    monkeypatch.setattr(crossing, "CACHED_TOKENS", 2 * (5 if name == "llama" else 9))  # five, or still seven
    found = rank(model, ids, 2, WINDOWS, "kl", quiet=True)
    similarity = analyze(model, ids, batch=2, quiet=True)
    with torch.no_grad():
        dense = model(ids).logits[:, :-1].double().log_softmax(-1)
    assert found.dense.value == pytest.approx(next_token_loss(model, ids, 2, "", quiet=True).nats, abs=1e-5)
    for window in WINDOWS:
        one = found.of(window)
        with substituted(model, window):
            loss = next_token_loss(model, ids, 2, "", quiet=True)
        assert (one.loss.value, one.loss.se) == pytest.approx((loss.nats, loss.se), abs=1e-5)
        other = logits_without(model, ids, window).log_softmax(-1)
        kl = (dense.exp() * (dense - other)).sum(-1).mean(1)
        assert one.kl.value == pytest.approx(float(kl.mean()), abs=1e-5)
        assert one.kl.se == pytest.approx(float(kl.std()) / math.sqrt(len(ids)), abs=1e-5)
        assert one.cosine.value == pytest.approx(similarity.of(window), abs=1e-6)
        assert one.cosine.se == pytest.approx(similarity.error_of(window), abs=1e-6)
        assert one.relative.value == pytest.approx(similarity.change_of(window), rel=1e-4)
        assert one.patched is one.replaceability is None
    assert found.winner.window == min(found.candidates, key=lambda one: one.kl.value).window
    seen, again = survey(model, ids, 2, WINDOWS, "kl", quiet=True)
    assert again == found, "the same from one pass for both"
    assert (seen.sequences, seen.tokens, len(seen.halves)) == (5, 100, 2)
    for mine, theirs in zip(*([*matrices(one), *one.halves] for one in (seen, similarity)), strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-4, atol=1e-6)
    assert found.winners["cosine"].window == similarity.windows(2, 1, 1)[0]
    assert Ranking.model_validate_json(found.model_dump_json()) == found


class Patch(nn.Module):
    def __init__(self, mapping: torch.Tensor) -> None:
        super().__init__()
        self.mapping = mapping

    def forward(self, hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden + hidden @ self.mapping


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma2"])
def test_patched_scores_equal_an_explicit_computation(name):
    model, ids = tiny.make_model(name), tiny.random_ids(7, 40)
    halves, losses, kls, left, whole = (ids[:3], ids[3:]), [], [], 0.0, 0.0
    for fitted, judged in (halves, halves[::-1]):
        passage = run_window(model, WINDOWS[0], fitted)
        x, y = (state.double().flatten(0, 1) for state in (passage.entering, passage.leaving - passage.entering))
        root = passage.leaving.double().norm(dim=-1).flatten().reciprocal()[:, None]  # of the tokens' weights
        ridge = 1e-6 * float((root * x).square().sum() / 32)
        square = (root * x).T @ (root * x) + ridge * torch.eye(32, dtype=torch.float64)
        patch = Patch(torch.linalg.solve(square, (root * x).T @ (root * y)).float())
        with substituted(model, WINDOWS[0], [patch]):
            losses += [next_token_loss(model, one[None], 1, "", quiet=True).nats for one in judged]
            with torch.no_grad():
                other = model(judged).logits[:, :-1].double().log_softmax(-1)
        with torch.no_grad():
            dense = model(judged).logits[:, :-1].double().log_softmax(-1)
        kls += (dense.exp() * (dense - other)).sum(-1).mean(1).tolist()
        passage = run_window(model, WINDOWS[0], judged)
        weight = passage.leaving.square().sum(-1).reciprocal()
        change = passage.leaving - passage.entering
        left += float((weight * (change - passage.entering @ patch.mapping).square().sum(-1)).sum())
        whole += float((weight * change.square().sum(-1)).sum())
    one = rank(model, ids, 2, WINDOWS, "patched", quiet=True).of(WINDOWS[0])
    assert one.patched.value == pytest.approx(sum(losses) / 7, abs=1e-4)
    assert one.patched.se == pytest.approx(float(torch.tensor(losses).std()) / math.sqrt(7), abs=1e-4)
    assert one.patched_kl.value == pytest.approx(sum(kls) / 7, abs=1e-4)
    assert one.replaceability.value == pytest.approx(left / whole, rel=1e-3)


class Planted(nn.Module):
    """A layer of some model's own kind made linear, or one that adds what its input does not tell."""

    def __init__(self, mapping: torch.Tensor | None) -> None:
        super().__init__()
        self.mapping, self.generator = mapping, torch.Generator().manual_seed(3)

    def forward(self, hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        if self.mapping is None:
            return hidden + torch.randn(hidden.shape, generator=self.generator)
        return hidden + hidden @ self.mapping

    @property
    def attention_type(self) -> str:
        return "full_attention"


@pytest.mark.parametrize("linear", [True, False])
def test_a_linear_window_is_wholly_explained_and_noise_is_not(linear):
    model, window = tiny.make_model("llama"), Window(start=2, stop=3)
    mapping = 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1)) if linear else None
    layers_of(model)[2] = Planted(mapping)
    ids = tiny.random_ids(24, 60)
    found = rank(model, ids, 8, [window, Window(start=3, stop=4)], "replaceability", quiet=True)
    share = found.of(window).replaceability.value
    assert share < 1e-6 if linear else 0.95 < share < 1.2
    if linear:
        assert found.winner.window == window and found.winner.confidence == 1.0
        assert rank(model, ids, 8, [window], "patched", quiet=True).of(window).patched_kl.value < 1e-5


def test_maps_are_judged_on_the_half_that_they_have_not_seen():
    model, window = tiny.make_model("llama"), Window(start=1, stop=3)
    few = tiny.random_ids(2, 16)  # 16 tokens span half of the width: a map fitted on them explains all of them
    assert rank(model, few, 1, [window], "patched", quiet=True).of(window).replaceability.value > 0.3
    again = rank(model, torch.cat([few[:1], few[:1]]), 1, [window], "patched", quiet=True)
    assert again.of(window).replaceability.value < 1e-3


def test_batches_and_windows_in_turn_change_nothing(monkeypatch):
    model, ids = tiny.make_model("llama"), tiny.random_ids(9, 24)
    whole = rank(model, ids, 8, WINDOWS, "patched", quiet=True)
    monkeypatch.setattr(crossing, "MATRICES", 1)  # one window's at a time
    other = rank(model, ids, 2, WINDOWS, "patched", quiet=True)
    for one, two in zip(whole.candidates, other.candidates, strict=True):
        for by in ("cosine", "loss", "kl", "replaceability", "patched", "patched_kl"):
            assert getattr(one, by).value == pytest.approx(getattr(two, by).value, abs=1e-4)
    assert {by: found.window for by, found in whole.winners.items()} == {
        by: found.window for by, found in other.winners.items()
    }


def test_only_the_layers_above_a_window_run_again():
    model, passes = tiny.make_model("llama"), []
    windows = [Window(start=start, stop=start + 2) for start in range(1, 4)]
    for layer in layers_of(model):
        layer.register_forward_hook(lambda *_: passes.append(1))
    rank(model, tiny.random_ids(4, 16), 2, windows, "loss", quiet=True)
    batches, above = 2, sum(tiny.LAYERS - window.stop for window in windows)
    assert len(passes) == batches * (tiny.LAYERS + above) + 1, "one more shows what layers return"


def test_what_is_read_from_the_disk_gives_the_same(llama_folder, tmp_path):
    ids = tiny.random_ids(4, 16)
    held, stored = (load_model(Source(str(llama_folder)), torch.float32, offload=at) for at in (None, tmp_path / "o"))
    one, other = (rank(model, ids, 2, WINDOWS, "patched", quiet=True) for model in (held, stored))
    assert one == other


def score(value: float, se: float = 0.01) -> Score:
    return Score(value=value, se=se)


def made(by: str = "patched", cosines=(0.9, 0.8, 0.7), losses=(3.3, 3.2, 3.1), patched=(3.2, 3.0, None)) -> Ranking:
    """Three windows, of which cosine takes the first, loss the last and the map the second."""
    candidates = [
        Candidate(
            window=window,
            cosine=score(cosine),
            relative=score(1 - cosine),
            loss=score(loss),
            kl=score(loss - 3),
            patched=score(after) if after else None,
        )
        for window, cosine, loss, after in zip(WINDOWS, cosines, losses, patched, strict=True)
    ]
    wins = {"cosine": (0, 1), "relative": (0, 1), "loss": (2, 1), "kl": (2, 1), "patched": (1, 0)}
    winners = {
        name: Winner(window=WINDOWS[a], confidence=0.93, runner_up=WINDOWS[b], margin=score(0.2, 0.05))
        for name, (a, b) in wins.items()
    }
    return Ranking(by=by, sequences=64, tokens=640, dense=score(2.9), candidates=candidates, winners=winners)


def similarity_of(model) -> Similarity:
    return analyze(model, tiny.random_ids(3, 16), batch=3, quiet=True)


def test_the_reason_says_what_decided_how_surely_and_who_disagrees():
    shape = ModelShape(name="m", model_type="t", total=160, layers=[10] * 6)
    plan = choose(similarity_of(tiny.make_model("llama")), shape, Recipe(model="m", remove="1"), made())
    assert plan.window == WINDOWS[1]
    assert "least loss with a linear map in its place among 2, the best by other scores of 3, windows" in plan.why
    assert "3.0000 ± 0.0100; next 1:3, worse by 0.2000 ± 0.0500; the same in 93% of random halves of 64" in plan.why
    others = "cosine and relative change would have taken 1:3, loss after deletion and KL after deletion"
    assert plan.why.endswith(f"; {others} would have taken 3:5")
    assert selection.cosine_differs(made()).startswith("warning: cosine would have taken 1:3 and not 2:4")
    assert "3.2000 and 3.0000" in selection.cosine_differs(made())
    agreed = made("cosine")
    assert selection.cosine_differs(agreed) is None
    alike = agreed.model_copy(update={"winners": {"cosine": agreed.winners["cosine"]}})
    assert why_ranked(alike).endswith("all scores take it") and "highest cosine among 3 windows" in why_ranked(alike)


def test_without_a_replacement_the_cut_is_the_window():
    shape = ModelShape(name="m", model_type="t", total=160, layers=[10] * 6)
    recipe = Recipe(model="m", remove="2", replace="none")
    similarity = similarity_of(tiny.make_model("llama"))
    plan = choose(similarity, shape, recipe, made("relative"))
    assert plan.window == plan.plain_window == WINDOWS[0] != similarity.windows(2, 1, 1)[0]


def test_the_table_has_every_score_and_marks_what_it_takes():
    head, rows = table(made())
    assert head[0] == "window" and len(head) == 6 and [row[0] for row in rows] == ["1:3", "2:4 (taken)", "3:5"]
    assert rows[0][1].endswith("*") and rows[2][3].endswith("*") and rows[1][5] == "3.0000 ± 0.0100 *"
    assert rows[2][5] == ""
    assert "cosine takes 1:3 in 93%" in confidences(made())


class Fixed:
    """Orders of windows by score."""

    def __init__(self, **orders: list[int]) -> None:
        self.windows, self._orders = [Window(start=s, stop=s + 2) for s in range(1, 8)], orders

    def order(self, by: str) -> list[Window]:
        return [Window(start=start, stop=start + 2) for start in self._orders[by]]


def test_the_shortlist_takes_turns():
    found = Fixed(loss=[1, 2, 3, 4, 5, 6, 7], cosine=[7, 1, 2, 3, 4, 5, 6], relative=[7, 6, 5, 4, 3, 2, 1])
    assert [window.start for window in best_few(found, 4)] == [1, 2, 6, 7]
    assert len(best_few(found, 9)) == 7


def test_confidence_is_sure_of_what_every_sequence_says_and_not_of_noise():
    model = tiny.make_model("llama")
    sure = rank(model, tiny.random_ids(8, 16), 4, WINDOWS, "kl", quiet=True).winners["kl"]
    assert sure.confidence == 1.0 and sure.margin.value > 3 * sure.margin.se
    same = [Window(start=1, stop=2), Window(start=2, stop=3)]
    with torch.no_grad():
        for layer in (1, 2):  # which then say nothing of their own but for rounding
            layers_of(model)[layer].self_attn.o_proj.weight.mul_(1e-3)
            layers_of(model)[layer].mlp.down_proj.weight.mul_(1e-3)
    unsure = rank(model, tiny.random_ids(8, 16), 4, same, "loss", quiet=True).winner
    assert 0.4 < unsure.confidence < 1.0


def test_confidence_is_the_share_of_halves_that_agree():
    """One sequence of four decides for the first window: half of the halves have it."""
    found = rank_stage._Found(WINDOWS[:2], 4, ["cosine", "relative", "loss", "kl"])
    for values in found.values.values():
        values[0], values[1] = torch.tensor([[0.0, 1.0, 1.0, 1.0], [9.0, 0.0, 0.0, 0.0]]), 1.0
    ranked = rank_stage._ranking(found, "loss", torch.Size([4, 8]))
    assert ranked.winner.window == WINDOWS[0] and ranked.winner.confidence == pytest.approx(0.5, abs=0.05)


def work(folder, text, runtime=None, **changes) -> Workspace:
    sizes = {"tokens": 4000, "calibration_tokens": 2000, "validation_tokens": 1000, "remove": "2"}
    recipe = Recipe(**{"model": str(folder), "data": str(text), **sizes, **changes})
    return Workspace(recipe, runtime or Runtime(quiet=True, compute="float32"))


def decided(one: Workspace) -> str | None:
    return selection.deciding(one, one.recipe)


@pytest.mark.parametrize(
    ("changes", "by"),
    [
        ({}, "patched"),
        ({"select": "auto"}, "patched"),
        ({"replace": "none"}, "loss"),
        ({"replace": "linear", "protect_first": 1}, "loss"),
        ({"select": "kl"}, "kl"),
        ({"select": "replaceability", "replace": "none"}, "replaceability"),
        ({"select": "cosine"}, None),
        ({"preset": "paper"}, None),
        ({"preset": "paper-none"}, None),
        ({"remove": None, "window": "1:4"}, None),
        ({"remove": "3"}, None),  # of the four layers that may go, all go
        ({"calibration_tokens": 240, "block": 100}, "loss"),
    ],
)
def test_what_decides(changes, by, llama_folder, text_file):
    assert decided(work(llama_folder, text_file, **changes)) == by


def test_a_model_that_stays_on_the_disk_falls_to_cosine_aloud(llama_folder, text_file, capsys):
    runtime = Runtime(compute="float32")
    for select, by in ((None, None), ("loss", "loss")):
        one = work(llama_folder, text_file, runtime, select=select)
        one.__dict__["offloads"] = True
        assert decided(one) == by
    assert "chosen by cosine, as the model does not fit in memory" in capsys.readouterr().err


def test_every_preset_keeps_the_papers_choice():
    from llm_streamline.presets import PRESETS

    for preset in PRESETS:
        kept = {"shortgpt": "influence", "sleb": "greedy", "last-n-head": "last"}.get(preset, "cosine")
        assert Recipe(model="m", preset=preset, custom_code=True).select == kept
    assert Recipe(model="m").select is None and Recipe(model="m", preset="paper", select="loss").select == "loss"


def test_a_score_beside_a_given_window_and_unknown_scores_are_refused():
    with pytest.raises(UserError, match="--select loss goes with no --window, which leaves nothing to select"):
        Recipe(model="m", window="1:4", select="loss")
    assert Recipe(model="m", window="1:4", preset="paper").select == "cosine"
    with pytest.raises(UserError, match="--select was given 'best'"):
        Recipe(model="m", select="best")


def test_the_validation_part_has_no_say(llama_folder, text_file):
    one, other = (work(llama_folder, text_file) for _ in range(2))
    parts = read_parts(other.recipe, other.tokenizer, tiny.CONTEXT, quiet=True)
    unlike = {name: tiny.random_ids(*getattr(parts, name).shape, seed=9) for name in ("validation", "training")}
    other.__dict__["parts"] = type(parts)(calibration=parts.calibration, shares={}, **unlike)
    assert selection.ranked(one, one.recipe, "patched") == selection.ranked(other, other.recipe, "patched")
    assert selection.decide(one, run.measure(one)) == selection.decide(other, run.measure(other))


def test_few_sequences_are_named(llama_folder, text_file, tmp_path, capsys):
    command = ["analyze", str(llama_folder), "--data", str(text_file), "-o", str(tmp_path), "--block", "16"]
    cli.main([*command, "--calibration-tokens", "16"])
    said = " ".join(capsys.readouterr().err.split())
    few = "warning: the calibration part is 2 sequences, of which standard errors and halves say little; give more"
    assert f"{few} --calibration-tokens" in said
    cli.main([*command, "--calibration-tokens", "64"])
    assert "warning" not in capsys.readouterr().err


def test_a_survey_halves_the_sequences_as_the_analysis_does():
    model, ids = tiny.make_model("llama"), tiny.random_ids(7, 8)  # micro-batches begin at 0, 2, 3 and 5
    halves = survey(model, ids, 2, WINDOWS, "loss", quiet=True)[0].halves
    for mine, theirs in zip(halves, analyze(model, ids, batch=2, quiet=True).halves, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=0, atol=1e-6)


def test_a_survey_of_non_finite_states_names_the_layer():
    model = tiny.make_model("llama")
    with torch.no_grad():
        layers_of(model)[3].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="output of layer 3"):
        survey(model, tiny.random_ids(2, 8), 2, WINDOWS, "loss", quiet=True)


@pytest.mark.parametrize(("select", "passes"), [(None, ["survey"]), ("loss", ["survey"]), ("cosine", ["analyze"])])
def test_a_held_model_is_passed_once_for_both(select, passes, llama_folder, text_file, tmp_path, monkeypatch):
    begun = []
    for module, stage in ((run, "analyze"), (selection, "rank"), (selection, "survey")):
        real = getattr(module, stage)
        monkeypatch.setattr(module, stage, lambda *a, real=real, stage=stage, **k: begun.append(stage) or real(*a, **k))
    one = work(llama_folder, text_file, replace="none", **({"select": select} if select else {}))
    folder = RunFolder(tmp_path, one.recipe)
    similarity = run.measured_into(folder, one)
    plan = selection.decide(one, similarity, folder)
    assert begun == passes and folder.has("ranking.json") == (select != "cosine")
    assert plan == preview.plan_only(one.recipe, one.runtime)
    assert begun == 2 * passes, "nor does the plan alone pass it twice"
    (tmp_path / "ranking.json").unlink(missing_ok=True)  # as a run has it that was killed after the similarity alone
    assert selection.decide(one, similarity, folder) == plan


def test_a_model_on_the_disk_is_measured_and_then_ranked(llama_folder, text_file, monkeypatch):
    monkeypatch.setattr(selection, "survey", None)
    one = work(llama_folder, text_file, select="loss")
    monkeypatch.setattr(Workspace, "offloads", True)
    assert run.deciding_held(one) is None
    similarity, ranking = run.measured(one, one.recipe, "loss")
    assert ranking.by == "loss" and similarity == run.measure(one)


@pytest.mark.parametrize(("offloads", "words"), [(True, "chosen by cosine"), (False, "the calibration part has fewer")])
def test_what_decides_is_said_once(offloads, words, llama_folder, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Workspace, "offloads", offloads)
    monkeypatch.setattr(selection, "FEWEST_ROWS", 10**6)
    one = work(llama_folder, text_file, Runtime(compute="float32"))
    folder = RunFolder(tmp_path, one.recipe)
    selection.decide(one, run.measured_into(folder, one), folder)
    assert " ".join(capsys.readouterr().err.split()).count(words) == 1


def test_the_plan_alone_and_the_run_decide_alike_and_a_run_is_continued(llama_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble_module, "verify", oracle.check)  # in this process
    recipe = work(llama_folder, text_file, replace="none", select="loss").recipe
    runtime = Runtime(output=tmp_path / "out", quiet=True, compute="float32", tasks=("none",))
    planned = preview.plan_only(recipe, runtime)
    assert not (tmp_path / "out").exists()
    result = run.compress(recipe, runtime)
    assert result.plan == planned and "loss after deletion" in planned.why
    kept = Ranking.read(tmp_path / "out" / "ranking.json")
    assert kept.winner.window == planned.window
    html = (tmp_path / "out" / "report.html").read_text()
    assert "What each window would cost" in html and f"{kept.candidates[0].kl.value:.4f}" in html
    (tmp_path / "out" / "plan.json").unlink()  # as a run that was killed between the two leaves it
    monkeypatch.setattr(selection, "rank", None)
    monkeypatch.setattr(selection, "survey", None)
    assert run.compress(recipe, runtime).plan == planned


def test_analysis_ranks_where_a_removal_is_named(llama_folder, text_file, tmp_path, capsys):
    command = ["analyze", str(llama_folder), "--data", str(text_file), "--calibration-tokens", "2000", "--quiet"]
    cli.main([*command, "-o", str(tmp_path / "plain")])
    assert "compress would take" not in capsys.readouterr().out
    cli.main([*command, "-o", str(tmp_path / "ranked"), "--remove", "1"])
    out = capsys.readouterr().out
    kept = Ranking.read(tmp_path / "ranked" / "ranking.json")
    assert {len(one.window) for one in kept.candidates} == {2} and kept.by == "patched"
    assert f"compress would take {kept.winner.window}" in out and f"{kept.candidates[0].kl.value:.4f}" in out
    assert "…" not in out and out.count("*") >= 6, "of each score what it would take"
    assert not (tmp_path / "plain" / "ranking.json").exists()
    cli.main([*command, "-o", str(tmp_path / "ranked")])
    assert not (tmp_path / "ranked" / "ranking.json").exists(), "of a length that was not asked for"
    cli.main([*command[:-1], "-o", str(tmp_path / "last"), "--remove", "1", "--select", "last"])
    assert "no windows are ranked: 3:5 is the only one that may go" in capsys.readouterr().err
    cli.main([*command[:-1], "-o", str(tmp_path / "single"), "--select", "influence", "--replace", "none"])
    assert "ranked: --select influence takes single layers" in capsys.readouterr().err
    (tmp_path / "given.yaml").write_text("window: 1:3,4:6\nselect: cosine\nprotect_last: 0\n")
    cli.main([*command[:1], "--recipe", str(tmp_path / "given.yaml"), *command[1:-1], "-o", str(tmp_path / "given")])
    assert "ranked: --window 1:3,4:6 names what goes" in capsys.readouterr().err
    assert not [*(tmp_path / "last").glob("ranking.json"), *(tmp_path / "single").glob("ranking.json")]
    cli.main([*command, "-o", str(tmp_path / "cosine"), "--remove", "1", "--select", "cosine"])
    kept = Ranking.read(tmp_path / "cosine" / "ranking.json")
    assert kept.by == "cosine" and len(kept.candidates) > 1
    assert f"compress would take {kept.winner.window}: cosine decides" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*command, "-o", str(tmp_path / "none"), "--remove", "40"])
    assert "leaves no layer" in capsys.readouterr().err and not list((tmp_path / "none").glob("*.json"))
