"""The linear map in closed form: excess loss by tokens, by the loss that it is of, and folded or free.

`python -m bench.linear RUN [--remove 25% 42%] [--tokens 8k 32k 128k 1M]` prints Markdown. RUN is the folder of a
finished `compress`: its model, text, similarity and dense loss are used, and as many of its training tokens. The frozen
layers are run once for all maps; what a map makes of the validation part's states then goes through the layers above
the window, in float32.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from llm_streamline import choose
from llm_streamline.families import layers_of
from llm_streamline.forward import at_boundary, mlp_outputs, run_until_stopped, stop_forward
from llm_streamline.layerwise import Layerwise
from llm_streamline.linear import best_map
from llm_streamline.moments import Moments
from llm_streamline.progress import progress
from llm_streamline.quantities import parse_count
from llm_streamline.recipe import Recipe, Runtime, read_yaml
from llm_streamline.records import LayerPlan, Scores, Similarity
from llm_streamline.text import shuffled
from llm_streamline.workspace import RECIPE, Workspace

FORMS, LOSSES, BATCH = ("linear", "linear:free"), ("nmse", "mse"), 16
States = dict[str, Tensor]  # by name: what the map is given, and the window's ends


def workspace(options: argparse.Namespace, replace: str, remove: str) -> Workspace:
    values = {"replace": replace, "remove": remove, "custom_code": True}
    return Workspace(Recipe(**{**read_yaml(options.run / RECIPE), **values}), Runtime(compute="float32"))


def states(work: Workspace, plans: list[LayerPlan], ids: Tensor) -> list[States]:
    """One forward for all plans."""
    seen: dict[int, Tensor] = {}
    with ExitStack() as held:
        for boundary in {end for plan in plans for end in (plan.window.start, plan.window.stop)}:
            held.enter_context(
                at_boundary(work.model, boundary, lambda state, _, at=boundary: seen.update({at: state}))
            )
        added = [held.enter_context(mlp_outputs(work.model, plan.window.start - 1)) for plan in plans]
        held.enter_context(at_boundary(work.model, max(plan.window.stop for plan in plans), stop_forward))
        run_until_stopped(work.model, ids.long())
    found = []
    for plan, (mlp,) in zip(plans, added, strict=True):
        entering, leaving = seen[plan.window.start], seen[plan.window.stop]
        given = mlp.view_as(entering) if plan.folded is not None else entering
        found.append({"given": given, "entering": entering, "leaving": leaving})
    return found


def add(moments: Moments, loss: str, one: States) -> None:
    weight = 1 / one["leaving"].double().square().sum(dim=-1) if loss == "nmse" else None
    moments.add(one["given"], one["leaving"].double() - one["entering"].double(), weight)


def gathered(work: Workspace, plans: list[LayerPlan], blocks: Tensor, stops: list[int]) -> dict[tuple, Moments]:
    """Moments by plan, loss and tokens, of the first so many tokens."""
    width = work.config.hidden_size
    sums = {key: Moments.of_widths(width, width) for key in product(range(len(plans)), LOSSES)}
    found: dict[tuple, Moments] = {}
    sizes = [stop // blocks.shape[1] for stop in stops]
    with progress("states", sizes[-1] * blocks.shape[1]) as advance:
        for first, last in zip([0, *sizes], sizes, strict=False):
            for ids in blocks[first:last].split(BATCH):
                for number, one in enumerate(states(work, plans, ids)):
                    for loss in LOSSES:
                        add(sums[number, loss], loss, one)
                advance(ids.numel())
            for key, moments in sums.items():
                found[(*key, last)] = Moments(moments.xx.clone(), moments.xy.clone(), moments.yy, moments.tokens)
    return found


def excess(work: Workspace, plan: LayerPlan, kept: list[tuple[Tensor, States]], mapping: Tensor, dense: float) -> float:
    """Next-token loss over the dense model's, in nats, with the mapped states sent through the layers above."""
    layers, total, count = Layerwise(work.model), 0.0, 0
    for ids, one in kept:
        (flow,) = layers.enter([ids])
        flow.state = one["entering"] + one["given"] @ mapping.float()
        layers.advance([flow], range(plan.window.stop, len(layers_of(work.model))))
        logits = layers.logits(flow)[:, :-1].flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten().long(), reduction="sum"))
        count += ids[:, 1:].numel()
    return total / count - dense


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--remove", nargs="+", default=["25%", "42%"])
    parser.add_argument("--tokens", nargs="+", default=["8k", "32k", "128k", "1M"])
    options = parser.parse_args()
    asked = [workspace(options, *pair) for pair in product(FORMS, options.remove)]
    work = asked[0]
    similarity = Similarity.read(options.run / "similarity.json")
    plans = [choose.choose(similarity, one.shape, one.recipe) for one in asked]
    blocks, stops = shuffled(work.parts.training, work.recipe.seed), [parse_count(tokens) for tokens in options.tokens]
    found = gathered(work, plans, blocks, stops)
    kept: list[list[tuple[Tensor, States]]] = [[] for _ in plans]
    held_out = {key: Moments.of_widths(*[work.config.hidden_size] * 2) for key in product(range(len(plans)), LOSSES)}
    for ids in work.parts.validation.split(BATCH):
        for number, one in enumerate(states(work, plans, ids)):
            kept[number].append((ids, one))
            for loss in LOSSES:
                add(held_out[number, loss], loss, one)
    dense = Scores.read(options.run / "scores.json").dense.nats
    print("| window | form | loss | tokens | ridge | left | left, validation | excess, nats |\n|" + "---|" * 8)
    nothing = torch.zeros(work.config.hidden_size, work.config.hidden_size)
    for number, plan in enumerate(plans):
        print(
            f"| {plan.window} | `none` | | | | | | {excess(work, plan, kept[number], nothing, dense):.4f} |", flush=True
        )
    for (number, loss, _), learned in found.items():
        plan, judged = plans[number], held_out[number, loss]
        mapping, ridge = best_map(learned, judged)
        left = f"{learned.unexplained(mapping):.3f} | {judged.unexplained(mapping):.3f}"
        lost = excess(work, plan, kept[number], mapping, dense)
        told = "none" if ridge is None else f"{ridge:g}"
        print(
            f"| {plan.window} | `{plan.replace}` | {loss} | {learned.tokens:,} | {told} | {left} | {lost:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
