"""`evaluate` from end to end on tiny models: figures, what is kept, what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

from llm_streamline import assemble as assemble_module
from llm_streamline import oracle
from llm_streamline.cli import main
from llm_streamline.errors import UserError
from llm_streamline.evaluation import Request
from llm_streamline.lock import run_lock
from llm_streamline.recipe import Runtime
from llm_streamline.run import evaluate
from llm_streamline.scoring import evaluator as stage
from llm_streamline.scoring.evaluate import compared
from llm_streamline.scoring.items import read_items
from llm_streamline.scoring.prompts import bundled_openings
from llm_streamline.scoring.stability import compare_tasks
from llm_streamline.scoring.subject import Subject
from llm_streamline.scoring.texts import Text, read_text, score_text, stride_of, windows
from tests import tiny
from tests.test_tasks import make_jsonl, make_yaml


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """A dense model and one like it."""
    folder = tmp_path_factory.mktemp("evaluated")
    tiny.make_folder(folder / "dense", "llama")
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.mul_(3)
    model.save_pretrained(folder / "other")
    tiny.make_tokenizer().save_pretrained(folder / "other")
    return str(folder / "dense"), str(folder / "other")


@pytest.fixture
def inputs(tmp_path) -> tuple[str, str]:
    text = tiny.write_jsonl(tmp_path / "text.jsonl", tiny.make_documents(5))
    return str(make_jsonl(tmp_path / "q.jsonl", 12)), str(text)


def run(models, inputs, folder, **changes):
    values = {"models": models[1:], "against": models[0], "tasks": inputs[0], "text": inputs[1], **changes}
    return evaluate(Request(**values), Runtime(output=folder, quiet=True, compute="float32"))


def test_figures_are_those_of_the_items(models, inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # which questions in JSONL do not need
    found = run(models, inputs, tmp_path / "out")
    assert found.against == "dense" and [one.label for one in found.models] == ["dense", "other"]
    for one in found.models:
        items = read_items(tmp_path / "out" / "items" / one.label / "q.jsonl")["q"].values()
        (task,), right = one.tasks, sum(item.likeliest_right for item in items)
        assert task.items == 12 and task.value == right / 12 and task.metric == "accuracy" and task.measure == "whole"
        low, high = stats.binomtest(right, 12).proportion_ci(method="wilson")
        assert task.interval == (low, high) and low < task.value < high
        assert task.right_by_ppl == sum(item.right for item in items) / 12
        assert 0 < task.cut < 12
    both = [read_items(tmp_path / "out" / "items" / label) for label in ("dense", "other")]
    assert found.models[0].stability is None and found.models[1].stability == compare_tasks(*both)
    assert found.models[0].texts[0].nats != found.models[1].texts[0].nats
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["against"] == "dense"


def test_nothing_is_evaluated_twice_and_what_changed_is(models, inputs, tmp_path, monkeypatch):
    asked = []
    for name in ("answers", "score_text"):
        real = getattr(stage, name)
        monkeypatch.setattr(stage, name, lambda *a, name=name, real=real, **k: asked.append(name) or real(*a, **k))
    first = run(models, inputs, tmp_path / "out")
    assert asked == ["answers", "score_text"] * 2
    asked.clear()
    assert run(models, inputs, tmp_path / "out", batch=3) == first and not asked, "a batch changes no number"
    (tmp_path / "out" / "items" / "other" / "q.jsonl").unlink()
    assert run(models, inputs, tmp_path / "out") == first and asked == ["answers"]
    for changes, again in (({"stride": 50}, ["score_text"] * 2), ({"limit": 4}, ["answers", "score_text"] * 2)):
        asked.clear()
        run(models, inputs, tmp_path / "out", **changes)
        assert asked == again, changes
    make_jsonl(Path(inputs[0]), 13)
    asked.clear()
    assert run(models, inputs, tmp_path / "out").models[0].tasks[0].items == 13 and asked.count("answers") == 2


def test_an_interrupted_evaluation_continues(models, inputs, tmp_path, monkeypatch):
    whole = run(models, inputs, tmp_path / "whole")
    real, calls = stage.score_text, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(stage, "score_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(models, inputs, tmp_path / "out")
    assert not (tmp_path / "out" / "evaluation.json").exists()
    kept = (tmp_path / "out" / "items" / "dense" / "q.jsonl").stat().st_mtime_ns
    assert run(models, inputs, tmp_path / "out") == whole
    assert (tmp_path / "out" / "items" / "dense" / "q.jsonl").stat().st_mtime_ns == kept


def test_items_and_score_are_of_one_run_wherever_another_ends(models, inputs, tmp_path, monkeypatch):
    whole = run(models, inputs, tmp_path / "out")
    with monkeypatch.context() as patched:  # after the items of a shorter run, before its score
        patched.setattr(stage.Kept, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(models, inputs, tmp_path / "out", limit=4)
    assert run(models, inputs, tmp_path / "out") == whole
    assert len(read_items(tmp_path / "out" / "items" / "dense" / "q.jsonl")["q"]) == 12


def test_writing_and_speed_are_kept_too(models, inputs, tmp_path, monkeypatch):
    asked = []
    for name in ("write", "timings", "process_peak"):
        real = getattr(stage, name)
        monkeypatch.setattr(stage, name, lambda *a, name=name, real=real, **k: asked.append(name) or real(*a, **k))
    rows = [{"id": number, "query": f"the {number}", "answer": ["old", "red boat"]} for number in range(3)]
    (tmp_path / "w.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = (inputs[0], str(tmp_path / "w.jsonl"))
    first = run(models, inputs, tmp_path / "out", tasks=both, samples=True, speed=True)
    assert asked == ["write"] * 4 + ["timings"] + ["process_peak"] * 2
    asked.clear()
    assert run(models, inputs, tmp_path / "out", tasks=both, samples=True, speed=True) == first and not asked
    dense, other = first.models
    assert dense.writing.samples == len(dense.written) == len(bundled_openings())
    assert dense.timings[0].decode_ratio is None and other.timings[0].decode_ratio > 0 and other.size.peak
    assert dense.flips is None and other.flips[0].task == "w" and other.flips[0].items == 3
    assert dense.task("w").metric == "exact match" and set(dense.task("w").others) == {"rouge1", "rouge2", "rougeL"}
    assert [one.task for one in other.stability] == ["q"]
    lines = (tmp_path / "out" / "items" / "other" / "w.jsonl").read_text().splitlines()
    assert [json.loads(line)["answers"] for line in lines] == [["old", "red boat"]] * 3
    assert read_items(tmp_path / "out" / "items" / "other").keys() == {"q"}, "what is written has no PPL"


def test_with_nothing_asked_the_suite_quick_is_and_lets_models_write_and_times_them(models, tmp_path):
    found = run(models, ((), ()), tmp_path / "out", limit=2)
    assert {task.task for task in found.models[0].tasks} == {"quick-continuation", "quick-facts", "quick-grammar"}
    assert all(one.writing and one.timings and one.size for one in found.models)


@pytest.mark.parametrize(("block", "stride"), [(16, None), (16, 5), (16, 1), (128, None)])
def test_windows_predict_every_token_but_the_first_once(block, stride):
    ids = list(range(60))
    some = windows(0, ids, block, stride_of(block, stride))
    assert [token for window in some for token in window.ids[-window.new :]] == ids[1:]
    assert all(len(window.ids) <= block and len(window.ids) > window.new for window in some)
    if stride:
        assert all(len(window.ids) == block and window.new <= stride for window in some[1:-1])
    assert [window.ids[0] for window in some] == [number * stride_of(block, stride) for number in range(len(some))]
    assert not windows(0, [7], block, 3)


def test_perplexity_is_that_of_plain_forwards():
    model, tokenizer = tiny.make_model("llama"), tiny.make_tokenizer()
    documents = ["The old man saw é.", "A small red boat, near our quiet harbour, told it all."]
    found = score_text(model, tokenizer, Text("t", "", documents), (128, 127), quiet=True)
    losses = []
    for document in documents:
        ids = torch.tensor([tokenizer(document)["input_ids"]])
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss) * (ids.shape[1] - 1))
    tokens = sum(len(document.encode()) - 1 for document in documents)
    assert found.nats == pytest.approx(sum(losses) / tokens, abs=1e-5) and found.tokens == tokens and found.blocked
    assert found.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / (tokens + 2), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nats))
    residuals = [loss - found.nats * (len(text.encode()) - 1) for loss, text in zip(losses, documents, strict=True)]
    assert found.se == pytest.approx(math.sqrt(2 * sum(one**2 for one in residuals)) / tokens, abs=1e-5)
    assert score_text(model, tokenizer, Text("t", "", documents[:1]), (16, 4), quiet=True).se is None


def test_blocked_perplexity_is_that_of_disjoint_windows():
    model, tokenizer = tiny.make_model("llama"), tiny.make_tokenizer()
    text = "A small red boat, near our quiet harbour, told it all."
    ids, total = torch.tensor([tokenizer(text)["input_ids"]]), 0.0
    for start in range(0, ids.shape[1] - 1, 15):
        some = ids[:, start : start + 16]
        with torch.no_grad():
            total += float(model(some, labels=some).loss) * (some.shape[1] - 1)
    found = score_text(model, tokenizer, Text("t", "", [text]), (16, stride_of(16, None)), quiet=True)
    assert found.nats == pytest.approx(total / (ids.shape[1] - 1), abs=1e-5) and found.blocked


def test_sliding_predicts_each_token_with_its_own_window():
    model, tokenizer = tiny.make_model("llama"), tiny.make_tokenizer()
    text = "A small red boat, near our quiet harbour, told it all."
    ids = tokenizer(text)["input_ids"]
    losses = []
    for place in range(1, len(ids)):
        first = 0 if place < 16 else 4 * ((place - 16) // 4 + 1)  # windows begin at multiples of the stride
        with torch.no_grad():
            log_p = model(torch.tensor([ids[first:place]])).logits[0, -1].log_softmax(-1)
        losses.append(-log_p[ids[place]].item())
    found = score_text(model, tokenizer, Text("t", "", [text]), (16, 4), batch=3, quiet=True)
    assert found.nats == pytest.approx(sum(losses) / len(losses), abs=1e-5) and found.tokens == len(losses)
    assert not found.blocked


def test_tables_name_both_kinds_of_right(models, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    given = ["evaluate", models[1], "--against", models[0], "--tasks", inputs[0], "--text", inputs[1]]
    main([*given, "-o", str(tmp_path / "out"), "--compute", "float32"])
    shown = capsys.readouterr()
    for words in ("accuracy is by summed log-likelihood", "by PPL", "blocked, 128 tokens", "other against dense"):
        assert words in shown.out, words
    assert "dense: q" in shown.err and "dense: q" not in shown.out
    main([*given, "-o", str(tmp_path / "out"), "--compute", "float32", "--json"])
    assert json.loads(capsys.readouterr().out)["models"][1]["stability"][0]["task"] == "q"


@pytest.mark.filterwarnings("ignore")
def test_a_task_of_lm_eval_is_compared_by_choice_alone(models, inputs, tmp_path):
    pytest.importorskip("lm_eval", exc_type=ImportError)
    yaml = make_yaml(tmp_path, Path(inputs[0]))
    found = run(models, inputs, tmp_path / "out", tasks=(inputs[0], str(yaml)), text=())
    for ours, theirs in (one.tasks for one in found.models):
        assert ours.value == theirs.value == theirs.others["acc,none"] and theirs.measure == "choice"
    assert [one.measure for one in found.models[1].stability] == ["whole", "choice"]
    assert run(models, inputs, tmp_path / "out", tasks=(inputs[0], str(yaml)), text=()) == found


def test_a_run_folder_stands_for_its_model(models, inputs, tmp_path):
    shutil.copytree(models[1], tmp_path / "shorter" / "model")
    found = run((models[0], str(tmp_path / "shorter")), inputs, tmp_path / "out", tasks=())
    again = run((models[0], str(tmp_path / "shorter" / "model")), inputs, tmp_path / "again", tasks=())
    assert [one.label for one in found.models] == [one.label for one in again.models] == ["dense", "shorter"]


def test_a_folder_with_code_of_its_own_is_evaluated_when_trusted(models, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(assemble_module, "verify", oracle.check)
    text = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.make_documents(60))
    flags = ["--replace", "ffn", "--custom-code", "--remove", "2", "--tokens", "2k", "--quiet"]
    main(["compress", models[0], "--data", str(text), "-o", str(tmp_path / "shorter"), *flags])
    names = (models[0], str(tmp_path / "shorter"))
    request = Request(models=names[1:], against=names[0], tasks=inputs[0])
    found = evaluate(request, Runtime(output=tmp_path / "out", quiet=True, trust_remote_code=True))
    assert [one.label for one in found.models] == ["dense", "shorter"] and found.models[1].stability


def test_one_evaluation_at_a_time_works_in_a_folder(models, inputs, tmp_path):
    with run_lock(tmp_path / "out"), pytest.raises(UserError, match="is in use by another run"):
        run(models, inputs, tmp_path / "out", text=())
    assert not (tmp_path / "out").exists()
    assert run(models, inputs, tmp_path / "out", text=())
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def refused(capsys, words: str, *arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *arguments])
    shown = capsys.readouterr()
    last = shown.err.strip().splitlines()[-1]
    assert stop.value.code == 2 and not shown.out and last.startswith("error: ") and re.search(words, last), last


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("-o out", "no MODEL was given"),
        ("--tasks Q", "no MODEL was given"),
        ("MODEL --tasks Q", "no output folder was given"),
        ("MODEL --tasks nothing.jsonl -o out", "nothing.jsonl is no file here"),
        ("MODEL --tasks nothing.yaml -o out", "nothing.yaml is no file here|needs lm-eval"),
        ("MODEL --tasks TEXT -o out", "line 1, has no id and no query"),
        ("MODEL --tasks Q --tasks full/q.jsonl -o out", "are named q"),
        ("MODEL --text Q -o out", "line 1, has no 'text'"),
        ("MODEL --text nothing.txt -o out", "nothing.txt is no .txt or .jsonl file"),
        ("MODEL --tasks Q --block 500 -o out", "--block 500 is longer than the context"),
        ("MODEL --tasks Q --stride 128 -o out", "--stride 128 leaves gaps"),
        ("MODEL --tasks Q --batch 0 -o out", "--batch was given"),
        ("MODEL --tasks Q -o full", "holds other things than an evaluation"),
        ("nosuch/model --tasks Q -o out", "neither a folder here nor a model"),
        ("bundled --against MODEL --tasks Q -o out", "bundled has another tokenizer than"),
        ("MODEL --against MODEL/. --tasks Q -o out", "two of the models are the same"),
        ("CODED --tasks Q -o out", "carries code of its own; .* --trust-remote-code"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_weights_are_loaded(
    models, inputs, tmp_path, capsys, monkeypatch, given, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llm_streamline.checkpoint.load_model", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "else").write_text("")
    shutil.copy(inputs[0], tmp_path / "full")
    coded = shutil.copytree(models[0], tmp_path / "coded")
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "model_type": "streamlined_llama"}))
    names = {"MODEL": models[0], "Q": inputs[0], "TEXT": inputs[1], "CODED": str(coded)}
    refused(capsys, words, *(re.sub("MODEL|CODED|TEXT|Q", lambda m: names[m[0]], one) for one in given.split()))
    assert not (tmp_path / "out").exists()


def test_texts_are_read_in_order_and_whole(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": " "}\n{"text": "two"}\n{"text": "three"}\n')
    assert read_text(tmp_path / "a.txt").documents == ["one\n\ntwo\n"]
    assert read_text(tmp_path / "b.jsonl", 2).documents == ["one", "two"]
    (tmp_path / "c.txt").write_bytes(b"\xe9\xff")
    with pytest.raises(UserError, match="cannot be read"):
        read_text(tmp_path / "c.txt")
    (tmp_path / "c.txt").write_text(" ")
    with pytest.raises(UserError, match="holds no text"):
        read_text(tmp_path / "c.txt")


def test_a_model_that_gives_no_number_is_named(inputs, tmp_path):
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "broken")
    tiny.make_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match=r"broken gives no number for question '0' of q \(NaN"):
        run((None, str(tmp_path / "broken")), inputs, tmp_path / "out")


def test_a_task_without_items_of_one_model_is_compared_by_nobody(models, inputs, tmp_path):
    found = run(models, inputs, tmp_path / "out").models
    bare = found[1].tasks[0].model_copy(update={"measure": None, "metric": "acc,none"})
    shutil.rmtree(tmp_path / "out" / "items" / "other")
    one = compared([found[0], found[1].model_copy(update={"tasks": [bare]})], "dense", tmp_path / "out")[1]
    assert one.stability is None


def test_the_current_folder_and_the_one_above_have_their_own_names(models, monkeypatch):
    inner = Path(models[0]) / "inner"
    inner.mkdir(exist_ok=True)
    for place, name in ((models[0], "."), (inner, "..")):
        monkeypatch.chdir(place)
        assert Subject(name, Runtime(quiet=True)).label == "dense"
