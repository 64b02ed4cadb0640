# ruff: noqa: RUF001 (Chinese text has its own punctuation)
"""The task files of the suite paper on a few rows in each data set's own schema, with answers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_streamline.errors import UserError
from llm_streamline.scoring import suites
from llm_streamline.scoring.given import open_tasks
from tests import tiny
from tests.test_tasks import by_harness

OURS = {Path(name).stem: name for name in suites.SUITES["paper"] if name.endswith(".yaml")}
ROWS = {
    "c3": [
        {
            "id": 0,
            "context": ["男：你吃饭了吗？", "女：还没有，我刚下班。"],
            "question": "女的吃饭了吗？",
            "choice": ["吃了", "没吃", "不知道"],
            "answer": "没吃",
        },
        {"id": 0, "context": ["今天下雨。"], "question": "天气怎么样？", "choice": ["下雨", "晴"], "answer": "下雨"},
    ],
    "cmnli": [
        {"sentence1": "他在北京工作。", "sentence2": "他有工作。", "label": 1, "idx": 0},
        {"sentence1": "他在北京工作。", "sentence2": "他没有工作。", "label": 2, "idx": 1},
        {"sentence1": "他在北京工作。", "sentence2": "他喜欢茶。", "label": 0, "idx": 2},
    ],
    "chid": [
        {
            "idx": 0,
            "candidates": ["一心一意", "三心二意", "四面八方"],
            "content": ["做事要#idiom000001#。", "人们从#idiom000002#赶来，#idiom000003#地工作。"],
            "answers": {"text": ["一心一意", "四面八方", "一心一意"], "candidate_id": [0, 2, 0]},
        }
    ],
    "race": [
        {
            "example_id": "middle1.txt",
            "article": "Tom has a red boat.",
            "answer": "C",
            "question": "What does Tom have?",
            "options": ["A cat.", "A car.", "A boat.", "A house."],
        },
        {
            "example_id": "middle1.txt",
            "article": "Tom has a red boat.",
            "answer": "A",
            "question": "Its colour is _ .",
            "options": ["red", "blue", "green", "black"],
        },
    ],
    "xsum": [
        {"document": "A man found a boat.\nIt was red.", "summary": "A man has found a red boat.", "id": "1"},
    ],
    "strategyqa": [
        {
            "qid": str(number),
            "term": "boat",
            "description": "a thing",
            "question": f"Can boat {number} swim?",
            "answer": number % 2 == 0,
            "facts": f"Boat {number} is a boat.",
        }
        for number in range(7)
    ],
}
ASKED = {
    "c3": [
        (
            "男：你吃饭了吗？\n女：还没有，我刚下班。\n问题：女的吃饭了吗？\n回答：",
            ["吃了", "没吃", "不知道"],
            1,
        ),
        ("今天下雨。\n问题：天气怎么样？\n回答：", ["下雨", "晴"], 0),
    ],
    "cmnli": [
        ("他在北京工作。\n问：由此可以断定“他有工作。”吗？\n答：", ["不能确定", "可以", "不可以"], 1),
        ("他在北京工作。\n问：由此可以断定“他没有工作。”吗？\n答：", ["不能确定", "可以", "不可以"], 2),
        ("他在北京工作。\n问：由此可以断定“他喜欢茶。”吗？\n答：", ["不能确定", "可以", "不可以"], 0),
    ],
    "chid": [
        ("做事要", ["一心一意。", "三心二意。", "四面八方。"], 0),
        ("人们从", [f"{idiom}赶来，一心一意地工作。" for idiom in ("一心一意", "三心二意", "四面八方")], 2),
        ("人们从四面八方赶来，", ["一心一意地工作。", "三心二意地工作。", "四面八方地工作。"], 0),
    ],
    "race_middle": [
        (
            "Tom has a red boat.\n\nQuestion: What does Tom have?\nAnswer:",
            [" A cat.", " A car.", " A boat.", " A house."],
            2,
        ),
        ("Tom has a red boat.\n\nQuestion: Its colour is _ .\nAnswer:", [" red", " blue", " green", " black"], 0),
    ],
}
ASKED["race_high"] = ASKED["race_middle"]


@pytest.fixture(autouse=True)
def _harness() -> None:
    pytest.importorskip("lm_eval", exc_type=ImportError)


def local(name: str, folder: Path):
    """The task as its file has it, but for where its data lie."""
    from lm_eval.tasks._yaml_loader import load_yaml

    from llm_streamline.scoring.tasks import _index, _opened

    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS[name.partition("_")[0]]))
    files = {
        "data_files": dict.fromkeys(("train", "validation", "test"), str(data)),
        "cache_dir": str(folder / "cache"),
    }
    elsewhere = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
    loaded = _index(include_defaults=False).load({**load_yaml(OURS[name]), **elsewhere})
    return _opened(name, loaded["tasks"][name], None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ASKED)
def test_multiple_choice_is_asked_as_written_down_here(tmp_path, name):
    one = local(name, tmp_path)
    model, tokenizer = tiny.make_model("llama"), tiny.make_tokenizer()
    found = by_harness(model, tokenizer, one)
    assert [item.gold for item in found.items] == [str(gold) for _, _, gold in ASKED[name]]
    for instances, (query, choices, _) in zip(by_document(one.task), ASKED[name], strict=True):
        assert [call.args for call in instances] == [(query, choice) for choice in choices]
    assert all(item.measure == "choice" for item in found.items) and "acc,none" in found.metrics


def by_document(task) -> list[list]:
    found: dict[int, list] = {}
    for instance in task.instances:
        found.setdefault(instance.doc_id, []).append(instance)
    return list(found.values())


def writer(texts: list[str]):
    """A model that writes these texts, one per prompt, and keeps the prompts."""
    from lm_eval.api.model import LM

    class Writer(LM):
        def __init__(self) -> None:
            super().__init__()
            self.prompts: list[str] = []

        def generate_until(self, requests, disable_tqdm=False):
            self.prompts += [request.args[0] for request in requests]
            return texts

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    return Writer()


@pytest.mark.filterwarnings("ignore")
def test_summaries_are_scored_by_overlap(tmp_path):
    from llm_streamline.scoring.evaluator import harness_score
    from llm_streamline.scoring.tasks import run_harness

    one, model = local("xsum_rouge", tmp_path), writer(["A red boat."])
    found = run_harness(model, tiny.make_tokenizer(), one, None)
    assert model.prompts == ["A man found a boat.\nIt was red.\n\nThe same in one sentence:"]
    # a, red, boat of a, man, has, found, a, red, boat: precision 3/3, recall 3/7; pairs 2/2 and 2/6
    expected = {"rouge1": 2 * 3 / 7 / (1 + 3 / 7), "rouge2": 2 * (1 / 3) / (4 / 3), "rougeL": 0.6}
    assert {key.partition(",")[0]: value for key, (value, _) in found.metrics.items()} == pytest.approx(expected)
    (written,) = found.written
    assert written.rouge == pytest.approx(expected) and written.answers == ["A man has found a red boat."]
    assert written.figures == pytest.approx({f"{key},none": value for key, value in expected.items()})
    score = harness_score("xsum_rouge", found)
    assert score.metric == "rouge1,none" and score.value == pytest.approx(0.6) and score.written and score.kept_items


@pytest.mark.filterwarnings("ignore")
def test_an_answer_counts_by_its_last_verdict(tmp_path):
    from llm_streamline.scoring.evaluator import harness_score
    from llm_streamline.scoring.tasks import run_harness

    texts = [
        " Boats float. So the answer is yes.",  # right
        " The answer is no.",  # right
        " The answer is no. But boats swim, so the answer is Yes",  # right
        " yes",  # no verdict: wrong
        " So the answer is no.",  # wrong
        "",  # wrong
        " the answer is yes, the answer is no",  # wrong
    ]
    one, model = local("strategyqa", tmp_path), writer(texts)
    found = run_harness(model, tiny.make_tokenizer(), one, None)
    assert [written.exact for written in found.written] == [True, True, True, False, False, False, False]
    score = harness_score("strategyqa", found)
    assert score.metric == "exact match" and score.value == 3 / 7 and score.others["exact_match,last-answer"] == 3 / 7
    shown, asked = model.prompts[0].rsplit("\n\n", 1)
    assert asked == "Question: Can boat 0 swim?\nAnswer:" and shown.count("So the answer is") == 5
    assert shown.startswith("Question: Can boat 0 swim?\nAnswer: Boat 0 is a boat. So the answer is yes.\n\nQuestion: ")


def test_every_file_of_ours_is_tested_and_in_the_suite():
    assert {path.stem for path in (suites.HERE / "paper").glob("*.yaml")} == set(OURS)
    assert set(OURS) == {*ASKED, "xsum_rouge", "strategyqa"}


@pytest.mark.filterwarnings("ignore")
def test_every_other_name_is_a_task_of_lm_eval():
    from llm_streamline.scoring.tasks import _index

    known = _index(include_defaults=True)
    names = [name for name in (*suites.SUITES["readme"], *suites.SUITES["paper"]) if not name.endswith(".yaml")]
    assert len(names) == 15 and not set(names) - set(known.all_tasks)
    assert not set(OURS) & set(known.all_tasks), "one name is one task"
    assert {"mmlu", "cmmlu"} <= set(known.all_groups)
    with pytest.raises(UserError, match=r"arc_challenge needs data that could not be fetched .*'allenai/ai2_arc'"):
        open_tasks(["readme"], None)


@pytest.mark.filterwarnings("ignore")
def test_data_that_cannot_be_fetched_are_named_in_one_sentence():
    with pytest.raises(
        UserError, match=r"'clue/clue'.*; run it once where there is a network, or leave it out"
    ) as caught:
        open_tasks(["paper"], None)
    assert "\n" not in str(caught.value)
