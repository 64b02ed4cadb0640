from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from llm_streamline.checkpoint import check_ids
from llm_streamline.errors import UserError
from llm_streamline.packing import Packer
from llm_streamline.recipe import Recipe
from llm_streamline.text import block_length, read_parts
from tests import tiny

BLOCK = 32


def recipe(*data, **changes) -> Recipe:
    small = {"calibration_tokens": 320, "validation_tokens": 320, "tokens": 1000, "block": BLOCK}
    return Recipe(model="m", data=tuple(map(str, data)), **{**small, **changes})


def read(*data, **changes):
    return read_parts(recipe(*data, **changes), tiny.make_tokenizer(), tiny.CONTEXT, quiet=True)


def numbers(part: torch.Tensor) -> set[str]:
    """Which numbered documents begin in a part."""
    text = tiny.make_tokenizer().decode(part.flatten()).split("</s>")
    return {piece.split(":")[0] for piece in text if ":" in piece[:6]}


def test_parts_are_full_disjoint_and_seeded(text_file):
    parts, again, other = read(text_file), read(text_file), read(text_file, seed=1)
    assert parts.validation.shape == parts.calibration.shape == (10, BLOCK)
    assert parts.training.shape == (31, BLOCK)
    found = [numbers(part) for part in (parts.calibration, parts.training, parts.validation)]
    assert all(found) and not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    assert parts.summary() == again.summary() != other.summary()
    assert torch.equal(parts.training, again.training) and not torch.equal(parts.training, other.training)


def test_a_bigger_budget_leaves_calibration_and_validation_alone(text_file):
    few, many = read(text_file), read(text_file, tokens=5000)
    assert few.summary()["calibration"] == many.summary()["calibration"]
    assert few.summary()["validation"] == many.summary()["validation"]


def test_documents_follow_one_another_and_end_with_the_end_token(tmp_path):
    file = tiny.write_jsonl(tmp_path / "t.jsonl", [f"document {n:02}" for n in range(99)])
    parts = read(file, block=12, calibration_tokens=120, validation_tokens=24, tokens=120)
    end = tiny.make_tokenizer().eos_token_id
    assert (parts.training[:, 11] == end).all() and (parts.training[:, :11] != end).all()


def test_one_long_document_serves_all_parts_with_a_gap_between(tmp_path):
    words = " ".join(f"{n:05}" for n in range(1500))
    parts = read(tiny.write_jsonl(tmp_path / "t.jsonl", [words]), tokens=2000)
    tokenizer = tiny.make_tokenizer()
    found = [
        {word for word in tokenizer.decode(part.flatten()).replace("</s>", " ").split() if len(word) == 5}
        for part in (parts.validation, parts.calibration, parts.training)
    ]
    for first, second in pairwise(found):
        assert int(min(second)) - int(max(first)) > BLOCK // len("00000 ")
    ends = sum(
        int((part == tokenizer.eos_token_id).sum()) for part in (parts.validation, parts.calibration, parts.training)
    )
    assert ends == 1, "after its beginning it is not cut again, as no other document follows"


def owners(part: torch.Tensor, letters: str) -> Counter[str]:
    """How many characters of documents that are one letter over and over are in a part."""
    counts = Counter(tiny.make_tokenizer().decode(part.flatten()))
    return Counter({letter: counts[letter] for letter in letters if counts[letter]})


def test_a_book_is_not_all_that_is_read(tmp_path):
    documents = ["a " * 20_000, "b " * 20_000, *(f"c {n} " + "d " * 20 for n in range(3000))]
    file = tiny.write_jsonl(tmp_path / "t.jsonl", documents)
    for seed in range(3):
        parts = read(file, tokens=64 * 4 * BLOCK, seed=seed)
        for part, most in ((parts.training, 4), (parts.calibration, 2), (parts.validation, 2)):
            found = owners(part, "abd")
            assert found["d"] > 0.5 * part.numel() / 2 and max(found["a"], found["b"]) <= most * BLOCK


def test_where_there_are_but_books_they_are_read_in_turns(tmp_path):
    file = tiny.write_jsonl(tmp_path / "t.jsonl", [f"{letter} " * 3000 for letter in "abcd"])
    parts = read(file, tokens=64 * BLOCK)
    found = owners(parts.training, "abcd")
    assert len(found) == 4 and max(found.values()) < 1.5 * min(found.values())
    whole = read(file, tokens=None)
    every = sum(part.numel() for part in (whole.training, whole.calibration, whole.validation))
    assert every > 0.95 * sum(map(len, _ids(file))), "but for a block between parts nothing is lost"


