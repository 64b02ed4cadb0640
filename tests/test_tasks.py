"""lm-eval's tasks, and our own scoring of the same questions beside them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llm_streamline.checkpoint import Source, context_length, load_config, load_model, load_tokenizer
from llm_streamline.errors import UserError
from llm_streamline.scoring.items import sample_item
from llm_streamline.scoring.questions import answers, encode, read_questions
from llm_streamline.scoring.samples import written_samples
from llm_streamline.scoring.writing import rouge
from tests import tiny

YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
{more}
"""
METRICS = "metric_list: [{metric: acc}]"


def make_yaml(folder: Path, questions: Path, name: str = "same", kind: str = "multiple_choice", more: str = METRICS):
    file = folder / f"{name}.yaml"
    file.write_text(YAML.format(name=name, file=questions, cache=folder / "cache", kind=kind, more=more))
    return file


def make_jsonl(path: Path, count: int = 24) -> Path:
    draw = random.Random(0)
    rows = [
        {
            "id": number,
            "query": text[: draw.randint(15, 140)].rstrip(),
            "choices": [" ".join(draw.choices(tiny.WORDS, k=draw.randint(1, 6))) for _ in range(4)],
            "gold": draw.randrange(4),
        }
        for number, text in enumerate(tiny.make_documents(count))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def agree(model, tokenizer, jsonl: Path, folder: Path, limit: int | None = None) -> float:
    """Ours and lm-eval's answers to the same questions are the same, item by item; their accuracy."""
    from llm_streamline.scoring.tasks import open_harness

    questions = read_questions(jsonl)[:limit]
    ours = answers(model, questions, encode(tokenizer, questions, context_length(model.config)), "same", quiet=True)
    (task,) = open_harness(str(make_yaml(folder, jsonl)))
    theirs = by_harness(model, tokenizer, task, limit)
    assert theirs.count == len(theirs.items) == len(ours)
    for one, other in zip(ours, theirs.items, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-3)
        assert one.likeliest_right == other.likeliest_right and one.gold == other.gold
    share = sum(item.likeliest_right for item in ours) / len(ours)
    assert theirs.metrics["acc,none"][0] == pytest.approx(share, abs=1e-12)
    return share


def by_harness(model, tokenizer, task, limit: int | None = None):
    """The task's answers by a model that is loaded."""
    from llm_streamline.scoring.backend import language_model
    from llm_streamline.scoring.tasks import run_harness

    one = SimpleNamespace(model=model, tokenizer=tokenizer, context=context_length(model.config))
    return run_harness(language_model(one, "hf", 4), tokenizer, task, limit)


@pytest.fixture
def harness():
    """lm-eval where it is installed; what it warns of is not ours."""
    pytest.importorskip("lm_eval", exc_type=ImportError)


@pytest.mark.filterwarnings("ignore")
def test_questions_are_answered_as_lm_eval_does(tmp_path, harness):
    jsonl = make_jsonl(tmp_path / "q.jsonl")  # some are longer than the context, and cut
    model, tokenizer = tiny.make_model("llama"), tiny.make_tokenizer()
    questions = read_questions(jsonl)
    assert any(row.cut for rows in encode(tokenizer, questions, tiny.CONTEXT) for row in rows)
    assert 0 < agree(model, tokenizer, jsonl, tmp_path) < 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_questions_are_answered_as_lm_eval_does_by_a_model_that_knows(tmp_path, shared, harness):
    jsonl = shared / "data" / "tasks" / "continuation.jsonl"
    source = Source(str(shared / "models" / "prose-llama-10m"))
    tokenizer = load_tokenizer(source, load_config(source).vocab_size)
    assert agree(load_model(source, torch.float32), tokenizer, jsonl, tmp_path, limit=100) > 0.4


FREE = """generation_kwargs: {max_gen_toks: 4, until: ['.']}
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "^.(.)"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
metric_list: [{metric: exact_match, ignore_case: true}]"""


@pytest.mark.filterwarnings("ignore")
def test_what_a_model_wrote_is_kept_with_lm_evals_verdict_on_each_item(tmp_path, harness):
    from llm_streamline.scoring.tasks import open_harness

    jsonl = make_jsonl(tmp_path / "q.jsonl", 5)
    yaml = (
        make_yaml(tmp_path, jsonl, "free", "generate_until", FREE).read_text().replace("doc_to_choice: choices\n", "")
    )
    (tmp_path / "free.yaml").write_text(yaml.replace("doc_to_target: gold", "doc_to_target: '{{choices[gold][0]}}'"))
    (task,) = open_harness(str(tmp_path / "free.yaml"))
    model, tokenizer = tiny.make_model("llama"), tiny.make_tokenizer()
    found = by_harness(model, tokenizer, task, 4)
    assert not found.items and found.count == len(found.written) == 4
    for row, one in zip(map(json.loads, jsonl.read_text().splitlines()), found.written, strict=False):
        assert one.prompt == row["query"] and one.answers == [row["choices"][row["gold"]][0]] and one.ended is None
        assert one.text == greedy(model, tokenizer, row["query"], 4) and one.tokens > 0
        taken = one.text[1:2] if len(one.text) > 1 else "[invalid]"
        assert one.figures["exact_match,first"] == float(taken.lower() == one.answers[0].lower()) == one.exact
        assert one.figures["exact_match,whole"] == float(one.text.lower() == one.answers[0].lower())
        assert one.rouge == rouge(one.text, one.answers)
    assert found.metrics["exact_match,first"][0] == sum(one.exact for one in found.written) / 4


def greedy(model, tokenizer, prompt: str, new: int) -> str:
    """What lm-eval gets: the likeliest tokens, up to the end token or the task's stop."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"][:, -(tiny.CONTEXT - new) :]
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).split(".")[0]


@pytest.mark.parametrize(
    ("told", "target", "text", "exact"),
    [
        ({}, "The Boat.", "the boat", True),
        ({}, ["red", "The boat"], "the boat", True),
        ({}, "red", "the boat", False),
        ({"exact_match": 1.0}, "#### 5", "it is 5", True),
        ({"exact_match": 0.0}, "5", "5", False),
    ],
)
def test_a_written_item_is_right_where_lm_eval_says_so_or_else_where_it_reads_the_same(told, target, text, exact):
    pytest.importorskip("rouge_score", exc_type=ImportError)
    row = {"doc_id": 7, "target": target, "arguments": [("Q", {})], "resps": [[text]], "filter": "none"}
    row |= {"metrics": [*told, "f1", "odd"], "f1": (1, 0), "odd": None, **told}
    (one,) = written_samples("t", [row], tiny.make_tokenizer())
    assert one.exact is exact and one.id == "7" and one.tokens == len(text)
    assert one.figures == {"f1,none": [1.0, 0.0], **{f"{key},none": value for key, value in told.items()}}


def test_likelihoods_are_kept_with_what_the_model_would_have_written():
    row = {"doc_id": 0, "target": "x", "filter": "none", "metrics": ["acc"], "acc": True}
    asked = [(("Q", " boat"), (-3.5, True)), (("Q", " red"), (-9.0, False)), (("a whole text",), -70.0)]
    rows = [
        {**row, "doc_id": number, "arguments": [call], "resps": [[answer]]}
        for number, (call, answer) in enumerate(asked)
    ]
    found = written_samples("t", rows, tiny.make_tokenizer())
    assert [one.exact for one in found] == [True, False, None]
    assert [one.answers for one in found] == [[" boat"], [" red"], None]
    assert [one.prompt for one in found] == ["Q", "Q", "a whole text"] and not any(one.text for one in found)
    assert found[0].figures == {"acc,none": 1.0}


@pytest.mark.filterwarnings("ignore")
def test_multiple_choice_that_says_not_which_is_right_keeps_lm_evals_figures_and_says_so(tmp_path, harness, capsys):
    from llm_streamline.scoring.tasks import open_harness

    jsonl = make_jsonl(tmp_path / "q.jsonl", 3)
    rows = [{**json.loads(line), "gold": [0, 1]} for line in jsonl.read_text().splitlines()]
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = open_harness(str(make_yaml(tmp_path, jsonl, "several")))
    found = by_harness(tiny.make_model("llama"), tiny.make_tokenizer(), task)
    assert not found.items and not found.written and found.count == 3 and "acc,none" in found.metrics
    assert "warning: no stability of several, only lm-eval's own figures: task several is no" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_tasks_digest_follows_its_questions(tmp_path, harness):
    from llm_streamline.scoring.tasks import open_harness

    found = set()
    for count in (3, 3, 4):
        file = make_yaml(tmp_path, make_jsonl(tmp_path / f"q{count}.jsonl", count))
        found.add(open_harness(str(file))[0].digest)
    assert len(found) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nosuch.yaml", "nosuch.yaml is no file here"),
        ("nosuchtask", "neither a .jsonl or .yaml file here nor a task of lm-eval"),
        ("bad.yaml", "bad.yaml needs data that could not be fetched .*'nowhere/at-all'"),
        ("worse.yaml", "worse.yaml cannot be loaded by lm-eval"),
    ],
)
def test_tasks_that_are_none_get_one_sentence(tmp_path, monkeypatch, harness, given, words):
    from llm_streamline.scoring.tasks import open_harness

    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("task: bad\noutput_type: multiple_choice\ndataset_path: nowhere/at-all\n")
    (tmp_path / "worse.yaml").write_text("task: [unended\n")
    with pytest.raises(UserError, match=words) as caught:
        open_harness(given)
    assert "\n" not in str(caught.value)


def test_a_missing_lm_eval_is_said_with_what_works_without(monkeypatch):
    from llm_streamline.scoring import tasks

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"install 'llm-streamline\[eval\]', or give questions in a .jsonl"):
        tasks.open_harness("arc_easy")


def test_samples_in_memory_are_as_those_logged():
    texts, scores = (" a", " no"), (-6.0, -9.0)
    row = {"doc_id": 3, "target": 1, "filtered_resps": [(score, False) for score in scores]}
    logged = sample_item(
        "t", {**row, "arguments": {str(i): {"arg_0": "Q", "arg_1": text} for i, text in enumerate(texts)}}, "here"
    )
    assert logged == sample_item("t", {**row, "arguments": [("Q", text) for text in texts]}, "here")
    assert logged.log_likelihoods == [-6.0, -9.0] and logged.choice_bytes == [2, 3]
    assert logged.prediction == "0" and logged.ppl == [3.0, 3.0] and logged.likeliest_right is False
