from __future__ import annotations

import json

import pytest
import torch

from llm_streamline.errors import UserError
from llm_streamline.mixture import SLIMPAJAMA, largest_remainder, parse_mixture, share_out
from llm_streamline.recipe import Recipe
from llm_streamline.text import read_parts
from tests import tiny

BLOCK = 32
WORDS = {"short": 30, "middle": 700, "long": 20_000}  # tokens per document: one letter, one token
ASKED = {"short": 0.5, "middle": 0.2, "long": 0.3}
MIXTURE = "short=0.5,middle=0.2,long=0.3"


def recipe(*data, **changes) -> Recipe:
    small = {"calibration_tokens": 3200, "validation_tokens": 3200, "tokens": 32_000, "block": BLOCK}
    return Recipe(model="m", data=tuple(map(str, data)), **{**small, **changes})


DEFAULTS = {"tokens": None, "calibration_tokens": None, "validation_tokens": None}


def read(*data, quiet=True, **changes):
    return read_parts(recipe(*data, **changes), tiny.make_tokenizer(), tiny.CONTEXT, quiet=quiet)


def document(domain: str, number: int) -> str:
    """Full of a mark of its own: its domain's letter, then its number, over and over."""
    mark = f"{domain[0]}{number:04}/"
    return mark * (WORDS[domain] // len(mark))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    counts = {"short": 3000, "middle": 120, "long": 8, "other": 50}
    rows = [
        {"text": document(name, n) if name in WORDS else "zzz " * 30 + str(n), "meta": {"source": name}}
        for name, count in counts.items()
        for n in range(count)
    ]
    file = tmp_path_factory.mktemp("corpus") / "t.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    counts = {"short": 3000, "middle": 120, "long": 8}
    return {
        name: tiny.write_jsonl(folder / f"{name}.jsonl", [document(name, n) for n in range(count)])
        for name, count in counts.items()
    }


def letters(blocks: torch.Tensor) -> list[str]:
    """Which domain each block is of: its commonest letter among the domains' first ones."""
    texts = tiny.make_tokenizer().batch_decode(blocks)
    return [max("smlz", key=text.count) for text in texts]


def share_of(blocks: torch.Tensor) -> dict[str, float]:
    found = letters(blocks)
    return {name: found.count(name[0]) / len(found) for name in WORDS}


def marks(blocks: torch.Tensor) -> set[str]:
    """The marks of the documents shorter than a block, as far as they lie whole in one."""
    texts = tiny.make_tokenizer().batch_decode(blocks)
    pieces = {piece for text in texts for piece in text.replace("</s>", "/").split("/")[1:-1]}
    return {piece for piece in pieces if len(piece) == 5 and piece[0] == "s"}


def by_mixture(corpus, files, **changes):
    return read(corpus, mixture=MIXTURE, domain="meta.source", **changes)


def by_weights(corpus, files, **changes):
    return read(*(f"{file}@{ASKED[name]}" for name, file in files.items()), **changes)


@pytest.mark.parametrize("way", [by_mixture, by_weights])
def test_shares_are_what_was_asked_whatever_the_documents_lengths(corpus, files, way):
    parts = way(corpus, files)
    for blocks, size in ((parts.training, 1000), (parts.calibration, 100), (parts.validation, 100)):
        assert len(blocks) == size
        for name, share in share_of(blocks).items():
            assert abs(share - ASKED[name]) <= 1 / size, (name, share)
    for name, share in parts.shares.items():
        assert (share.asked, share.tokens) == (ASKED[name.split("/")[-1].split(".")[0]], round(share.got * 32_000))
        assert share.documents
    assert parts.summary()["domains"].keys() == parts.shares.keys()


@pytest.mark.parametrize("way", [by_mixture, by_weights])
def test_one_seed_repeats_and_two_differ(corpus, files, way):
    one, again, other = way(corpus, files), way(corpus, files), way(corpus, files, seed=1)
    assert one.summary() == again.summary()
    for part in ("training", "calibration", "validation"):
        assert one.summary()[part]["sha256"] != other.summary()[part]["sha256"]


@pytest.mark.parametrize("way", [by_mixture, by_weights])
def test_parts_share_no_document(corpus, files, way):
    parts = way(corpus, files)
    found = [marks(blocks) for blocks in (parts.calibration, parts.training, parts.validation)]
    assert all(found) and not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])