def test_a_document_is_counted_once_in_a_part():
    packer = Packer(BLOCK, {"validation": 4, "training": 20})
    for length in (10 * BLOCK, 9 * BLOCK, 8 * BLOCK):
        packer.add(np.arange(length, dtype=np.int32))
    packer.add_rests()
    assert packer.full and [len(packer.blocks(part)) for part in ("validation", "training")] == [4, 20]
    assert [packer.documents(part) for part in ("validation", "training")] == [2, 3]


def _ids(file) -> list[list[int]]:
    return [tiny.make_tokenizer().encode(json.loads(line)["text"]) for line in file.read_text().splitlines()]


def test_a_hub_data_set_is_streamed(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    tiny.write_jsonl(folder / "train.jsonl", tiny.make_documents(300))
    parts = read(f"hub:{folder}:train")
    assert parts.training.shape == (31, BLOCK)
    with pytest.raises(UserError, match="cannot be read"):
        read(f"hub:{folder}:nosuchsplit")


def test_the_default_block_is_the_context_and_2048_at_most():
    assert block_length(Recipe(model="m"), 128) == 128
    assert block_length(Recipe(model="m"), 8192) == 2048
    assert block_length(Recipe(model="m", block=4096), 8192) == 4096
    with pytest.raises(UserError, match="--block 256 is longer than the model's context of 128"):
        block_length(Recipe(model="m", block=256), 128)


def test_less_text_than_the_default_budget_is_taken_as_it_is(text_file):
    parts = read(text_file, tokens=None)
    assert 80_000 < parts.training.numel() < 110_000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.jsonl", b"\n\n", "is empty"),
        ("binary.txt", b"text\0more", "is binary"),
        ("latin.txt", "caf\u00e9".encode("latin-1") * 9, "is not UTF-8 at byte 3"),
        ("bad.jsonl", b'{"text": "a"\n', "is not JSON"),
        ("list.jsonl", b"[1]\n", "is no JSON object"),
        ("field.jsonl", b'{"words": "a", "id": 3}\n', "has no text in 'text' or 'content'.*its fields are id, words"),
        ("table.csv", b"a,b\n", "ends in '.csv'"),
        ("short.txt", b"a few words", "blocks of 32 tokens for"),
    ],
)
def test_unusable_text_is_refused_in_a_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read(tmp_path / name)


def test_missing_files_data_and_tokens_are_refused(text_file, tmp_path):
    with pytest.raises(UserError, match="is no file here"):
        read(tmp_path / "nothing.txt")
    with pytest.raises(UserError, match=r"no --data was given.*--data bundled"):
        read()
    with pytest.raises(UserError, match="--tokens 900000 is more than the"):
        read(text_file, tokens=900_000)
    with pytest.raises(UserError, match="has no text in 'story'"):
        read(text_file, field="story")


def test_ids_past_the_embeddings_are_refused():
    check_ids(torch.tensor([0, 9]), vocabulary=10)
    with pytest.raises(UserError, match="makes ids up to 10 but the model embeds 10"):
        check_ids(torch.tensor([0, 10]), vocabulary=10)


def test_copies_in_other_files_are_left_out(tmp_path):
    documents = tiny.make_documents(60)
    tiny.write_jsonl(tmp_path / "a.jsonl", documents)
    tiny.write_jsonl(tmp_path / "b.jsonl", documents[30:] + tiny.make_documents(70)[60:], field="content")
    parts = read(tmp_path, tokens=None)
    text = tiny.make_tokenizer().decode(torch.cat([parts.validation, parts.calibration, parts.training]).flatten())
    found = [piece.split(":")[0] for piece in text.split("</s>") if ":" in piece[:6]]
    assert len(found) == len(set(found)) > 50


def test_parquet_gives_blocks_as_lines_do(tmp_path):
    pq.write_table(pyarrow.table({"text": tiny.make_documents(300)}), tmp_path / "t.parquet", row_group_size=50)
    parts, again, other = (read(tmp_path / "t.parquet", seed=seed) for seed in (0, 0, 1))
    assert parts.training.shape == (31, BLOCK) and parts.summary() == again.summary() != other.summary()


@pytest.mark.parametrize("template", ["{{ m.content }}", "<s>{{ m.role }} {{ m.content }}</s>\n"])
def test_a_chat_gets_its_templates_special_tokens_and_an_end_once(tmp_path, template):
    chats = [[{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": f"{n}!"}] for n in range(400)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"conversations": chat}) for chat in chats))
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ids = read_parts(recipe(tmp_path / "t.jsonl"), tokenizer, tiny.CONTEXT, quiet=True).training.flatten().tolist()
    text = tokenizer.decode(ids)
    assert ids.count(2) > 20 and "</s></s>" not in text.replace("\n", "") and "<s><s>" not in text
    assert ("<s>user" in text) == ("<s>" in template) == ("<s>" in text)
