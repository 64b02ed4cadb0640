"""A model's parameters, counted exactly without its weights, as a plan is made of them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from llm_streamline.above import head_of_its_own
from llm_streamline.families import parameter_counts
from llm_streamline.heal import parse_heal
from llm_streamline.recipe import Recipe
from llm_streamline.records import ModelShape
from llm_streamline.replacement import build_replacement
from llm_streamline.runtimes.patterns import gguf_period
from llm_streamline.staying import sorts


def shape_of(skeleton: PreTrainedModel, recipe: Recipe) -> ModelShape:
    """The counts of a model on the device that holds nothing, and of what the recipe adds to it.

    Errors: UserError for a model that the format it is to be exported to cannot hold whatever goes.
    """
    total, layers = parameter_counts(skeleton)
    network = None
    if recipe.network:
        with torch.device("meta"):
            network = build_replacement(skeleton, [0], "random", 0, recipe.replace).count()
    return ModelShape(
        name=recipe.model,
        model_type=skeleton.config.model_type,
        total=total,
        layers=layers,
        network=network,
        untied=head_of_its_own(skeleton, parse_heal(recipe.heal)),
        period=gguf_period(skeleton.config, recipe.model) if recipe.for_ else 1,
        sorts=sorts(skeleton.config),
    )
