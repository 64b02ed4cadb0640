"""What models write: greedy, alike in any batch, scored by hand; and files of questions to be answered in writing."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GenerationConfig

from llm_streamline.errors import UserError
from llm_streamline.evaluation import Written
from llm_streamline.scoring.given import Prompts, open_jsonl
from llm_streamline.scoring.prompts import Prompt, bundled_openings, own_openings
from llm_streamline.scoring.writing import compare_written, plain, repetition, rouge, summarize, write
from tests import tiny

PROMPTS = [Prompt(str(number), " ".join(f"w{number + k}" for k in range(2 + 3 * number))) for number in range(5)]


@pytest.fixture(scope="module")
def model():
    return tiny.make_model("llama").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


def written(exact=None, ended=False, tokens=20, repeated=0.0, **more):
    common = {"task": "t", "id": "0", "prompt": "p", "text": "x"}
    return Written(**{**common, "tokens": tokens, "ended": ended, "repeated": repeated, "exact": exact, **more})


def by_hand(model, ids, new):
    for _ in range(new):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids = [*ids, token]
    return ids[-new:]


def test_writing_is_greedy_alike_in_any_batch_and_blind_to_the_checkpoints_settings(model, tokenizer):
    model.generation_config = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=3.0, eos_token_id=1)
    together = write(model, tokenizer, PROMPTS, "t", (64, 12), quiet=True)
    assert together == write(model, tokenizer, PROMPTS, "t", (64, 12), batch=1, quiet=True)
    assert model.generation_config.repetition_penalty == 3.0
    for prompt, one in zip(PROMPTS, together, strict=True):
        ids = by_hand(model, tokenizer.encode(prompt.text), 12)
        assert one.text == tokenizer.decode(ids[: one.tokens], skip_special_tokens=True)
        assert one.ended == (1 in ids)


def test_a_text_stops_at_its_end_token_which_is_not_counted(model, tokenizer):
    ids = by_hand(model, tokenizer.encode(PROMPTS[0].text), 12)
    model.generation_config = GenerationConfig(eos_token_id=ids[5])
    (one,) = write(model, tokenizer, PROMPTS[:1], "t", (64, 12), quiet=True)
    assert one.ended and one.tokens == ids.index(ids[5])
    model.generation_config = GenerationConfig(eos_token_id=[ids[3], 1])
    assert write(model, tokenizer, PROMPTS[:1], "t", (64, 12), quiet=True)[0].tokens == ids.index(ids[3])


def test_a_prompt_longer_than_the_context_is_cut_at_the_front(model, tokenizer):
    model.generation_config = GenerationConfig(eos_token_id=1)
    long = Prompt("0", " ".join(f"w{number % 50}" for number in range(200)))
    (one,) = write(model, tokenizer, [long], "t", (64, 12), quiet=True)
    ids = by_hand(model, tokenizer.encode(long.text)[-52:], 12)
    assert one.text == tokenizer.decode(ids[: one.tokens], skip_special_tokens=True)


def test_an_answer_is_its_first_line_and_exact_but_for_case_and_edges(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "decode", lambda *a, **k: "\n  The Moon.\nand more")
    asked = [Prompt("0", "w1", ("the moon",)), Prompt("1", "w1", ("the sun", "moon")), Prompt("2", "w1")]
    right, wrong, sample = write(model, tokenizer, asked, "t", (64, 4), quiet=True)
    assert (right.text, right.exact, right.ended) == ("The Moon.", True, True)
    assert right.rouge == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert wrong.exact is False
    assert wrong.rouge == pytest.approx({"rouge1": 2 / 3, "rouge2": 0.0, "rougeL": 2 / 3})
    assert sample.exact is None and sample.text == "\n  The Moon.\nand more"


def test_repetition_by_hand():
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1, 2, 1, 2, 1, 2, 1, 2]) == pytest.approx(1 - 2 / 5)
    assert repetition([7] * 23) == pytest.approx(1 - 1 / 20)


def test_plain_answers():
    assert plain("  “The  Moon!” ") == "the moon"
    assert plain("3.5") == "3.5" and plain("-") == "-"


def test_rouge_of_scripts_without_spaces():
    same = {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert rouge("天气很好", ["天气很好"]) == same == rouge("Süße Äpfel", ["süße äpfel"])
    assert rouge("天气不好", ["天气很好"])["rouge1"] == pytest.approx(0.75)
    assert rouge("cats run", ["the cat runs"])["rouge1"] == pytest.approx(0.8), "stems, where letters are plain"


def test_a_summary_counts_loops_early_and_missing_ends():
    samples = [
        written(repeated=0.9),
        written(ended=True, tokens=3),
        written(ended=True, tokens=30, repeated=0.1),
        written(tokens=2),
    ]
    found = summarize(samples)
    assert (found.samples, found.tokens) == (4, 55)
    assert (found.looping, found.early, found.unended) == (0.25, 0.25, 0.5)
    assert found.repeated == pytest.approx(0.25)


def test_flips_of_written_tasks_by_hand():
    before = [written(exact=one) for one in (True, True, True, False, False)]
    after = [written(exact=one) for one in (True, False, False, True, False)]
    found = compare_written(before, after)
    assert (found.both, found.lost, found.gained, found.neither) == (1, 2, 1, 1)
    assert found.flips == pytest.approx(0.6) and found.mcnemar_p == 1.0
    assert found.difference_interval[0] < -0.2 < found.difference_interval[1]
    worse = compare_written([written(exact=True)] * 20, [written(exact=bool(n % 2)) for n in range(20)])
    assert -1 <= worse.difference_interval[0] < -0.5 < worse.difference_interval[1] < 0 and worse.mcnemar_p < 0.01


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"id": 1, "query": "q", "answer": ""}, "empty"),
        ({"id": 1, "query": "q", "answer": ["a", 3]}, "no text"),
        ({"id": 1, "query": "  ", "answer": "a"}, "no query"),
        ({"query": "q", "answer": "a"}, "no id"),
        ({"id": 0, "query": "q", "answer": "a"}, "again"),
        (["no object"], "no id or no query"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path, line, words):
    file = tmp_path / "written.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [{"id": 0, "query": "q", "answer": "a"}, line]))
    with pytest.raises(UserError, match="line 2,") as error:
        open_jsonl(file, None)
    assert words in str(error.value)


def test_a_file_with_answers_is_a_written_task(tmp_path):
    file = tmp_path / "written.jsonl"
    rows = [{"id": 0, "query": "q", "answer": "a"}, {"id": 1, "query": "r", "answer": ["b", "c"]}]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    found = open_jsonl(file, None)
    assert isinstance(found, Prompts)
    assert found.prompts == [Prompt("0", "q", ("a",)), Prompt("1", "r", ("b", "c"))]
    assert open_jsonl(file, 1).prompts == found.prompts[:1]


def test_openings(tokenizer):
    assert all(prompt.text.strip() and prompt.answers is None for prompt in bundled_openings())
    blocks = torch.arange(60).view(6, 10) + 70
    found = own_openings(blocks, tokenizer, 3, 4)
    assert [prompt.id for prompt in found] == ["0", "2", "4"]
    assert found[1].text == tokenizer.decode(blocks[2, :4].tolist(), skip_special_tokens=True)


@pytest.mark.parametrize(("one", "other"), [("-4", "4"), (".5", "5"), ("???", ""), ("+", "-")])
def test_a_number_keeps_its_sign_and_signs_alone_are_an_answer(one, other):
    assert plain(one) != plain(other)
    assert plain(f"({one})") == plain(one) or not one[-1].isdigit()
