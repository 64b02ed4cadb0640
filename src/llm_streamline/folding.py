"""A map folded into the MLP below a window: the layer that carries it, and the proof that folding changed nothing else.

With m what the MLP of the layer below the window adds to the stream and y the stream before that, the state that
leaves is m T + y (ReplaceMe, arXiv 2505.02819). T goes into the MLP's last projection, for row vectors W T and b T.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llm_streamline.errors import UserError, VerificationError
from llm_streamline.families import layers_of, mlp_output, output_weights
from llm_streamline.forward import mlp_mapped, shortened, substituted
from llm_streamline.layerwise import logits_of
from llm_streamline.records import LayerPlan
from llm_streamline.replacement import ReplacementLayers, copied

TOLERANCE = 1e-4  # of the largest logit, in float32: (h W) T and h (W T) are not rounded alike


class FoldedLayer(ReplacementLayers):
    """The layer below the window with `mapping` (D, D) folded into its MLP, in float32 on the CPU."""

    def __init__(self, model: PreTrainedModel, place: int, mapping: Tensor) -> None:
        layer = copied(layers_of(model)[place]).float().cpu()
        fold(layer, model.config, mapping)
        super().__init__([layer])
        self.mapping = mapping
        self.changed = frozenset(output_weights(layer, model.config))  # keys within the layer
        self.eval().requires_grad_(False)


def check_foldable(config: PretrainedConfig, starts: Container[int]) -> None:
    """Errors: UserError where a map cannot be folded below every window that begins at one of `starts`."""
    mlp_output(config)
    if 0 in starts:
        raise UserError(
            "--replace linear changes the MLP of the layer below the window, and a window that begins at layer 0 has "
            "none below it; give --protect-first 1 or more, or a --window that begins later."
        )


@torch.no_grad()
def fold(layer: nn.Module, config: PretrainedConfig, mapping: Tensor) -> None:
    """Map, in place and in float64, what the layer's MLP adds: every output weight, expert and bias."""
    state, mapping = layer.state_dict(), mapping.double()
    for key, axis in output_weights(layer, config).items():
        several = state[key].dim() == 3  # experts, one at a time: together they are large
        for value in state[key] if several else state[key][None]:
            own = axis - several
            value.copy_(torch.tensordot(value.double(), mapping, dims=([own], [0])).movedim(-1, own))


def check_fold(source: PreTrainedModel, plan: LayerPlan, folded: FoldedLayer, prompts: Tensor) -> float:
    """The largest difference of a logit, relative to the largest, between the map folded and applied by a hook.

    Args: prompts: token ids (P, T). Errors: VerificationError where the two are not the same model.
    """
    assert plan.folded is not None
    with substituted(source, plan.window), mlp_mapped(source, plan.folded, folded.mapping):
        (wanted,) = logits_of(source, [prompts])
    with shortened(source, plan, list(folded)):
        (found,) = logits_of(source, [prompts])
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if not error <= TOLERANCE:  # also true of nan
        raise VerificationError(
            f"the map folded into layer {plan.folded} gives logits that differ by {error:.2g} relative from those of "
            f"the unfolded one, over the tolerance of {TOLERANCE:g}; use --replace layer, and please report it."
        )
    return error
