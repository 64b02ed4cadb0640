"""The linear map in closed form: excess loss by tokens, by the loss that it is of, and folded or free.

`python -m bench.linear MODEL TEXT [--remove 25% 42%] [--tokens 8k 32k 128k 1M] [--loss nmse mse]` prints Markdown. Maps
are applied by hooks, in float32; windows, text and validation part are those of `compress` with the same values.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from llm_streamline import choose, run
from llm_streamline.forward import mlp_mapped, substituted
from llm_streamline.linear import Reading, solve_window
from llm_streamline.quantities import parse_count
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import LayerPlan, LinearFit
from llm_streamline.scoring.perplexity import next_token_loss
from llm_streamline.text import shuffled
from llm_streamline.workspace import Workspace

FORMS = {"linear": True, "linear:free": False}


class Mapped(nn.Module):
    """x + x S in a layer's place."""

    def __init__(self, mapping: Tensor) -> None:
        super().__init__()
        self.mapping = mapping.float()

    def forward(self, hidden: Tensor, *_: object, **__: object) -> Tensor:
        return hidden + hidden @ self.mapping


def workspace(options: argparse.Namespace, replace: str, remove: str) -> Workspace:
    tokens = max(map(parse_count, options.tokens))
    values = {"model": options.model, "data": options.text, "tokens": tokens, "replace": replace, "remove": remove}
    return Workspace(Recipe(**values, custom_code=True, seed=options.seed), Runtime(compute="float32"))


def excess(work: Workspace, plan: LayerPlan, mapping: Tensor | None, dense: float) -> float:
    with ExitStack() as held:
        free = [] if mapping is None or plan.folded is not None else [Mapped(mapping)]
        held.enter_context(substituted(work.model, plan.window, free))
        if mapping is not None and plan.folded is not None:
            held.enter_context(mlp_mapped(work.model, plan.folded, torch.eye(len(mapping)) + mapping))
        return next_token_loss(work.model, work.parts.validation, 8, "validation", True).nats - dense


def row(remove: str, replace: str, plan: LayerPlan, fit: LinearFit, lost: float) -> str:
    ridge = "none" if fit.ridge is None else f"{fit.ridge:g}"
    left = f"{fit.unexplained:.3f} | {fit.validation_unexplained:.3f}"
    return (
        f"| {remove} | {plan.window} | `{replace}` | {fit.loss} | {fit.tokens:,} | {ridge} | {left} | {lost:.4f} "
        f"| {fit.seconds:.0f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--remove", nargs="+", default=["25%", "42%"])
    parser.add_argument("--tokens", nargs="+", default=["8k", "32k", "128k", "1M"])
    parser.add_argument("--loss", nargs="+", default=["nmse", "mse"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    first = workspace(options, "linear", options.remove[0])
    similarity = run.measure(first)
    blocks = shuffled(first.parts.training, options.seed)
    dense = next_token_loss(first.model, first.parts.validation, 8, "dense").nats
    print("| remove | window | form | loss | tokens | ridge | left | left, validation | excess, nats | time |")
    print("|" + "---|" * 10)
    for remove in options.remove:
        for replace, folded in FORMS.items():
            work = workspace(options, replace, remove)
            work.__dict__.update(model=first.model, parts=first.parts)
            plan = choose.choose(similarity, work.shape, work.recipe)
            if folded:
                print(f"| {remove} | {plan.window} | `none` | | | | | | {excess(work, plan, None, dense):.4f} | |")
            for loss in options.loss:
                for tokens in options.tokens:
                    part = blocks[: max(1, parse_count(tokens) // blocks.shape[1])]
                    reading = Reading(folded, loss, 16)
                    mapping, fit = solve_window(work.model, plan.window, part, work.parts.validation, reading)
                    print(row(remove, replace, plan, fit, excess(work, plan, mapping, dense)), flush=True)


if __name__ == "__main__":
    main()
