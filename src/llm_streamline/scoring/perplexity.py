"""Next-token loss of a model in nats: of blocks of token ids, and token by token of rows of any length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from llm_streamline.layerwise import logits_of
from llm_streamline.losses import next_token
from llm_streamline.progress import progress
from llm_streamline.records import Loss

FORWARD_TOKENS = 2048  # per forward where no batch is asked for: logits over the whole vocabulary are held
Ids = Sequence[int]


@torch.no_grad()
def next_token_loss(model: PreTrainedModel, blocks: Tensor, batch: int, title: str, quiet: bool = False) -> Loss:
    """Mean negative log-likelihood in nats per token over `blocks` (N, T), with its standard error over sequences."""
    losses: list[float] = []
    with progress(f"loss of {title}", len(blocks), quiet) as advance:
        some = blocks.split(batch)
        for ids, logits in zip(some, logits_of(model, [ids[:, :-1] for ids in some]), strict=True):
            losses += _of_logits(logits, ids).mean(dim=1).tolist()
            advance(len(ids), "sequences")
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / max(len(losses) - 1, 1)
    tokens = len(blocks) * (blocks.shape[1] - 1)
    return Loss(nats=mean, se=math.sqrt(variance / len(losses)), tokens=tokens, sequences=len(losses))


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, rows: Sequence[Ids], batch: int | None, advance: Callable[[int], None]
) -> list[Tensor]:
    """Per row of ids the loss of each token but the first, (T - 1,), whatever shares its batch.

    Rows are padded on the right, where a causal model does not look; those of like length go together.
    """
    counts = [len(row) - 1 for row in rows]
    found = torch.empty(sum(counts)).split(counts)  # one tensor: small ones between large ones would tear the heap
    for some in batches([len(row) for row in rows], batch):
        padded = pad_sequence([torch.tensor(rows[row]) for row in some], batch_first=True)
        losses = _losses(model, padded.to(model.device, torch.long)).cpu()
        for row, loss in zip(some, losses, strict=True):
            found[row].copy_(loss[: counts[row]])
        advance(len(some))
    return list(found)


def batches(lengths: Sequence[int], batch: int | None) -> Iterator[list[int]]:
    """The rows' numbers, the longest first: `batch` at a time, or as many as make up about FORWARD_TOKENS tokens."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        size = batch or max(1, FORWARD_TOKENS // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def _losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Loss of every token but the first of each sequence, (B, T - 1), in float32."""
    return _of_logits(model(input_ids=ids[:, :-1], use_cache=False).logits, ids)


def _of_logits(logits: Tensor, ids: Tensor) -> Tensor:
    return next_token(logits.float(), ids.to(logits.device, torch.long)[:, 1:])
