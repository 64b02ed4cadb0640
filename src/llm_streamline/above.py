"""What follows the last layer: the final norm and the head, which can train with the layers.

A head that is the table of the embeddings as well trains as a matrix of its own, and the saved model has both. Weights
go by the source's names.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_streamline.errors import UserError
from llm_streamline.families import final_norm
from llm_streamline.heal import HEAD, NORM, Heal


def weights_above(model: PreTrainedModel, wanted: Sequence[str]) -> dict[str, Tensor]:
    """By name the parameters of the model's 'norm' and 'head', of those that are wanted. Errors: UserError."""
    found: dict[str, Tensor] = {}
    for one, module in ((NORM, final_norm(model)), (HEAD, model.get_output_embeddings())):
        if one not in wanted:
            continue
        own = dict(_named(model, module)) if module is not None else {}
        if not own:
            raise UserError(f"--heal {one} finds no {one} with weights after the last layer; leave it out.")
        found |= own
    return found


def tied(model: PreTrainedModel) -> bool:
    """Whether the head is the table of the embeddings as well."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def head_of_its_own(model: PreTrainedModel, heal: Heal | None) -> int:
    """The parameters that the saved model has more, as its head trains and was one with the embeddings."""
    if heal is None or HEAD not in heal.above or not tied(model):
        return 0
    return int(model.get_output_embeddings().weight.numel())


def untie(model: PreTrainedModel) -> None:
    """Give the head a matrix of its own, with what it holds now."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False


def _named(model: PreTrainedModel, module: nn.Module) -> list[tuple[str, Tensor]]:
    (path,) = (name for name, one in model.named_modules() if one is module)
    return [(f"{path}.{name}", value) for name, value in module.named_parameters()]
