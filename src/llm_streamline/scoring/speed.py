"""Models -> tokens per second and bytes. The models take turns, so that a machine's moods fall on all of them alike."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from llm_streamline.evaluation import Interval, Size, Timing
from llm_streamline.progress import progress, say

BATCHES = (1, 8)
PROMPT, NEW = 512, 32  # tokens, where the context leaves room for them
FEWEST, MOST, SECONDS = 6, 40, 6.0  # rounds, and about how long all of one batch size may take
SLOW = 60.0  # seconds for one round of all models: where more is to be expected, a larger batch is left out


@dataclass(frozen=True)
class Load:
    """Sequences per batch, tokens read and tokens written by each."""

    batch: int
    prompt: int
    new: int


def loads(context: int) -> list[Load]:
    """What to time, within a context of so many tokens."""
    prompt = min(PROMPT, context // 2)
    return [Load(batch, prompt, min(NEW, context - prompt)) for batch in BATCHES]


Round = tuple[float, float]  # seconds of prefill and of decode


@torch.no_grad()
def one_round(model: PreTrainedModel, load: Load) -> Round:
    """Read a prompt of one and the same token each, then write greedily with the cache."""
    ids = torch.ones(load.batch, load.prompt, dtype=torch.long, device=model.device)
    given: dict[str, Any] = {"use_cache": True, **_last_logits_only(model)}
    start = _now(model)
    out = model(input_ids=ids, **given)
    if not _handed_out(out):  # some fill only what they are given
        given["past_key_values"] = DynamicCache(config=model.config)
        start = _now(model)
        out = model(input_ids=ids, **given)
    read = _now(model)
    for _ in range(load.new):
        token: Tensor = out.logits[:, -1:].argmax(dim=-1)
        out = model(input_ids=token, **given | _handed_out(out))
    return read - start, _now(model) - read


def _handed_out(out: Any) -> dict[str, Cache]:
    """What a model remembers by, under the name that it takes it by; none where it does not hand it out."""
    return {name: out[name] for name in ("past_key_values", "cache_params") if out.get(name) is not None}


def _last_logits_only(model: PreTrainedModel) -> dict[str, int]:
    """As `generate` asks for them: nobody needs a prompt's other logits."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def take_turns(
    models: Sequence[PreTrainedModel], load: Load, title: str, quiet: bool = False, rounds: int | None = None
) -> list[list[Round]]:
    """Rounds of each model, one unmeasured first; who begins changes from round to round."""
    begun = time.perf_counter()
    for model in models:
        one_round(model, load)
    expected = (time.perf_counter() - begun) or 1e-6
    count = rounds or int(min(MOST, max(FEWEST, SECONDS / expected)))
    found: list[list[Round]] = [[] for _ in models]
    with progress(f"speed of {title}, batch {load.batch}", count, quiet) as advance:
        for turn in range(count):
            order = range(len(models)) if turn % 2 == 0 else reversed(range(len(models)))
            for number in order:
                found[number].append(one_round(models[number], load))
            advance(1, "rounds")
    return found


def timings(models: Sequence[PreTrainedModel], context: int, title: str, quiet: bool = False) -> list[list[Timing]]:
    """Per model a Timing per batch size, with ratios to the first model, which has none itself.

    A batch size that would take minutes a round is left out, which is said.
    """
    found: list[list[Timing]] = [[] for _ in models]
    expected = 0.0
    for load in loads(context):
        if expected * load.batch > SLOW:
            say(f"speed at batch {load.batch} is left out: one round would take {expected * load.batch:.0f} s", quiet)
            break
        rounds = take_turns(models, load, title, quiet)
        expected = sum(median(map(sum, own)) for own in rounds) / load.batch
        for number, own in enumerate(rounds):
            found[number].append(_timing(load, own, rounds[0] if number else None))
    return found


def _timing(load: Load, own: list[Round], dense: list[Round] | None) -> Timing:
    prefill, decode = (median(values) for values in zip(*own, strict=True))
    ratios: dict[str, Any] = {}
    for place, name in enumerate(("prefill", "decode") if dense else ()):
        assert dense is not None
        values = [one[place] / other[place] for one, other in zip(dense, own, strict=True)]
        ratios |= {f"{name}_ratio": median(values), f"{name}_interval": _interval(values)}
    return Timing(
        batch=load.batch,
        prompt=load.prompt,
        new=load.new,
        rounds=len(own),
        prefill=load.batch * load.prompt / prefill,
        decode=load.batch * load.new / decode,
        **ratios,
    )


def _interval(values: list[float]) -> Interval:
    """95 % of the medians of resampled rounds."""
    if len(set(values)) == 1:
        return values[0], values[0]
    random = np.random.default_rng(0)
    found = stats.bootstrap((values,), np.median, n_resamples=1000, method="percentile", random_state=random)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, context: int) -> float | None:
    """Bytes of KV cache per token of one prompt; None where the cache is of a kind that does not tell."""
    load = loads(context)[0]
    ids = torch.ones(1, load.prompt, dtype=torch.long, device=model.device)
    cache = next(iter(_handed_out(model(input_ids=ids, use_cache=True)).values()), None)
    if (layers := getattr(cache, "layers", None)) is None:
        return None
    held = [
        value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor) and value.dim() > 1
    ]
    return sum(tensor.nbytes for tensor in held) / load.prompt


def size(model: PreTrainedModel, context: int) -> Size:
    """Bytes as the model is loaded; the most that was allocated where a GPU counts it."""
    weights = {id(parameter): parameter for parameter in model.parameters()}.values()
    peak = None
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        held = torch.cuda.memory_allocated(model.device)  # by every model that is loaded
        one_round(model, loads(context)[0])
        own = sum(tensor.nbytes for tensor in (*weights, *model.buffers()))
        peak = own + torch.cuda.max_memory_allocated(model.device) - held
    return Size(
        parameters=sum(parameter.numel() for parameter in weights),
        weights=sum(parameter.nbytes for parameter in weights),
        cache_per_token=cache_bytes(model, context),
        peak=peak,
    )
