"""Text -> nats per token and bits per byte: windows over each document, every token but its first predicted once.

A document is encoded whole, with the special tokens its tokenizer adds. Blocked windows share one token with the next,
which is there an input and no target; sliding ones, with `--stride`, share more, so that tokens see more before them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_streamline.errors import UserError, reason
from llm_streamline.evaluation import TextScore
from llm_streamline.files import sha256
from llm_streamline.progress import progress
from llm_streamline.scoring.perplexity import token_losses

SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Text:
    name: str
    digest: str
    documents: list[str]


@dataclass(frozen=True)
class Window:
    """Token ids of document `document`, of which the last `new` are predicted here and nowhere else."""

    document: int
    ids: list[int]
    new: int


def read_text(path: Path, limit: int | None = None) -> Text:
    """Errors: UserError for a file that is no text, or holds none."""
    if path.suffix not in SUFFIXES or not path.is_file():
        raise UserError(f"--text {path} is no .txt or .jsonl file here; give one with the text to be predicted.")
    try:
        whole = path.read_bytes()
        content = whole.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read ({reason(error)}); give a text in UTF-8.") from error
    lines = enumerate(content.split("\n"), start=1)
    documents = [content] if path.suffix == ".txt" else [_document(path, *line) for line in lines if line[1].strip()]
    documents = [document for document in documents if document.strip()][:limit]
    if not documents:
        raise UserError(f"--text {path} holds no text; give a file that does.")
    return Text(path.stem, sha256(whole), documents)


def _document(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f'--text {path}, line {number}, is not JSON ({error.msg}); write lines such as {{"text": "..."}}.'
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f'--text {path}, line {number}, has no \'text\'; write lines such as {{"text": "..."}}.')
    return row["text"]


def windows(document: int, ids: Sequence[int], block: int, stride: int) -> list[Window]:
    """Windows of up to `block` tokens that begin at multiples of `stride`; each predicts what none before it has."""
    found: list[Window] = []
    done = 1
    while done < len(ids):
        begin = len(found) * stride
        end = min(len(ids), begin + block)
        found.append(Window(document, list(ids[begin:end]), end - done))
        done = end
    return found


def stride_of(block: int, stride: int | None) -> int:
    """The step between windows, at most what leaves each one token to start from. Errors: UserError."""
    if stride is not None and stride >= block:
        raise UserError(f"--stride {stride} leaves gaps between windows of {block} tokens; give less than --block.")
    return stride or block - 1


def score_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    steps: tuple[int, int],
    batch: int | None = None,
    quiet: bool = False,
) -> TextScore:
    """`steps` are the window's length and its stride."""
    documents = [tokenizer.encode(document, verbose=False) for document in text.documents]
    some = [window for number, ids in enumerate(documents) for window in windows(number, ids, *steps)]
    if not some:
        raise UserError(f"--text {text.name} has no document of two tokens; give a longer text.")
    with progress(f"perplexity of {text.name}", len(some), quiet) as advance:
        losses = token_losses(model, [window.ids for window in some], batch, lambda done: advance(done, "windows"))
    return _score(text, some, losses, steps)


def _score(text: Text, some: list[Window], losses: list[Tensor], steps: tuple[int, int]) -> TextScore:
    sums, counts = [0.0] * len(text.documents), [0] * len(text.documents)
    for window, loss in zip(some, losses, strict=True):
        sums[window.document] += float(loss[-window.new :].double().sum())
        counts[window.document] += window.new
    total, tokens = math.fsum(sums), sum(counts)
    size = sum(len(document.encode()) for document in text.documents)
    return TextScore(
        text=text.name,
        nats=total / tokens,
        se=_error(sums, counts),
        perplexity=math.exp(min(total / tokens, 700.0)),
        bits_per_byte=total / math.log(2) / size,
        tokens=tokens,
        bytes=size,
        documents=len(text.documents),
        block=steps[0],
        stride=steps[1],
        blocked=steps[1] == steps[0] - 1,
    )


def _error(sums: list[float], counts: list[int]) -> float | None:
    """Standard error of sum(sums) / sum(counts), a ratio, over documents."""
    if len(sums) < 2:
        return None
    mean = math.fsum(sums) / sum(counts)
    spread = math.fsum((one - mean * count) ** 2 for one, count in zip(sums, counts, strict=True))
    return math.sqrt(spread * len(sums) / (len(sums) - 1)) / sum(counts)
