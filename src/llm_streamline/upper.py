"""The frozen rest of the model above a window: what a loss of logits looks through, for student and teacher alike.

Captured calls are replayed through the model's own layers, and its own forward makes logits of a few positions at a
time with its layers standing aside, so that no second copy of a weight and never all logits are held.
Shapes: B sequences, T tokens, D width, V tokens of the vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llm_streamline.families import layers_of
from llm_streamline.forward import LayerCall, Passage
from llm_streamline.layerwise import Layerwise
from llm_streamline.losses import kl, next_token
from llm_streamline.objective import Part
from llm_streamline.offload import is_offloaded, onloaded

CHUNK_LOGITS = 2**25  # logits made at once: 128 MiB in float32, of which a loss and its gradient hold several

# The summed loss of a slice of positions, from the student's state there (B, n, D)
Piece = Callable[[Tensor, slice], Tensor]


def chunk_positions(sequences: int, vocabulary: int) -> int:
    """Positions of every one of B sequences of which logits are made at once; one at least."""
    return max(1, CHUNK_LOGITS // (vocabulary * sequences))


@dataclass
class Upper:
    """The layers [boundary, L), the norm and the head of a model none of whose parameters is trained.

    `own` are the student's weights of norm and head, by the model's names, where it has trained ones.
    """

    model: PreTrainedModel
    boundary: int
    autocast: bool
    temperature: float = 1.0
    own: Mapping[str, Tensor] = field(default_factory=dict)
    _layerwise: Layerwise = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("the layers above a window are not trained: call model.requires_grad_(False)")
        self._layerwise = Layerwise(self.model)
        self._offloaded = is_offloaded(self.model)

    def loss(self, passage: Passage, state: Tensor, part: Part) -> Tensor:
        """The mean over tokens of a loss of logits, from the student's state (B, T, D) at the boundary.

        The teacher's is `passage.leaving`. What is returned has a gradient with respect to `state`.
        """
        with self._precision():
            (flow,) = self._layerwise.enter([passage.ids])
            student = self.rise(state.to(passage.leaving.dtype), flow.calls)
            if part.kind == "lm":
                student = student[:, :-1]  # nothing comes after the last token
                piece = self._next_token(flow.ids)
            else:
                with torch.no_grad():
                    piece = self._divergence(flow.ids, self.rise(passage.leaving, flow.calls), part)
        return self._in_chunks(student, piece)

    def rise(self, state: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        """A state (B, T, D) at the boundary -> at boundary L, before the final norm; `calls` are of all L layers.

        Layers that are on the disk are read for each pass, and once more for the way back.
        """
        for layer, call in list(zip(layers_of(self.model), calls, strict=True))[self.boundary :]:
            if self._offloaded and state.requires_grad:
                state = checkpoint(_replay, layer, call, state, use_reentrant=False, preserve_rng_state=False)
            else:
                state = _replay(layer, call, state)
        return state

    def logits(self, ids: Tensor, state: Tensor) -> Tensor:
        """(B, n, V) by the model's own norm and head, of n positions' ids (B, n) and states (B, n, D) at boundary L."""
        return self._layerwise.head(ids, state)

    def students_logits(self, ids: Tensor, state: Tensor) -> Tensor:
        """As `logits`, by the student's own norm and head where it has them."""
        return self._layerwise.head(ids, state, self.own)

    def _precision(self) -> Any:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast)

    def _divergence(self, ids: Tensor, teacher: Tensor, part: Part) -> Piece:
        length = ids.shape[1]
        weight = part.text * length / (length - 1)  # nothing comes after the last token

        def piece(student: Tensor, cut: slice) -> Tensor:
            with torch.no_grad():
                target = self.logits(ids[:, cut], teacher[:, cut])
            logits = self.students_logits(ids[:, cut], student)
            loss = kl(logits, target, part.top, self.temperature).sum()
            if not part.text:
                return loss
            labels = ids[:, cut.start + 1 : cut.stop + 1]
            return loss + weight * next_token(logits[:, : labels.shape[1]], labels).sum()

        return piece

    def _next_token(self, ids: Tensor) -> Piece:
        def piece(student: Tensor, cut: slice) -> Tensor:
            logits = self.students_logits(ids[:, cut], student)
            return next_token(logits, ids[:, cut.start + 1 : cut.stop + 1]).sum()

        return piece

    def _in_chunks(self, state: Tensor, piece: Piece) -> Tensor:
        """The mean of a loss over the tokens of a state (B, T, D); each chunk's gradient is taken at once."""
        sequences, length, _ = state.shape
        size = chunk_positions(sequences, self.model.config.vocab_size)
        moved = [one for one in (state, *self.own.values()) if torch.is_grad_enabled() and one.requires_grad]
        total = torch.zeros((), device=state.device, dtype=torch.promote_types(state.dtype, torch.float32))
        gradients = [torch.zeros_like(one) for one in moved]
        for start in range(0, length, size):
            cut = slice(start, min(start + size, length))
            chunk = state.detach()[:, cut].requires_grad_(state.requires_grad)
            with self._precision():
                loss = piece(chunk, cut) / (sequences * length)
            total += loss.detach()
            leaves = [chunk if one is state else one for one in moved]
            for one, summed, gradient in zip(moved, gradients, _gradients(loss, leaves), strict=True):
                (summed[:, cut] if one is state else summed).add_(gradient)
        return _WithGradient.apply(total, gradients, *moved) if moved else total


def _gradients(loss: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(loss, leaves) if leaves else ()


def _replay(layer: nn.Module, call: LayerCall, state: Tensor) -> Tensor:
    with onloaded(layer) as module:
        return call.replay(module, state)


class _WithGradient(torch.autograd.Function):
    """A loss whose gradients with respect to what has moved it are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *moved: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *((outer * gradient).to(gradient.dtype) for gradient in ctx.saved_tensors)
