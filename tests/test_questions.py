"""Questions: what is refused, and each choice's likelihood against one plain forward."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from llm_streamline.errors import UserError
from llm_streamline.scoring.evaluator import task_score
from llm_streamline.scoring.items import read_items
from llm_streamline.scoring.perplexity import batches, token_losses
from llm_streamline.scoring.questions import Question, answers, encode, read_questions
from tests import tiny

GOOD = {"id": 0, "query": "The boat is", "choices": ["red", "small"], "gold": 1}


def make_questions(count: int = 7) -> list[Question]:
    """Queries and choices of all lengths, two to four choices, spaces on either side."""
    texts = tiny.make_documents(count, words=12)
    return [
        Question(
            f"q{number}",
            text[: 20 + 4 * number] + ("  " if number == 3 else ""),
            tuple(" old harbour"[number % 2 :][: 3 + 2 * place] for place in range(2 + number % 3)),
            number % 2,
        )
        for number, text in enumerate(texts)
    ]


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral"])
def model(request) -> torch.nn.Module:
    return tiny.make_model(request.param)


def plain(model: torch.nn.Module, query: str, continuation: str) -> tuple[float, float]:
    """Mean loss of the whole and summed log-likelihood of the choice, by one forward and a loop."""
    tokenizer = tiny.make_tokenizer()
    ids = tokenizer(query + continuation)["input_ids"]
    start = len(tokenizer(query.rstrip())["input_ids"])
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    of = [log_p[place - 1, ids[place]].item() for place in range(1, len(ids))]
    return -sum(of) / len(of), sum(of[start - 1 :])


def test_batched_answers_are_those_of_one_plain_forward_each(model):
    questions = make_questions()
    rows = encode(tiny.make_tokenizer(), questions, tiny.CONTEXT)
    items = answers(model, questions, rows, "t", batch=5, quiet=True)
    for question, item in zip(questions, items, strict=True):
        whole, choice = zip(*(plain(model, question.query, text) for text in question.continuations()), strict=True)
        assert item.ppl == pytest.approx(whole, abs=1e-5)
        assert item.log_likelihoods == pytest.approx(choice, abs=2e-5)
        assert item.prediction == str(whole.index(min(whole))) and item.measure == "whole"
        assert item.likeliest_right == (choice.index(max(choice)) == question.gold)


def test_the_batch_changes_no_number(model):
    questions = make_questions(9)
    rows = encode(tiny.make_tokenizer(), questions, tiny.CONTEXT)
    alone = answers(model, questions, rows, "t", batch=1, quiet=True)
    for batch in (2, 7, 100, None):
        for one, other in zip(alone, answers(model, questions, rows, "t", batch, quiet=True), strict=True):
            assert other.ppl == pytest.approx(one.ppl, abs=1e-5)
            assert other.log_likelihoods == pytest.approx(one.log_likelihoods, abs=1e-5)


def test_batches_hold_every_row_once_the_longest_first():
    lengths = [3, 900, 5, 1200, 2]
    assert list(batches(lengths, 2)) == [[3, 1], [2, 0], [4]]
    assert list(batches(lengths, None)) == [[3], [1, 2], [0, 4]]


def test_what_is_kept_of_every_row_lies_in_one_tensor(model):
    kept = token_losses(model, [[1, 2, 3], [4, 7, 8, 9], [5, 6]], 1, lambda done: None)
    assert [len(one) for one in kept] == [2, 3, 1]
    assert len({one.untyped_storage().data_ptr() for one in kept}) == 1, "else thousands tear the heap"


def test_the_two_measures_are_of_different_texts_and_may_differ():
    """Right by PPL and wrong by likelihood, or the reverse: accuracy counts the latter."""
    questions = make_questions(9)
    model, tokenizer = tiny.make_model("llama"), tiny.make_tokenizer()
    items = answers(model, questions, encode(tokenizer, questions, tiny.CONTEXT), "t", quiet=True)
    assert any(item.right != item.likeliest_right for item in items)
    score = task_score(items)
    assert score.value == sum(item.likeliest_right for item in items) / len(items)
    assert score.right_by_ppl == sum(item.right for item in items) / len(items)


def test_one_space_joins_a_choice_to_its_query():
    assert Question("a", "It is", ("red", " small"), 0).continuations() == [" red", " small"]
    assert Question("a", "It is\n", ("red", " small"), 0).continuations() == ["red", " small"]
    (rows,) = encode(tiny.make_tokenizer(), [Question("a", "It is \n", ("red", " small"), 0)], tiny.CONTEXT)
    assert [row.choice for row in rows] == [5, 8], "whitespace at the query's end belongs to the choice"


def test_the_first_special_token_is_given_once():
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor() if hasattr(tokenizer, "update_post_processor") else None
    for query in ("It is", "<s>It is"):
        ((row, _),) = encode(tokenizer, [Question("a", query, ("red", "small"), 0)], tiny.CONTEXT)
        assert row.ids.count(tokenizer.bos_token_id) == 1 and row.ids[0] == tokenizer.bos_token_id and row.choice == 4


def test_what_exceeds_the_context_is_cut_in_front_and_counted():
    question = Question("long", "a" * 200, ("red", "small boat"), 0)
    (rows,) = encode(tiny.make_tokenizer(), [question], 50)
    assert [len(row.ids) for row in rows] == [51, 51] and [row.cut for row in rows] == [153, 160]
    assert [row.choice for row in rows] == [4, 11]
    (item,) = answers(tiny.make_model("llama"), [question], [rows], "t", quiet=True)
    kept, _ = plain(tiny.make_model("llama"), "a" * 47, " red")
    assert item.ppl[0] == pytest.approx(kept, abs=1e-5)
    with pytest.raises(UserError, match="question 'long' has a choice that is longer than the model's context of 9"):
        encode(tiny.make_tokenizer(), [question], 9)


def write(path: Path, *rows: object) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_items_are_read_back_with_both_measures(tmp_path):
    questions = read_questions(write(tmp_path / "t.jsonl", GOOD, "", {**GOOD, "id": "x"}))
    assert [question.id for question in questions] == ["0", "x"]
    rows = encode(tiny.make_tokenizer(), questions, tiny.CONTEXT)
    items = answers(tiny.make_model("llama"), questions, rows, "t", quiet=True)
    assert items[0].choice_bytes == [4, 6]
    write(tmp_path / "items.jsonl", *(item.model_dump_json() for item in items))
    back = read_items(tmp_path / "items.jsonl")["t"]
    assert list(back.values()) == items and all(math.isfinite(value) for value in back["0"].log_likelihoods)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"id": ', "line 2, is not JSON"),
        ("[1]", "line 2, has no id and no query"),
        ({**GOOD, "id": None}, "line 2, has no id;"),
        ({"id": 1, "query": "q"}, "line 2, has no choices and no gold"),
        ({**GOOD, "id": 1, "query": " "}, "line 2, has a query that is no text"),
        ({**GOOD, "id": 1, "choices": ["red"]}, "line 2, has fewer than two choices"),
        ({**GOOD, "id": 1, "choices": "red"}, "line 2, has fewer than two choices"),
        ({**GOOD, "id": 1, "choices": ["red", " "]}, "line 2, has a choice that is empty"),
        ({**GOOD, "id": 1, "choices": ["red", 3]}, "line 2, has a choice that is empty or no text"),
        ({**GOOD, "id": 1, "gold": 2}, "line 2, has gold 2 and 2 choices; .* 0 to 1"),
        ({**GOOD, "id": 1, "gold": -1}, "line 2, has gold -1"),
        ({**GOOD, "id": 1, "gold": "1"}, "line 2, has gold '1'"),
        ({**GOOD, "id": "0"}, "line 2, has the id '0' of line 1"),
    ],
)
def test_broken_questions_are_one_sentence_with_the_line(tmp_path, row, words):
    with pytest.raises(UserError, match=words) as caught:
        read_questions(write(tmp_path / "t.jsonl", GOOD, row))
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "}."))


def test_files_without_questions_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no questions"):
        read_questions(write(tmp_path / "t.jsonl", ""))
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(tmp_path / "nowhere.jsonl")


def test_a_line_ends_at_a_line_feed_only(tmp_path):
    row = {"id": 0, "query": "one\u2028two", "choices": ["a", "b"], "gold": 0}
    (tmp_path / "q.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [question.query for question in read_questions(tmp_path / "q.jsonl")] == ["one\u2028two"]
