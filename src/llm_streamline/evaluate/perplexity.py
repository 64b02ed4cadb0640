"""Next-token loss of a model on blocks of token ids, in nats per token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_streamline.progress import progress
from llm_streamline.records import Loss


@torch.no_grad()
def next_token_loss(model: PreTrainedModel, blocks: Tensor, batch: int, title: str, quiet: bool = False) -> Loss:
    """Mean negative log-likelihood in nats per token over `blocks` (N, T), with its standard error over sequences."""
    losses: list[float] = []
    with progress(f"loss of {title}", len(blocks), quiet) as advance:
        for ids in blocks.split(batch):
            losses += _sequence_losses(model, ids.to(model.device, torch.long)).tolist()
            advance(len(ids), "sequences")
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / max(len(losses) - 1, 1)
    tokens = len(blocks) * (blocks.shape[1] - 1)
    return Loss(nats=mean, se=math.sqrt(variance / len(losses)), tokens=tokens, sequences=len(losses))


def _sequence_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean loss of each sequence, (B,), in float32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(dim=1)
