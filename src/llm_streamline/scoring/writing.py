"""Prompts -> what a model writes, greedily: right answers of written tasks, and samples that show whether it still can.

Multiple choice does not show that a model repeats itself or stops too early; its own text does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from statistics import fmean

import torch
from scipy import stats
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_streamline.errors import UserError
from llm_streamline.evaluation import Flips, Writing, Written
from llm_streamline.progress import progress
from llm_streamline.scoring.perplexity import batches
from llm_streamline.scoring.prompts import Prompt
from llm_streamline.scoring.stability import paired_interval

GRAM = 4
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_EDGES = re.compile(r"^(?:(?![-+.\N{MINUS SIGN}]*\d)[\W_])+|[\W_]+$")  # but for a number's sign and point


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    task: str,
    longest: tuple[int, int],
    batch: int | None = None,
    quiet: bool = False,
) -> list[Written]:
    """What the model writes to each prompt; an answer to a task ends with its first line.

    `longest` is the model's context and the most tokens to write; a prompt that leaves no room is cut at the front.
    """
    context, new = longest
    ids = [tokenizer.encode(prompt.text, verbose=False)[-(context - new) :] for prompt in prompts]
    found: dict[int, list[int]] = {}
    with progress(f"writing to {task}", len(ids), quiet) as advance:
        for rows in batches([len(row) + new for row in ids], batch):
            found |= zip(rows, _continue(model, [ids[row] for row in rows], new), strict=True)
            advance(len(rows), "prompts")
    ends = _ends(model)
    return [_written(tokenizer, prompt, task, found[number], ends) for number, prompt in enumerate(prompts)]


@torch.no_grad()
def _continue(model: PreTrainedModel, rows: Sequence[list[int]], new: int) -> list[list[int]]:
    """Up to `new` token ids after each row, its end token among them; rows are padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    own, ends = model.generation_config, _ends(model)
    # of what a checkpoint brings along (sampling, penalties, several sequences) only its end tokens have a part in this
    model.generation_config = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0)
    )
    try:
        whole = model.generate(ids, attention_mask=mask)
    finally:
        model.generation_config = own
    return [_until(row, ends) for row in whole[:, width:].tolist()]


def _ends(model: PreTrainedModel) -> set[int]:
    given = model.generation_config.eos_token_id
    given = model.config.eos_token_id if given is None else given
    return set(given) if isinstance(given, list) else {given} - {None}


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """The ids up to and with the first end token."""
    last = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: last + 1]


def _written(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, task: str, ids: list[int], ends: set[int]) -> Written:
    ended = bool(ids) and ids[-1] in ends
    text = tokenizer.decode(ids, skip_special_tokens=True)
    common = {"task": task, "id": prompt.id, "prompt": prompt.text, "tokens": len(ids) - ended}
    repeated = repetition(ids[: len(ids) - ended])
    if prompt.answers is None:
        return Written(**common, text=text, ended=ended, repeated=repeated)
    line, newline, _ = text.lstrip().partition("\n")
    answers = list(prompt.answers)
    return Written(
        **common,
        text=line,
        ended=ended or bool(newline),
        repeated=repeated,
        answers=answers,
        exact=plain(line) in {plain(answer) for answer in answers},
        rouge=rouge(line, answers),
    )


def repetition(ids: Sequence[int]) -> float:
    """Share of 4-grams that came before in the same text (Welleck et al., arXiv 1908.04319, call it seq-rep-4)."""
    grams = [tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def plain(answer: str) -> str:
    """An answer without case, repeated space, and punctuation at its ends, unless that is all there is."""
    return " ".join((_EDGES.sub("", answer) or answer).casefold().split())


class _AnyWords:
    """Words of any script, for ROUGE; Chinese and Japanese, which have no spaces, letter by letter."""

    def tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text.casefold())


def rouge(text: str, answers: Sequence[str]) -> dict[str, float]:
    """F1 of ROUGE-1, -2 and -L, each the best over the answers."""
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped, unused-ignore]

    plain_letters = all(answer.isascii() for answer in answers)
    words = None if plain_letters else _AnyWords()  # the package's own words are of ASCII letters alone
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True, tokenizer=words)
    scores = [scorer.score(answer, text) for answer in answers]
    return {kind: max(score[kind].fmeasure for score in scores) for kind in ("rouge1", "rouge2", "rougeL")}


def check_rouge() -> None:
    """Errors: UserError without rouge-score."""
    if find_spec("rouge_score") is None:
        raise UserError(
            "written answers are scored with rouge-score, which is not installed; install 'llm-streamline[eval]'."
        )


def summarize(samples: Sequence[Written]) -> Writing:
    """How a model writes, over all its samples."""
    return Writing(
        samples=len(samples),
        tokens=sum(one.tokens for one in samples),
        repeated=fmean(one.repeated for one in samples),
        looping=fmean(one.loops for one in samples),
        early=fmean(one.early for one in samples),
        unended=fmean(not one.ended for one in samples),
    )


def compare_written(before: Sequence[Written], after: Sequence[Written]) -> Flips:
    """Two models' answers to one written task, in the same order; an exact match is right."""
    pairs = [(bool(one.exact), bool(other.exact)) for one, other in zip(before, after, strict=True)]
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    return Flips(
        task=before[0].task,
        items=len(pairs),
        both=pairs.count((True, True)),
        lost=lost,
        gained=gained,
        neither=pairs.count((False, False)),
        flips=(lost + gained) / len(pairs),
        mcnemar_p=float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0,
        difference_interval=paired_interval([after - before for before, after in pairs]),
    )
