"""LayerPlan + tokens -> trained replacement (Fit): distillation on hidden states, Eq. 4 of the paper.

The frozen layers [0, window.stop) run once per batch and nothing above them; gradients exist only in the
replacement; no hidden state is kept past its batch. A run that was stopped goes on from its last snapshot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_streamline.errors import Stopped, UserError
from llm_streamline.forward import Passage
from llm_streamline.history import History, Track
from llm_streamline.interruption import stop_between_steps
from llm_streamline.passages import passages_of
from llm_streamline.progress import Advance, progress, say
from llm_streamline.recipe import Recipe
from llm_streamline.records import Fit, Window
from llm_streamline.replacement import ReplacementLayers
from llm_streamline.snapshot import Snapshot

FEWEST_STEPS = 250
LARGEST_BATCH_TOKENS = 16_384


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

    def continued(self, snapshot: Snapshot) -> Settings:
        """With the batch of a run that is continued: where it was left open, another machine would choose another."""
        settings = replace(self, batch=snapshot.kept_setting().get("batch", self.batch))
        snapshot.setting = asdict(replace(settings, autocast=False))  # whose number format a machine may change
        return settings


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
    snapshot: Snapshot | None = None

    def passages(self, batches: Sequence[Tensor]) -> Iterator[Passage]:
        """What crosses the window's boundaries on each micro-batch of token ids (B, T), made when it is asked for."""
        return passages_of(self.model, self.window, self.settings.autocast)(batches)

    def loss(self, passage: Passage) -> Tensor:
        """The distillation loss on one micro-batch."""
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.settings.autocast):
            prediction = self.replacement.run(passage.entering.float(), passage.calls)
        return LOSSES[self.settings.loss](prediction.float(), passage.leaving.float())

    @torch.no_grad()
    def validate(self, blocks: Tensor) -> float:
        passages = self.passages(blocks.split(self.settings.batch))
        return sum(self.loss(one).item() * len(one.entering) for one in passages) / len(blocks)

    def step(self, optimizer: torch.optim.Optimizer, passages: Iterator[Passage], sequences: int, lr: float) -> Tensor:
        """One optimizer step on the next `sequences` of `passages`; returns the loss before it."""
        total, left = torch.zeros((), device=self.model.device), sequences
        while left > 0:
            passage = next(passages)
            left -= len(passage.entering)
            share = len(passage.entering) / sequences  # so that a short last micro-batch weighs what it holds
            loss = self.loss(passage) * share
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
        """Train on (N, T) token ids in the order given and leave the best weights in the replacement.

        A snapshot is continued, to the bit, and written now and then. Errors: UserError for a loss that is no number;
        Stopped, with a snapshot written, where the process is asked to end.
        """
        groups = training.split(self.settings.batch * self.settings.accumulate)
        optimizer = self.optimizer()
        history = History(self.replacement, lambda: self.validate(validation), len(groups), self.track)
        if self.snapshot is not None and self.snapshot.restore(self.replacement, optimizer, history):
            say(f"resumed at step {history.step} of {history.steps}", self.quiet)
        else:
            history.begin()
        with progress("training", training.numel(), self.quiet) as advance:
            advance(history.tokens)
            self._train(groups, optimizer, history, advance)
        return self._conclude(training, history)

    def _train(
        self, groups: Sequence[Tensor], optimizer: torch.optim.Optimizer, history: History, advance: Advance
    ) -> None:
        """The steps that are left, with a snapshot where one is due."""
        left = groups[history.step :]
        passages = self.passages([ids for blocks in left for ids in blocks.split(self.settings.batch)])
        with stop_between_steps() as asked:
            for blocks in left:
                lr = learning_rate(history.step, len(groups), self.settings)
                history.add(blocks.numel(), lr, self.step(optimizer, passages, len(blocks), lr))
                advance(blocks.numel(), history.note())
                if self.snapshot is not None and (self.snapshot.due or asked()):
                    self.snapshot.write(self.replacement, optimizer, history)
                if asked():
                    raise Stopped(asked(), self._outlook(history))

    def _outlook(self, history: History) -> str:
        at = f"at step {history.step} of {history.steps}"
        return f"the same command continues {at}" if self.snapshot else f"it was {at}, which is lost"

    def _conclude(self, training: Tensor, history: History) -> Fit:
        self.replacement.load_state_dict(history.best_weights)
        if history.best.step == 0:
            say("training did not lower the validation loss; the replacement stays as it started.", self.quiet)
        settings, seconds = self.settings, history.seconds
        return Fit(
            loss=settings.loss,
            steps=history.steps,
            tokens=history.tokens,
            batch=settings.batch,
            accumulate=settings.accumulate,
            block=training.shape[1],
            lr=settings.lr,
            min_lr=settings.min_lr,
            last_lr=history.lr,
            validation_before=history.checks[0].loss,
            validation_best=history.best.loss,
            best_step=history.best.step,
            trained_parameters=sum(parameter.numel() for parameter in self.replacement.trained()),
            seconds=seconds,
            tokens_per_second=history.tokens / max(seconds, 1e-9),
            device=str(self.model.device),
            compute="bfloat16 autocast" if settings.autocast else str(self.model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            curve=history.curve,
            validation=history.checks,
        )
