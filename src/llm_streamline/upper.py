"""The frozen rest of the model above a window: what a loss of logits looks through, for student and teacher alike.

Captured calls are replayed through the model's own layers, and its own forward makes logits of a few positions at a
time with its layers standing aside, so that no second copy of a weight and never all logits are held.
Shapes: B sequences, T tokens, D width, V tokens of the vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """The layers [boundary, L), the norm and the head of a model none of whose parameters is trained."""

    model: PreTrainedModel
    boundary: int
    autocast: bool
    temperature: float = 1.0
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

    def _precision(self) -> Any:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast)

    def _divergence(self, ids: Tensor, teacher: Tensor, part: Part) -> Piece:
        def piece(student: Tensor, cut: slice) -> Tensor:
            with torch.no_grad():
                target = self.logits(ids[:, cut], teacher[:, cut])
            return kl(self.logits(ids[:, cut], student), target, part.top, self.temperature).sum()

        return piece

    def _next_token(self, ids: Tensor) -> Piece:
        def piece(student: Tensor, cut: slice) -> Tensor:
            return next_token(self.logits(ids[:, cut], student), ids[:, cut.start + 1 : cut.stop + 1]).sum()

        return piece

    def _in_chunks(self, state: Tensor, piece: Piece) -> Tensor:
        """The mean of a loss over the tokens of a state (B, T, D); each chunk's gradient is taken at once."""
        sequences, length, _ = state.shape
        size = chunk_positions(sequences, self.model.config.vocab_size)
        wanted = torch.is_grad_enabled() and state.requires_grad
        total = torch.zeros((), device=state.device, dtype=torch.promote_types(state.dtype, torch.float32))
        gradients: list[Tensor] = []
        for start in range(0, length, size):
            cut = slice(start, min(start + size, length))
            chunk = state.detach()[:, cut].requires_grad_(wanted)
            with self._precision():
                loss = piece(chunk, cut) / (sequences * length)
            total += loss.detach()
            gradients += torch.autograd.grad(loss, chunk) if wanted else ()
        return _WithGradient.apply(state, total, torch.cat(gradients, dim=1)) if wanted else total


def _replay(layer: nn.Module, call: LayerCall, state: Tensor) -> Tensor:
    with onloaded(layer) as module:
        return call.replay(module, state)


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient with respect to a state is known already."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (outer * gradient).to(gradient.dtype), None, None
