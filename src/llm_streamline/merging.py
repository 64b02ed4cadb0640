"""A window's layers made one, without any training: LaCo (arXiv 2402.11187).

Every matrix is the first layer's plus what each later one differs from it by: W_1 + sum (W_k - W_1), k = 2..n. Norms
and biases stay the first layer's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from llm_streamline.errors import UserError
from llm_streamline.families import layers_of
from llm_streamline.offload import onloaded
from llm_streamline.records import Window
from llm_streamline.replacement import ReplacementLayers, copied

MERGED = "merged"


def merged_layers(model: PreTrainedModel, windows: Sequence[Window]) -> ReplacementLayers:
    """One float32 layer for each window, on the CPU. Errors: UserError where a window's layers are not of one shape."""
    layers = layers_of(model)
    found = [_merged([layers[number] for number in window.layers()], window) for window in windows]
    return ReplacementLayers(found).eval().requires_grad_(True)


@torch.no_grad()
def _merged(layers: Sequence[nn.Module], window: Window) -> nn.Module:
    first, *later = layers
    merged = copied(first).float().cpu()
    weights = {name: value for name, value in merged.named_parameters() if value.dim() > 1}
    own = {name: value.clone() for name, value in weights.items()}
    for layer in later:
        with onloaded(layer) as bare:
            theirs = dict(bare.named_parameters())
            for name, value in weights.items():
                if name not in theirs or theirs[name].shape != value.shape:
                    raise UserError(
                        f"--replace {MERGED} adds up weights, and {name} is not alike in all layers of {window}; "
                        "use --replace layer, or a --window of layers that are."
                    )
                value.add_(theirs[name].float().cpu() - own[name])
    return merged