def test_a_domain_that_has_its_quotas_is_not_tokenized(corpus):
    tokenizer, seen = tiny.make_tokenizer(), []

    class Counting:
        eos_token_id, chat_template = tokenizer.eos_token_id, None

        def __call__(self, texts, **how):
            seen.extend(texts)
            return tokenizer(texts, **how)

    asked = recipe(corpus, mixture="short=0.01,long=0.99", domain="meta.source")
    read_parts(asked, Counting(), tiny.CONTEXT, quiet=True)
    assert 64 < sum(text[0] == "s" for text in seen) < 250 and not any(text[0] in "mz" for text in seen)


def test_blocks_of_domains_are_interleaved(corpus, files):
    found = letters(by_mixture(corpus, files).training)
    for start in range(0, 1000, 200):
        assert 70 < found[start : start + 200].count("s") < 130


def test_a_copy_in_another_source_is_left_out(tmp_path, files):
    copy = tiny.write_jsonl(tmp_path / "copy.jsonl", [document("short", n) for n in range(3000)], field="content")
    parts = read(f"{files['short']}@1", f"{copy}@1", tokens=30_000)
    found = [marks(blocks) for blocks in (parts.calibration, parts.training, parts.validation)]
    assert all(found) and not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])


def test_what_a_domain_lacks_goes_to_the_others_and_is_said(corpus, capsys):
    mixture = {"short": 0.2, "middle": 0.2, "long": 0.1, "other": 0.5}
    given = ",".join(f"{name}={share}" for name, share in mixture.items())
    parts = read(corpus, mixture=given, domain="meta.source", quiet=False)
    said = capsys.readouterr().err
    assert "other gives 1" in said and "blocks that its share asks for; the others take what is missing" in said
    assert "domains in the training part" in said and " 50.0% " in said and "documents of other domains" not in said
    got = {name: share.got for name, share in parts.shares.items()}
    assert len(parts.training) == 1000 and 0.08 < got["other"] < 0.2  # what is left of held-out ones is lost
    assert got["short"] == pytest.approx(got["middle"], abs=0.002) == pytest.approx(2 * got["long"], abs=0.004)
    assert 0.05 < letters(parts.validation).count("z") / 100 < 0.2  # every part has its share of a scarce domain
    assert read(corpus, mixture=given, domain="meta.source").summary() == parts.summary()


def test_a_domain_that_never_occurs_takes_nothing_from_the_others(corpus):
    mixture = "short=0.5,middle=0.2,long=0.3,typo=0.1"
    parts = read(corpus, mixture=mixture, domain="meta.source", **DEFAULTS)
    without = read(corpus, mixture=MIXTURE, domain="meta.source", **DEFAULTS)
    assert len(parts.training) == pytest.approx(len(without.training), rel=0.1)
    assert len(parts.calibration) == pytest.approx(len(without.calibration), rel=0.1)
    assert parts.shares["typo"].got == 0


def test_documents_of_other_domains_are_left_out_and_quiet_is_quiet(corpus, capsys):
    parts = read(corpus, mixture="middle=1", domain="meta.source", tokens=16_000, quiet=False)
    assert "documents of other domains are left out: long (" in capsys.readouterr().err
    assert set(letters(parts.training)) == {"m"}
    read(corpus, mixture="middle=1,other=9", domain="meta.source", tokens=None)
    assert capsys.readouterr().err == ""


def test_an_explicit_excess_is_refused_and_the_default_takes_what_there_is(files, capsys):
    data = [f"{files['middle']}@1", f"{files['long']}@3"]
    with pytest.raises(UserError, match=r"--tokens 900000 is more than the \d+ tokens that the text gives"):
        read(*data, tokens=900_000)
    parts = read(*data, tokens=None, quiet=False)
    got = {name: share.got for name, share in parts.shares.items()}
    assert got[data[1].rpartition("@")[0]] == pytest.approx(0.75, abs=0.01), "what there is in these shares, no more"
    assert "training tokens in these shares" in capsys.readouterr().err.replace("\n", "")


