"""Request (what to evaluate), Evaluation (what was found) and Result (what `compress` hands back)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from llm_streamline.answers import Stability
from llm_streamline.quantities import Count
from llm_streamline.records import Fit, Fitted, LayerPlan, Loss, Record, Scores, Verification
from llm_streamline.schema import Schema, as_several

Interval = tuple[float, float]
EVALUATION, CHAIN = "evaluation.json", "chain.json"
EXACT = "exact match"  # the metric of written tasks
LOOPING = 0.5  # share of repeated 4-grams above which a text goes round in circles
EARLY = 8  # tokens: a sample that ends before has hardly begun
Names = Annotated[tuple[str, ...], BeforeValidator(as_several)]


class Request(Schema):
    """What to ask of which models. The batch changes no number."""

    models: Names = Field(description="Models to evaluate: folders (a run folder will do), Hub names, or 'bundled'.")
    against: str | None = Field(None, description="The dense model, to compare the others' answers with item by item.")
    tasks: Names = Field(
        (),
        description="Questions in a .jsonl file (id, query, choices, gold), the bundled suite quick, or, with "
        "llm-streamline[eval], the suite readme or paper or a task of lm-eval by name or .yaml file. Repeat it for "
        "several. [default: quick, where nothing else is asked for]",
    )
    text: Names = Field(
        (),
        description="Text to take the perplexity of: a .txt file, which is one document, or a .jsonl file with one per "
        "line in 'text'. Repeat it for several.",
    )
    samples: bool = Field(
        False, description="Let the models write after a few prompts, as in quick, to see whether they still can."
    )
    speed: bool = Field(False, description="Measure speed and memory, as in quick, the models taking turns.")
    backend: Literal["hf", "vllm"] = Field(
        "hf", description="What computes lm-eval's tasks: hf, which is transformers, or vllm, where it is installed."
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

    `group` is the group of tasks that it belongs to, where it belongs to one; `note` says where a task of a suite is
    asked otherwise than its name suggests. `written` is whether its answers are texts. `digest` tells tasks of one name
    apart; older evaluations have none.

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
    group: str | None = None
    note: str | None = None
    written: bool = False
    digest: str | None = None

    @property
    def kept_items(self) -> bool:
        """Whether every item lies in items/."""
        return self.measure is not None or self.written


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


class GroupScore(Record):
    """A group of tasks, such as the subjects of one examination: means in which every task weighs the same.

    `value` is of `metric`, as in its tasks; `stability` is against the dense model, None for that model itself.
    """

    group: str
    metric: str
    tasks: int
    items: int
    value: float
    stability: float | None


class Written(Record):
    """What one model wrote to a prompt, greedily; a prompt of a task has right `answers`, a sample has none.

    `ended` is whether it ended by itself, by its end token or what ends an answer, which lm-eval does not tell.
    `repeated` is the share of 4-grams of tokens that came before in the same text, 0 in text that never repeats itself.
    `exact` is whether the text is one of the answers but for case, punctuation and space; `rouge` is ROUGE-1, -2 and
    -L, the best over the answers.

    Of lm-eval's tasks, `figures` are what its metrics say, and `exact` is the first exact_match among them where there
    is one. A task that asks how likely a text is has no `text`; `exact` is whether the model would have written it.
    """

    task: str
    id: str
    prompt: str
    text: str
    tokens: int
    ended: bool | None
    repeated: float
    answers: list[str] | None = None
    exact: bool | None = None
    rouge: dict[str, float] | None = None
    figures: dict[str, float | list[float]] | None = None

    @property
    def loops(self) -> bool:
        return self.repeated > LOOPING

    @property
    def early(self) -> bool:
        return bool(self.ended) and self.tokens < EARLY


class Writing(Record):
    """How one model writes, over its samples: shares of them that loop, that end early, and of repeated 4-grams.

    A sample loops where over LOOPING of its 4-grams are repeated; it ends early within EARLY tokens.
    """

    samples: int
    tokens: int
    repeated: float
    looping: float
    early: float
    unended: float


class Flips(Record):
    """Two models' answers to one written task: right by both, lost, gained, and wrong by both."""

    task: str
    items: int
    both: int
    lost: int
    gained: int
    neither: int
    flips: float
    mcnemar_p: float
    difference_interval: Interval


