"""What an export and a comparison with another runtime hand back."""

from __future__ import annotations

from pydantic import Field

from llm_streamline.record import Record


class Compared(Record):
    """What a runtime computed of `prompts` prompts, against transformers in float32.

    Of `tokens` that transformers wrote greedily, `equal` are the runtime's too. `logits_error` is the largest
    difference of a logit, relative to the largest of its prompt; `divergence` the mean over tokens of the KL divergence
    of the next-token distributions, in nats. `tolerance` is what the error may be, None for a format that is lossy on
    purpose. Of as many texts, `tokenised` have the same ids; None where the runtime brings no tokenizer.
    """

    runtime: str
    version: str
    number_format: str
    prompts: int
    tokens: int
    equal: int
    logits_error: float
    divergence: float
    tolerance: float | None
    tokenised: int | None
    problems: list[str]
    limits: list[str] = Field(default_factory=list)  # what was not put to the test


class Exported(Record):
    """A file or folder in another format; `checks` are empty where the runtime that reads it is not installed."""

    to: str
    path: str
    number_format: str
    bytes: int
    checks: list[Compared]
