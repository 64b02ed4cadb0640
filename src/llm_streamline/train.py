"""LayerPlan + tokens -> trained replacement (Fit): distillation on hidden states, Eq. 4 of the paper.

The frozen layers [0, window.stop) run once per batch and nothing above them; gradients exist only in the
replacement; no hidden state is kept past its batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_streamline.errors import UserError
from llm_streamline.forward import run_window
from llm_streamline.progress import progress, say
from llm_streamline.recipe import Recipe
from llm_streamline.records import Check, Fit, Point, Window
from llm_streamline.replacement import ReplacementLayers

FEWEST_STEPS = 250
LARGEST_BATCH_TOKENS = 16_384
VALIDATIONS = 5
CURVE_POINTS = 100

Track = Callable[[dict[str, float], int], None]


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Eq. 4 as the paper has it: the mean squared error over tokens and width. A few massive activations rule it."""
    return nn.functional.mse_loss(prediction, target)


def nmse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ||prediction - target||^2 / ||target||^2: every token counts the same."""
    error = (prediction - target).square().sum(dim=-1)
    return (error / target.square().sum(dim=-1).clamp_min(1e-12)).mean()


LOSSES = {"mse": mse, "nmse": nmse}


@dataclass(frozen=True)
class Settings:
    """Training in plain numbers, nothing left to decide."""

    loss: str
    batch: int
    accumulate: int
    lr: float
    min_lr: float
    weight_decay: float
    warmup: float
    clip: float
    autocast: bool

    @classmethod
    def resolve(cls, recipe: Recipe, training: Tensor, width: int, memory: int, autocast: bool) -> Settings:
        """What the recipe leaves open is decided from the text, the model's width and the bytes of memory."""
        lr, min_lr = rates(recipe, width)
        return cls(
            loss=recipe.loss,
            batch=recipe.batch or default_batch(training, recipe, width, memory),
            accumulate=recipe.accumulate,
            lr=lr,
            min_lr=min_lr,
            weight_decay=recipe.weight_decay,
            warmup=recipe.warmup,
            clip=recipe.clip,
            autocast=autocast,
        )


def rates(recipe: Recipe, width: int) -> tuple[float, float]:
    """The first and last learning rate. Errors: UserError where the last would be the higher."""
    lr = recipe.lr or 1e-3 * min(1.0, math.sqrt(256 / width))
    min_lr = lr / 10 if recipe.min_lr is None else recipe.min_lr
    if min_lr > lr:
        raise UserError(
            f"--min-lr {min_lr:g} is above the learning rate of {lr:g}; give a smaller one, or a larger --lr."
        )
    return lr, min_lr


