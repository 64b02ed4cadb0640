"""Request (what to evaluate) and Evaluation (what was found): a schema as Recipe is one, and the records it gives."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from llm_streamline.recipe import Count, Schema, as_several
from llm_streamline.records import Record, Stability

Interval = tuple[float, float]
Names = Annotated[tuple[str, ...], BeforeValidator(as_several)]


class Request(Schema):
    """What to ask of which models. The batch changes no number."""

    models: Names = Field(description="Models to evaluate: folders (a run folder will do), Hub names, or 'bundled'.")
    against: str | None = Field(None, description="The dense model, to compare the others' answers with item by item.")
    tasks: Names = Field(
        (),
        description="Questions in a .jsonl file (id, query, choices, gold), a task of lm-eval as a .yaml file, or the "
        "name of one, which takes llm-streamline[eval]. Repeat it for several.",
    )
    text: Names = Field(
        (),
        description="Text to take the perplexity of: a .txt file, which is one document, or a .jsonl file with one per "
        "line in 'text'. Repeat it for several.",
    )
    limit: Count | None = Field(None, description="Only the first so many questions of a task and documents of a text.")
    batch: Count | None = Field(None, description="Sequences per forward. [default: about 2048 tokens]")
    block: Count | None = Field(
        None, gt=1, description="Tokens the model sees at once in a text. [default: its context, 2048 at most]"
    )
    stride: Count | None = Field(
        None,
        description="Tokens by which the window slides over a text, each predicted with what lies before it in the "
        "window. [default: a block, so that windows are disjoint]",
    )


class TaskScore(Record):
    """One model on one task.

    `value` is the accuracy by summed log-likelihood (lm-eval's `acc`) with its Wilson interval, or else `metric`, a
    figure of lm-eval's own. `right_by_ppl` is the share of questions whose choice of lowest PPL is right, which is what
    stability counts. `cut` counts questions that were longer than the context, and lost tokens in front.
    """

    task: str
    metric: str
    value: float
    interval: Interval | None
    items: int
    right_by_ppl: float | None
    measure: str | None
    cut: int | None
    others: dict[str, float] | None = None


class TextScore(Record):
    """One model on one text, every token but each document's first predicted once.

    `nats` is per token, its standard error over documents, None where there is one; `bits_per_byte` is of the UTF-8
    text. The window is of `block` tokens and moves by `stride`; it is `blocked` where that leaves no overlap.
    """

    text: str
    nats: float
    se: float | None
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int
    block: int
    stride: int
    blocked: bool


class ModelScore(Record):
    """One model; `label` is its folder in items/, `stability` is against the dense model, task by task."""

    label: str
    model: str
    fingerprint: str
    compute: str
    tasks: list[TaskScore]
    texts: list[TextScore]
    stability: list[Stability] | None = None


class Evaluation(Record):
    """What `evaluate` hands back and writes as evaluation.json; `against` is a label."""

    against: str | None
    models: list[ModelScore]
