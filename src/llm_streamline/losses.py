"""The losses: of hidden states at the window's end (Eq. 4 of the paper), and of next-token logits.

Shapes: B sequences, T tokens, D width, V tokens of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Eq. 4 as the paper has it: the mean squared error over tokens and width. A few massive activations rule it."""
    return nn.functional.mse_loss(prediction, target)


def nmse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ||prediction - target||^2 / ||target||^2: every token counts the same."""
    error = (prediction - target).square().sum(dim=-1)
    return (error / target.square().sum(dim=-1).clamp_min(1e-12)).mean()


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of 1 - cos(prediction, target). It says nothing of the states' lengths."""
    return (1 - nn.functional.cosine_similarity(prediction, target, dim=-1)).mean()


LOSSES = {"mse": mse, "nmse": nmse, "cosine": cosine}


def kl(student: Tensor, teacher: Tensor, top: int = 0, temperature: float = 1.0) -> Tensor:
    """temperature^2 * KL(p || q) of each token, (B, T), from logits (B, T, V).

    p = softmax(teacher / temperature) and q = softmax(student / temperature), after Hinton et al., arXiv 1503.02531.
    With `top` both softmaxes are over the teacher's `top` largest logits alone, so that what the student gives to all
    other tokens does not count.
    """
    student, teacher = _precise(student), _precise(teacher)
    if top:
        teacher, likeliest = teacher.topk(top, dim=-1)
        student = student.gather(-1, likeliest)
    log_p, log_q = ((logits / temperature).log_softmax(dim=-1) for logits in (teacher, student))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def next_token(student: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each token, (B, T), from logits (B, T, V) and the ids (B, T) that come next."""
    rows = _precise(student).flatten(0, 1)  # tokens in rows: with V in the middle this takes five times as long on CPUs
    return nn.functional.cross_entropy(rows, labels.flatten(), reduction="none").view_as(labels)


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