def test_held_out_text_does_not_use_up_a_scarce_source(tmp_path):
    for name, count in (("small", 60), ("big", 1200)):
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", tiny.make_documents(count, seed=count))
    parts = read(f"{tmp_path / 'small.jsonl'}@7", f"{tmp_path / 'big.jsonl'}@3", **{**DEFAULTS, "tokens": 10_000})
    assert next(iter(parts.shares.values())).got == pytest.approx(0.7, abs=0.01)


def test_a_few_documents_that_hold_most_of_the_text_leave_it_for_training(tmp_path):
    documents = [*tiny.make_documents(300, words=2), *tiny.make_documents(2, words=7_000, seed=1)]
    parts = read(tiny.write_jsonl(tmp_path / "tail.jsonl", documents), **DEFAULTS)
    total = sum(part.numel() for part in (parts.calibration, parts.training, parts.validation))
    assert parts.training.numel() > 0.6 * total


@pytest.mark.parametrize("mixture", ["web", "web=", "=1", "web=0", "web=-1", "web=nan", "a=1,a=2", "a=1,,b=2", ""])
def test_mixtures_that_are_none_are_refused(corpus, mixture):
    with pytest.raises(UserError, match=r"--mixture .* has .*give slimpajama, or every domain once with a share"):
        parse_mixture(mixture)


def test_a_mixture_that_names_no_domain_here_is_refused(corpus):
    with pytest.raises(UserError, match=r"web=1 names no domain that occurs; .*source is long, middle, other, short"):
        read(corpus, mixture="web=1", domain="meta.source")


def test_names_may_hold_an_equals_sign():
    assert parse_mixture("a=b=0.5, c=1") == {"a=b": 0.5, "c": 1.0}


def test_the_papers_mixture_is_its_shares():
    assert parse_mixture("slimpajama") == SLIMPAJAMA and sum(SLIMPAJAMA.values()) == pytest.approx(1)


def test_the_papers_mixture_on_text_of_its_schema(shared):
    parts = read(shared / "data" / "text" / "redpajama_sample.jsonl", mixture="slimpajama", tokens=320_000)
    total = sum(SLIMPAJAMA.values())
    assert {name: share.got for name, share in parts.shares.items()} == {
        name: pytest.approx(share / total, abs=0.01) for name, share in SLIMPAJAMA.items()
    }
    assert sum(share.tokens for share in parts.shares.values()) == parts.training.numel() == 320_000


def test_largest_remainder():
    assert largest_remainder(10, [1, 1, 1]) == [4, 3, 3]
    assert largest_remainder(7, [0.5, 0.25, 0.25]) == [3, 2, 2]
    assert largest_remainder(3, [0.0, 0.0]) == [0, 0] and largest_remainder(0, [1.0]) == [0]


def test_quotas_fill_the_parts_and_keep_to_the_caps():
    sizes, weights = {"validation": 10, "calibration": 20, "training": 970}, {"a": 0.5, "b": 0.3, "c": 0.2}
    for caps in ({}, {"a": 100}, {"a": 100, "b": 7}, {"a": 0}, {"a": 1, "b": 1}):
        quotas = share_out(sizes, weights, caps)
        for part, size in sizes.items():
            assert sum(quotas[name][part] for name in weights) == size
        assert all(sum(quotas[name].values()) == cap for name, cap in caps.items())
    short = share_out(sizes, weights, {"a": 100, "b": 50, "c": 50})
    assert {part: sum(short[name][part] for name in weights) for part in sizes} == {**sizes, "training": 170}


def test_a_domain_without_a_mixture_is_refused():
    with pytest.raises(UserError, match=r"--domain meta.source is for --mixture; give that too"):
        recipe("t.jsonl", domain="meta.source")
