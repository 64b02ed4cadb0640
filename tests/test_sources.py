from __future__ import annotations

import json
import sys

import pyarrow
import pyarrow.parquet as pq
import pytest

from llm_streamline import parquet
from llm_streamline.errors import UserError
from llm_streamline.readers import Lines, Schema, messages
from llm_streamline.sources import Source, open_pools
from tests import tiny

DOCUMENTS = tiny.make_documents(40, words=5)
DOMAIN = "meta.redpajama_set_name"


def pools(*data, field=None, domain=None, render=None, seed=0):
    return open_pools(tuple(map(str, data)), Schema(field, domain, render), seed)


def texts(*data, **how) -> list[str]:
    return [document.text for pool in pools(*data, **how) for document in pool]


def write_parquet(path, rows, group=7):
    pq.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def rows_of(documents):
    return [{"id": number, "text": text} for number, text in enumerate(documents)]


def test_a_text_file_is_dealt_in_pieces_of_whole_lines(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("".join(f"{n} " + "word " * 30 + "\n" for n in range(500)), encoding="utf-8")
    pieces = texts(file)
    assert len(pieces) > 10 and sorted("".join(sorted(pieces))) == sorted(file.read_text())
    assert all(piece.endswith("\n") for piece in pieces)


def test_one_endless_line_is_cut_at_blanks_and_loses_nothing(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text(" ".join(f"naïve wörd {n}" for n in range(9000)) + " ", encoding="utf-8")
    pieces = texts(file)
    assert len(pieces) > 3 and all(piece.endswith(" ") for piece in pieces)
    assert sum(map(len, pieces)) == len(file.read_text(encoding="utf-8"))


def test_text_without_blanks_is_cut_between_characters(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("北京大学" * 90_000, encoding="utf-8")  # 1 MB, which a byte at a time took half a minute
    lines = Lines(file)
    pieces = [lines.text(number) for number in range(lines.count)]
    assert len(pieces) > 200 and "".join(pieces) == file.read_text(encoding="utf-8")


def test_a_byte_order_mark_and_null_rows_are_no_text(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": null}\n')
    assert texts(tmp_path / "t.jsonl") == ["a"]


def test_half_a_character_is_a_question_mark(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a \\ud83d b"}\n')
    assert texts(tmp_path / "t.jsonl") == ["a ? b"]


def test_the_field_is_found_or_named(tmp_path):
    tiny.write_jsonl(tmp_path / "content.jsonl", ["hello"], field="content")
    tiny.write_jsonl(tmp_path / "body.jsonl", ["hello"], field="body")
    (tmp_path / "both.jsonl").write_text(json.dumps({"text": "hello", "content": None, "messages": []}))
    assert texts(tmp_path / "content.jsonl") == texts(tmp_path / "both.jsonl") == ["hello"]
    assert texts(tmp_path / "body.jsonl", field="body") == ["hello"]


def test_blank_lines_are_no_documents(tmp_path):
    (tmp_path / "t.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n\n')
    assert sorted(texts(tmp_path / "t.jsonl")) == ["a", "b"]


def test_the_redpajama_schema_is_read_as_it_is(shared):
    file = shared / "data" / "text" / "redpajama_sample.jsonl"
    found = texts(file)
    rows = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines() if line]
    assert sorted(found) == sorted(row for row in rows if row.strip()) and found != rows


def test_parquet_is_read_whole_in_seeded_order(tmp_path):
    file = write_parquet(tmp_path / "t.parquet", rows_of(DOCUMENTS))
    first, again, other = texts(file), texts(file), texts(file, seed=1)
    assert sorted(first) == sorted(DOCUMENTS) and first == again and first != other and first != DOCUMENTS
    one_group = texts(write_parquet(tmp_path / "one.parquet", rows_of(DOCUMENTS), group=100))
    assert sorted(one_group) == sorted(DOCUMENTS) and one_group not in (DOCUMENTS, DOCUMENTS[::-1])


def test_parquet_reads_only_its_columns_and_few_row_groups_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MEMORY", 1)
    read, load = [], parquet._table
    monkeypatch.setattr(parquet, "_table", lambda group: read.append(group) or load(group))
    file = write_parquet(tmp_path / "t.parquet", rows_of(DOCUMENTS))
    (pool,) = pools(file)
    documents = iter(pool)
    first = [next(documents).text for _ in range(7)]
    assert len(read) == 1 and load(read[0]).column_names == ["text"]
    assert len({DOCUMENTS.index(text) // 7 for text in first}) == 1  # one row group at a time
    assert sorted([*first, *(document.text for document in documents)]) == sorted(DOCUMENTS)
    assert [group.number for group in read] != sorted(group.number for group in read)


def test_a_folder_and_a_glob_are_all_their_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    tiny.write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:10])
    tiny.write_jsonl(tmp_path / "deep" / "b.jsonl", DOCUMENTS[10:20])
    write_parquet(tmp_path / "deep" / "c.parquet", rows_of(DOCUMENTS[20:30]))
    (tmp_path / "d.txt").write_text("plain")
    (tmp_path / "readme.md").write_text("not text")
    tiny.write_jsonl(tmp_path / ".hidden" / "e.jsonl", DOCUMENTS[30:])
    assert sorted(texts(tmp_path)) == sorted([*DOCUMENTS[:30], "plain"])
    assert sorted(texts(tmp_path / "**" / "*.jsonl")) == sorted(DOCUMENTS[:20])
    assert sorted(texts(tmp_path / "*")) == sorted([*DOCUMENTS[:10], "plain"])


def test_files_of_a_pool_are_interleaved_by_their_documents(tmp_path):
    tiny.write_jsonl(tmp_path / "a.jsonl", [f"a {n}" for n in range(300)])
    tiny.write_jsonl(tmp_path / "b.jsonl", [f"b {n}" for n in range(100)])
    write_parquet(tmp_path / "c.parquet", rows_of([f"c {n}" for n in range(200)]), group=50)
    found = texts(tmp_path)
    first = [text[0] for text in found[:300]]
    assert len(found) == len(set(found)) == 600
    assert 130 < first.count("a") < 170 and 35 < first.count("b") < 65 and 80 < first.count("c") < 120


def test_weights_make_pools_and_a_file_named_so_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "c.jsonl@2"):
        tiny.write_jsonl(tmp_path / name, [name])
    assert [(pool.name, pool.weight) for pool in pools("a.jsonl@0.7", "b*.jsonl@3e-1")] == [
        ("a.jsonl", 0.7),
        ("b*.jsonl", 0.3),
    ]
    assert Source.parse("c.jsonl@2") == Source("c.jsonl@2") and Source.parse("a.jsonl@2") == Source("a.jsonl", 2.0)
    assert Source.parse("me@corp/*.jsonl") == Source("me@corp/*.jsonl")
    assert Source.parse("hub:me/set:test@2").hub == "me/set:test" and Source("hub:me/set").hub == "me/set:train"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("a.jsonl@0 b.jsonl@1", "gives the weight '0'; write a number above 0"),
        ("a.jsonl@-1 b.jsonl@1", "gives the weight '-1'"),
        ("a.jsonl@nan b.jsonl@1", "gives the weight 'nan'"),
        ("a.jsonl@inf b.jsonl@1", "gives the weight 'inf'"),
        ("a.jsonl@half b.jsonl@1", "gives the weight 'half'"),
        ("a.jsonl@1 b.jsonl", r"b\.jsonl has no weight and a\.jsonl@1 has; weigh all sources or none"),
        ("a.jsonl ./a.jsonl", r"names a\.jsonl twice"),
        ("a.jsonl@1 a.jsonl@2", r"names a\.jsonl twice"),
        ("a.jsonl *.jsonl", r"names a\.jsonl twice"),
        ("hub:x@1 hub:x:train@2", "names x:train twice"),
        ("a.jsonl hub:x", "hub:x is a stream of unknown size.*such as hub:x@0.5"),
        ("nothing*.jsonl", "matches no file with text; .txt, .jsonl and .parquet"),
        ("empty", "is a folder without text"),
        ("nowhere", "is no file here"),
        ("table.csv", "ends in '.csv'"),
        ("", "no --data was given.*--data bundled"),
    ],
)
def test_sources_that_do_not_go_together_are_refused(tmp_path, monkeypatch, data, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n")
    for name in ("a.jsonl", "b.jsonl"):
        tiny.write_jsonl(tmp_path / name, [name])
    with pytest.raises(UserError, match=words):
        pools(*data.split())


def test_a_broken_line_is_named_by_its_number(tmp_path):
    good = '{"text": "a"}\n\n'
    (tmp_path / "t.jsonl").write_text(good * 3 + '{"text": "b"\n' + good)
    with pytest.raises(UserError, match=r"t\.jsonl, line 7, is not JSON"):
        texts(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text(good * 2 + '\n{"words": "b"}')
    with pytest.raises(UserError, match=r"t\.jsonl, line 6, has no text in 'text'"):
        texts(tmp_path / "t.jsonl")


def test_unusable_parquet_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"has no text in 'text' or .*; its columns are id, words: .*--field"):
        texts(write_parquet(tmp_path / "t.parquet", [{"words": "a", "id": 3}]))
    with pytest.raises(UserError, match="holds no text in 'id', but something else"):
        texts(write_parquet(tmp_path / "t.parquet", rows_of("abc")), field="id")
    with pytest.raises(UserError, match=r"has no domain in 'meta\.source'.* its columns are id, text.*--domain"):
        texts(write_parquet(tmp_path / "t.parquet", rows_of("abc")), domain="meta.source")
    with pytest.raises(UserError, match="is empty"):
        pq.write_table(pyarrow.table({"text": ["a"]})[:0], tmp_path / "none.parquet")
        texts(tmp_path / "none.parquet")
    whole = write_parquet(tmp_path / "t.parquet", rows_of(DOCUMENTS)).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-50])
    (tmp_path / "pages.parquet").write_bytes(b"PAR1" + bytes(200) + whole[204:])
    for name in ("cut", "pages"):
        with pytest.raises(UserError, match=rf"{name}\.parquet is damaged or no Parquet file"):
            texts(tmp_path / f"{name}.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow; install 'llm-streamline\[hub\]'"):
        texts(tmp_path / "t.parquet")


def test_a_domain_is_read_from_a_dotted_path(tmp_path):
    rows = [{"text": str(n), "meta": {"redpajama_set_name": "odd" if n % 2 else "even"}} for n in range(9)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_parquet(tmp_path / "t.parquet", rows)
    for name in ("t.jsonl", "t.parquet"):
        (pool,) = pools(tmp_path / name, domain=DOMAIN)
        assert {(one.text, one.domain) for one in pool} == {
            (row["text"], row["meta"]["redpajama_set_name"]) for row in rows
        }
    with pytest.raises(UserError, match=r"line \d, has no domain in 'meta\.source'.*its fields are meta, text"):
        list(pools(tmp_path / "t.jsonl", domain="meta.source")[0])
    with pytest.raises(UserError, match=r"row \d, has no domain in 'meta\.source'"):
        list(pools(tmp_path / "t.parquet", domain="meta.source")[0])
    (tmp_path / "t.txt").write_text("plain")
    with pytest.raises(UserError, match=r"t\.txt has no domains, which --mixture needs"):
        pools(tmp_path / "t.txt", domain=DOMAIN)
    with pytest.raises(UserError, match=r"--mixture and the weight in --data .*@1 both set shares"):
        pools(f"{tmp_path}/t.jsonl@1", domain=DOMAIN)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


@pytest.mark.parametrize(("field", "chat"), [("messages", CHAT), ("conversations", SHAREGPT), ("talk", SHAREGPT)])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_chats_go_through_the_template(tmp_path, field, chat, ending):
    row = {"id": 1, field: chat}
    file = tmp_path / f"t.{ending}"
    write_parquet(file, [row]) if ending == "parquet" else file.write_text(json.dumps(row))
    (pool,) = pools(file, field="talk" if field == "talk" else None, render=lambda turns: json.dumps(turns))
    (document,) = pool
    assert json.loads(document.text) == CHAT and document.chat
    with pytest.raises(UserError, match="is a chat and the tokenizer has no chat template"):
        texts(file, field=field)


@pytest.mark.parametrize(
    "chat", [["hi"], [{"role": "user"}], [{"role": "bard", "content": "x"}], [{"from": "gpt", "value": 3}], [{}]]
)
def test_malformed_chats_are_refused(chat):
    with pytest.raises(UserError, match="line 3 holds a chat with a malformed turn"):
        messages(chat, lambda: "line 3")


def test_turns_without_text_are_left_out_and_text_in_parts_is_joined():
    parts = [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}]
    chat = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
        {"role": "tool", "content": "3"},
    ]
    assert messages(chat, lambda: "line 3") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "tool", "content": "3"},
    ]


def test_empty_chats_are_no_documents(tmp_path):
    rows = [{"messages": []}, {"messages": [{"role": "assistant", "content": None}]}, {"messages": CHAT}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(texts(tmp_path / "t.jsonl", render=lambda turns: turns[0]["content"])) == 1


def test_what_a_template_refuses_is_named(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": CHAT}))

    def refuse(turns):
        raise ValueError("roles must alternate")

    with pytest.raises(UserError, match=r"line 1, holds a chat that .* refuses \(roles must alternate\)"):
        texts(tmp_path / "t.jsonl", render=refuse)
