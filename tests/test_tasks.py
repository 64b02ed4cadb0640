"""lm-eval's tasks, and our own scoring of the same questions beside them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from llm_streamline.checkpoint import Source, context_length, load_config, load_model, load_tokenizer
from llm_streamline.errors import UserError
from llm_streamline.scoring.items import sample_item
from llm_streamline.scoring.questions import answers, encode, read_questions
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
    from llm_streamline.scoring.tasks import open_harness, run_harness

    questions = read_questions(jsonl)[:limit]
    ours = answers(model, questions, encode(tokenizer, questions, context_length(model.config)), "same", quiet=True)
    (task,) = open_harness(str(make_yaml(folder, jsonl)))
    theirs = run_harness(model, tokenizer, task, limit, batch=4)
    assert theirs.count == len(theirs.items) == len(ours)
    for one, other in zip(ours, theirs.items, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-3)
        assert one.likeliest_right == other.likeliest_right and one.gold == other.gold
    share = sum(item.likeliest_right for item in ours) / len(ours)
    assert theirs.metrics["acc,none"][0] == pytest.approx(share, abs=1e-12)
    return share


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


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_multiple_choice_has_figures_and_no_items(tmp_path, harness):
    from llm_streamline.scoring.tasks import open_harness, run_harness

    more = "generation_kwargs: {max_gen_toks: 3, until: ['.']}\nmetric_list: [{metric: exact_match}]"
    file = make_yaml(tmp_path, make_jsonl(tmp_path / "q.jsonl", 4), "free", "generate_until", more)
    (task,) = open_harness(str(file))
    found = run_harness(tiny.make_model("llama"), tiny.make_tokenizer(), task, 2, None)
    assert not found.items and found.count == 2 and found.metrics["exact_match,none"][0] == 0.0


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
        ("bad.yaml", "bad.yaml cannot be loaded by lm-eval"),
    ],
)
def test_tasks_that_are_none_get_one_sentence(tmp_path, monkeypatch, harness, given, words):
    from llm_streamline.scoring.tasks import open_harness

    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("task: bad\noutput_type: multiple_choice\ndataset_path: nowhere/at-all\n")
    with pytest.raises(UserError, match=words) as caught:
        open_harness(given)
    assert "\n" not in str(caught.value)


def test_a_missing_lm_eval_is_said_with_what_works_without(monkeypatch):
    from llm_streamline.scoring import tasks

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
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