def default_batch(training: Tensor, recipe: Recipe, width: int, memory: int) -> int:
    """Sequences per micro-batch: at least 250 steps, at most 16k tokens a step, and what a quarter of memory holds."""
    blocks, block = training.shape
    for_steps = blocks // (FEWEST_STEPS * recipe.accumulate)
    for_tokens = LARGEST_BATCH_TOKENS // block
    # about 64 float32 values of the model's width are alive per token and layer while it trains
    for_memory = memory // 4 // (block * width * 4 * 64 * (recipe.occupied + 1))
    return max(1, min(for_steps, for_tokens, for_memory))


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up, then a half cosine that is exactly `min_lr` at the last of `steps` optimizer steps."""
    last = steps - 1
    warm = min(round(settings.warmup * steps), last)
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    share = (step - warm) / (last - warm) if last > warm else 1.0
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * share)) / 2


@dataclass
class Trainer:
    """Distils one window of a frozen model into its replacement."""

    model: PreTrainedModel
    window: Window
    replacement: ReplacementLayers
    settings: Settings
    quiet: bool = False
    track: Track = field(default=lambda values, step: None)

    def loss(self, ids: Tensor) -> Tensor:
        """The distillation loss on token ids (B, T)."""
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.autocast):
            passage = run_window(self.model, self.window, ids.to(device, torch.long))
            prediction = self.replacement.run(passage.entering.float(), passage.calls)
        return LOSSES[self.settings.loss](prediction.float(), passage.leaving.float())

    @torch.no_grad()
    def validate(self, blocks: Tensor) -> float:
        losses = [self.loss(ids).item() * len(ids) for ids in blocks.split(self.settings.batch)]
        return sum(losses) / len(blocks)

    def step(self, optimizer: torch.optim.Optimizer, blocks: Tensor, lr: float) -> Tensor:
        """One optimizer step on (batch * accumulate, T) token ids; returns the loss before it."""
        total = torch.zeros((), device=self.model.device)
        for ids in blocks.split(self.settings.batch):
            loss = self.loss(ids) * (len(ids) / len(blocks))  # so that a short last micro-batch weighs what it holds
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.replacement.trained(), self.settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        return total

    def optimizer(self) -> torch.optim.Optimizer:
        decay = self.settings.weight_decay
        return torch.optim.AdamW(self.replacement.trained(), lr=self.settings.lr, weight_decay=decay, fused=True)

    def fit(self, training: Tensor, validation: Tensor) -> Fit:
        """Train on (N, T) token ids in the order given and leave the best weights in the replacement."""
        groups = training.split(self.settings.batch * self.settings.accumulate)
        history = _History(self, validation, len(groups))
        optimizer = self.optimizer()
        with progress("training", training.numel(), self.quiet) as advance:
            for step, blocks in enumerate(groups, start=1):
                lr = learning_rate(step - 1, len(groups), self.settings)
                history.add(step, blocks.numel(), lr, self.step(optimizer, blocks, lr))
                advance(blocks.numel(), history.note())
        return history.fit(training)


class _History:
    """The curves, the clock and the best weights of one training run."""

    def __init__(self, trainer: Trainer, validation: Tensor, steps: int) -> None:
        self.trainer, self.validation, self.steps = trainer, validation, steps
        self.curve: list[Point] = []
        self.checks: list[Check] = []
        self.tokens = 0
        self.lr = 0.0
        self._pending: list[Tensor] = []
        self._check(0)
        self._started = time.perf_counter()
        self._validating = 0.0

    def add(self, step: int, tokens: int, lr: float, loss: Tensor) -> None:
        self.tokens += tokens
        self.lr = lr
        self._pending.append(loss)
        if step == self.steps or step % max(1, self.steps // CURVE_POINTS) == 0:
            self._point(step)
        if step == self.steps or step % max(1, self.steps // VALIDATIONS) == 0:
            started = time.perf_counter()
            self._check(step)
            self._validating += time.perf_counter() - started

    def _point(self, step: int) -> None:
        loss = torch.stack(self._pending).mean().item()
        self._pending.clear()
        if not math.isfinite(loss):
            raise UserError(
                f"the training loss is {loss} at step {step}; "
                f"begin in another folder with a smaller --lr than {self.trainer.settings.lr:g}."
            )
        self.curve.append(Point(step=step, tokens=self.tokens, lr=self.lr, loss=loss))
        self.trainer.track({"train/loss": loss, "train/lr": self.lr}, step)

    def _check(self, step: int) -> None:
        loss = self.trainer.validate(self.validation)
        if not self.checks or loss < self.best.loss:
            weights = self.trainer.replacement.state_dict()
            self._best_weights = {key: value.detach().cpu().clone() for key, value in weights.items()}
        self.checks.append(Check(step=step, loss=loss))
        self.trainer.track({"validation/loss": loss}, step)

    @property
    def best(self) -> Check:
        return min(self.checks, key=lambda check: check.loss)

    def note(self) -> str:
        return f"loss {self.curve[-1].loss:.4g}" if self.curve else ""

    def fit(self, training: Tensor) -> Fit:
        seconds = time.perf_counter() - self._started - self._validating
        self.trainer.replacement.load_state_dict(self._best_weights)
        if self.best.step == 0:
            say(
                "training did not lower the validation loss; the replacement stays as it started.",
                self.trainer.quiet,
            )
        settings, model = self.trainer.settings, self.trainer.model
        return Fit(
            loss=settings.loss,
            steps=self.steps,
            tokens=self.tokens,
            batch=settings.batch,
            accumulate=settings.accumulate,
            block=training.shape[1],
            lr=settings.lr,
            min_lr=settings.min_lr,
            last_lr=self.lr,
            validation_before=self.checks[0].loss,
            validation_best=self.best.loss,
            best_step=self.best.step,
            trained_parameters=sum(parameter.numel() for parameter in self.trainer.replacement.trained()),
            seconds=seconds,
            tokens_per_second=self.tokens / max(seconds, 1e-9),
            device=str(model.device),
            compute="bfloat16 autocast" if settings.autocast else str(model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            curve=self.curve,
            validation=self.checks,
        )