class Timing(Record):
    """One model at one batch size: tokens per second reading a prompt (prefill) and writing after it (decode).

    Medians over rounds in which the models take turns. The ratios are to the dense model, round by round: their median
    with the interval of the medians of resampled rounds; None where there is no dense model.
    """

    batch: int
    prompt: int
    new: int
    rounds: int
    prefill: float
    decode: float
    prefill_ratio: float | None = None
    prefill_interval: Interval | None = None
    decode_ratio: float | None = None
    decode_interval: Interval | None = None


class Size(Record):
    """Bytes, as loaded: of all weights, of the KV cache per token, and the most that was held while writing.

    `peak` is of a process that does nothing else, and on a GPU of what was allocated there; `cache_per_token` is None
    where a model's cache does not tell.
    """

    parameters: int
    weights: int
    cache_per_token: float | None
    peak: int | None = None


class ModelScore(Record):
    """One model; `label` is its folder in items/. `stability` and `flips` are against the dense model, task by task."""

    label: str
    model: str
    fingerprint: str
    compute: str
    tasks: list[TaskScore]
    texts: list[TextScore]
    groups: tuple[GroupScore, ...] = ()
    stability: list[Stability] | None = None
    flips: list[Flips] | None = None
    written: tuple[Written, ...] = ()
    writing: Writing | None = None
    timings: tuple[Timing, ...] = ()
    size: Size | None = None

    def task(self, name: str) -> TaskScore:
        """Errors: StopIteration for a task that was not asked."""
        return next(one for one in self.tasks if one.task == name)


class Evaluation(Record):
    """What `evaluate` hands back and writes as evaluation.json; `against` is a label.

    `warnings` are sentences: where accuracy says that a model is fine and writing, perplexity or flips say otherwise.
    """

    against: str | None
    models: list[ModelScore]
    warnings: tuple[str, ...] = ()
    command: str | None = None
    versions: dict[str, str] | None = None


class Lighter(Record):
    """The shortened model with fewer bits per weight, at `path` in the run folder; `claim` is what its check found."""

    kind: str
    path: str
    bytes: int | None
    loss: Loss
    claim: str


class Link(Record):
    """One model of a chain dense -> shortened -> quantised; `bytes` are of its weights on the disk.

    `nats` is its loss on the run's validation text; `accuracy` and `stability`, against the dense model, are means over
    tasks. None is what was not measured.
    """

    name: str
    path: str
    bytes: int | None
    nats: float
    accuracy: float | None
    stability: float | None


class Chain(Record):
    links: list[Link]


class Result(Record):
    """What `compress` hands back; every part of it also lies in the run folder. No evaluation where none was asked."""

    plan: LayerPlan
    fit: Fitted
    earlier: list[Fit] = Field(default_factory=list)  # of the rounds before the last
    healing: Fit | None = None
    scores: Scores
    verification: Verification
    model: str
    report: str
    evaluation: Evaluation | None
    chain: Chain | None = None


class Point(Record):
    """One model of a sweep; `share` is of the dense model's parameters that are gone, and `nats` its validation loss.

    `accuracy` is the mean over tasks, `stability` the same against the dense model, each with its 95 % interval over
    items; `decode` how many times as fast as that it writes, at one sequence. None is what was not measured.
    """

    name: str
    layers: int
    parameters: int
    share: float
    folder: str | None = None
    removed: str | None = None
    nats: float | None = None
    accuracy: float | None = None
    accuracy_interval: Interval | None = None
    stability: float | None = None
    stability_interval: Interval | None = None
    decode: float | None = None


class Sweep(Record):
    """What `sweep` hands back and writes as sweep.json; `beside` are dense models that nothing was removed from."""

    dense: Point
    points: list[Point]
    beside: list[Point] = Field(default_factory=list)
