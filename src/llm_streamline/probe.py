"""How long a layer takes here: a random one of the model's own kind is timed for a moment, forward and in training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llm_streamline.estimate import Estimate
from llm_streamline.families import sliced_config
from llm_streamline.forward import run_window
from llm_streamline.moments import Moments
from llm_streamline.optimizers import make_optimizer, optimizer_for
from llm_streamline.recipe import Recipe
from llm_streamline.records import Window
from llm_streamline.replacement import build_replacement
from llm_streamline.sizes import Sizes

TOKENS, VOCABULARY = 1024, 128


@dataclass(frozen=True)
class Rates:
    """Seconds: for a token through one frozen layer, and for one that the replacement learns from, besides."""

    forward: float
    training: float


def probe(config: PretrainedConfig, sizes: Sizes, dtype: torch.dtype, device: str, recipe: Recipe) -> Rates:
    """Time a model of one layer with a small vocabulary, on random tokens in the micro-batches of the run."""
    small = sliced_config(config, [0])
    small.vocab_size, small.pad_token_id = VOCABULARY, None
    model = AutoModelForCausalLM.from_config(small, dtype=dtype).to(device).eval().requires_grad_(False)
    ids = torch.randint(VOCABULARY, (max(1, TOKENS // sizes.block), sizes.block), device=device)
    window, autocast = Window(start=0, stop=1), dtype == torch.bfloat16
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        forward = _seconds(lambda: run_window(model, window, ids), device) / ids.numel()
        if not sizes.trained:
            return Rates(forward, 0.0)
        if sizes.solved:
            return Rates(forward, _adding(model, ids, device))
        passage = run_window(model, window, ids[: sizes.batch])
        replacement = build_replacement(model, [0], "random", 0, recipe.replace).to(device)
        name = optimizer_for(recipe, sizes.training // sizes.block)
        optimizer = make_optimizer(name, replacement.paces(), lr=1e-3, decay=0.0)

        def step() -> None:
            prediction = replacement.run(passage.entering.float(), passage.calls)
            (prediction.float() - passage.leaving.float()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        training = _seconds(step, device) / passage.entering.shape[:2].numel()
    return Rates(forward, training * max(1, sizes.trained // sizes.layer))


def _adding(model: PreTrainedModel, ids: torch.Tensor, device: str) -> float:
    """Seconds for a token of states to be added to second moments."""
    states = model.get_input_embeddings()(ids)
    moments = Moments.of_widths(states.shape[-1], states.shape[-1])
    return _seconds(lambda: moments.add(states, states), device) / ids.numel()


def _seconds(action: Callable[[], object], device: str) -> float:
    """The second of two times: the first also warms up."""
    spent = 0.0
    for _ in range(2):
        started = time.perf_counter()
        action()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        spent = time.perf_counter() - started
    return spent


def timed(estimate: Estimate, sizes: Sizes, rates: Rates) -> Estimate:
    """With the seconds that the tokens of each stage take, at most: as if every window ended at the last layer.

    A loss of logits takes the teacher through the layers above, too, and the student there and back: twice more.
    """
    through = rates.forward * sizes.layers
    validated = sizes.rounds * sizes.judged(sizes.training // sizes.rounds)
    above = rates.forward * (sizes.above + (sizes.width * sizes.vocabulary / sizes.layer if sizes.logits else 0))
    distilled = sizes.training * rates.training + (2 * sizes.training + validated) * above
    spent = {
        "analysis": sizes.calibration * through,
        "training": (sizes.training + validated) * through + distilled,
        "start": sizes.starting * through,
        "closed form": sizes.solved * (sizes.training + sizes.validation) * (through + rates.training),
        "ranking": sum(stage.tokens for stage in estimate.stages if stage.name == "ranking") * through,
        "scores": 3 * sizes.validation * through,
    }
    stages = [stage.model_copy(update={"seconds": spent.get(stage.name)}) for stage in estimate.stages]
    return estimate.model_copy(update={"stages": stages})
