"""LayerPlan + tokens -> trained replacement (Fit): distillation on hidden states, Eq. 4 of the paper, or on logits.

The frozen layers [0, window.stop) run once per batch, and those above only where a loss looks through them; weights
have gradients only in the replacement; no hidden state is kept past its batch. A run that was stopped goes on from its
last snapshot.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_streamline.errors import Dismissed, Stopped, UserError, WorkerLost
from llm_streamline.families import layers_of
from llm_streamline.forward import Passage
from llm_streamline.history import History, Track, checked, in_memory
from llm_streamline.interruption import stop_between_steps
from llm_streamline.losses import LOSSES
from llm_streamline.memory import default_batch
from llm_streamline.objective import Objective, Part, parse_objective
from llm_streamline.offload import is_offloaded
from llm_streamline.optimizers import ADAMW, default_rate, make_optimizer, optimizer_for
from llm_streamline.parallel import ALONE, World, sum_gradients
from llm_streamline.passages import Passages, passages_of
from llm_streamline.progress import Advance, progress, say
from llm_streamline.recipe import TEMPERATURE, Recipe
from llm_streamline.records import Fit, Window
from llm_streamline.replacement import ReplacementLayers
from llm_streamline.snapshot import Snapshot
from llm_streamline.upper import Upper


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
    temperature: float = 1.0
    optimizer: str = ADAMW

    @classmethod
    def resolve(cls, recipe: Recipe, training: Tensor, alive: tuple[int, int], memory: int, autocast: bool) -> Settings:
        """What the recipe leaves open is decided from the text, the layers alive and their width, and the memory."""
        optimizer = optimizer_for(recipe, len(training))
        lr, min_lr = rates(recipe, alive[1], optimizer)
        return cls(
            loss=recipe.loss_used,
            batch=recipe.batch or default_batch((len(training), training.shape[1]), recipe.accumulate, alive, memory),
            accumulate=recipe.accumulate,
            lr=lr,
            min_lr=min_lr,
            weight_decay=recipe.weight_decay,
            warmup=recipe.warmup,
            clip=recipe.clip,
            autocast=autocast,
            temperature=recipe.temperature or TEMPERATURE,
            optimizer=optimizer,
        )

    def continued(self, snapshot: Snapshot) -> Settings:
        """With batch and loss of a run that is continued: where left open, another machine would choose others."""
        kept = snapshot.kept_setting()
        settings = replace(self, **{name: kept.get(name, getattr(self, name)) for name in ("batch", "loss")})
        snapshot.setting = asdict(replace(settings, autocast=False))  # whose number format a machine may change
        return settings


def rates(recipe: Recipe, width: int, optimizer: str = ADAMW) -> tuple[float, float]:
    """The first and last learning rate. Errors: UserError where the last would be the higher."""
    lr = recipe.lr or default_rate(optimizer, width)
    min_lr = lr / 10 if recipe.min_lr is None else recipe.min_lr
    if min_lr > lr:
        raise UserError(
            f"--min-lr {min_lr:g} is above the learning rate of {lr:g}; give a smaller one, or a larger --lr."
        )
    return lr, min_lr


def _split(blocks: Tensor, batch: int) -> Sequence[Tensor]:
    return blocks.split(batch) if len(blocks) else ()  # torch would make one part, with nothing in it


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
    source: Passages | None = None  # of the passages, where the model is not simply run
    world: World = ALONE  # whose processes share every step's sequences and hold the same weights
    objective: Objective = field(init=False)
    _asked: Callable[[], int] = field(default=lambda: 0, init=False)
    _heard: list[float] = field(default_factory=list, init=False)  # what all have said with the last step

    def __post_init__(self) -> None:
        self.objective = parse_objective(self.settings.loss)

    @cached_property
    def upper(self) -> Upper:
        """What is above the window, which only some losses need."""
        own = self.replacement.above()
        return Upper(self.model, self.window.stop, self.settings.autocast, self.settings.temperature, own)

    def passages(self, batches: Sequence[Tensor]) -> Iterator[Passage]:
        """What crosses the window's boundaries on each micro-batch of token ids (B, T), made when it is asked for."""
        return (self.source or passages_of(self.model, self.window, self.settings.autocast))(batches)

    def loss(self, passage: Passage, part: Part) -> Tensor:
        """One of the objective's losses on one micro-batch."""
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.settings.autocast):
            prediction = self.replacement.run(passage.entering.float(), passage.calls)
        if part.above:
            return self.upper.loss(passage, prediction, part)
        return LOSSES[part.kind](prediction.float(), passage.leaving.float())

    @torch.no_grad()
    def validate(self, blocks: Tensor) -> float:
        """The objective's last loss on (N, T) token ids, whichever is trained on now: all checks can be compared."""
        passages = self.passages(_split(self.world.share(blocks), self.settings.batch))
        total = sum(self.loss(one, self.objective.measure).item() * len(one.entering) for one in passages)
        return float(self.world.sum_(torch.tensor(total, dtype=torch.float64))) / len(blocks)

    def step(
        self, optimizer: torch.optim.Optimizer, passages: Iterator[Passage], sequences: int, lr: float, part: Part
    ) -> Tensor:
        """One optimizer step on this process's share of the next `sequences`; returns the loss of all before it."""
        total, left = torch.zeros((), device=self.model.device), len(self.world.share(range(sequences)))
        while left > 0:
            passage = next(passages)
            left -= len(passage.entering)
            share = len(passage.entering) / sequences  # so that a short last micro-batch weighs what it holds
            loss = self.loss(passage, part) * share
            loss.backward()
            total += loss.detach()
        total = self._add_up(total)
        nn.utils.clip_grad_norm_(self.replacement.trained(), self.settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("pace", 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    def _add_up(self, loss: Tensor) -> Tensor:
        """Gradients and loss of all processes, with what each has to say: all have to stop at the same step."""
        if self.world.size == 1:
            return loss
        extra = torch.cat([loss[None], torch.tensor(self._words(), device=loss.device)])
        extra = sum_gradients(self.world, self.replacement.trained(), extra)
        self._heard = extra[1:].tolist()
        return extra[0].clone()

    def _words(self) -> list[float]:
        """Whether Ctrl-C, SIGTERM or the clock asks for a snapshot; the first process's clock rules."""
        due = self.snapshot is not None and self.world.first and self.snapshot.due
        return [float(word) for word in (self._asked() == signal.SIGINT, self._asked() == signal.SIGTERM, due)]

    def _said(self, last: bool) -> tuple[int, bool]:
        """Which signal has asked any process to stop, and whether a snapshot is due."""
        if self.world.size == 1:
            self._heard = self._words()
        elif last:  # nobody is to leave with a signal that the others have not heard of
            self._heard = self.world.sum_(torch.tensor(self._words())).tolist()
        interrupt, terminate, due = self._heard
        return int((interrupt and signal.SIGINT) or (terminate and signal.SIGTERM)), bool(due)

    def optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        return make_optimizer(settings.optimizer, self.replacement.paces(), settings.lr, settings.weight_decay)

    def fit(self, training: Tensor, validation: Tensor) -> Fit:
        """Train on (N, T) token ids in the order given and leave the best weights in the replacement.

        A snapshot is continued, to the bit, and written now and then. Errors: UserError for a loss that is no number;
        Stopped, with a snapshot written, where the process is asked to end.
        """
        groups = training.split(self.settings.batch * self.settings.accumulate)
        optimizer = self.optimizer()
        judged = validation[: checked(len(training), len(validation))]
        history = History(self.replacement, lambda: self.validate(judged), len(groups), self.track)
        history.keep = self.snapshot.keep_best if self.snapshot is not None else in_memory
        if self.snapshot is not None and self.snapshot.restore(self.replacement, optimizer, history):
            say(f"resumed at step {history.step} of {history.steps}", self.quiet)
            history.catch_up()
        else:
            history.begin()
        with progress("training", training.numel(), self.quiet) as advance:
            advance(history.tokens)
            try:
                self._train(groups, optimizer, history, advance)
            except WorkerLost as lost:
                raise self._left_alone(lost, optimizer, history) from lost
        return self._conclude(training, history)

    def _train(
        self, groups: Sequence[Tensor], optimizer: torch.optim.Optimizer, history: History, advance: Advance
    ) -> None:
        """The steps that are left, with a snapshot where one is due."""
        parts = self._announced([blocks.numel() for blocks in groups])
        history.switches = {step for step, (one, other) in enumerate(pairwise(parts), start=1) if one != other}
        left = groups[history.step :]
        own = [self.world.share(blocks) for blocks in left]
        passages = self.passages([ids for blocks in own for ids in _split(blocks, self.settings.batch)])
        with stop_between_steps() as self._asked:
            for blocks in left:
                lr, part = learning_rate(history.step, len(groups), self.settings), parts[history.step]
                history.add(blocks.numel(), lr, self.step(optimizer, passages, len(blocks), lr, part))
                advance(blocks.numel(), history.note())
                asked, due = self._said(last=history.step == history.steps)
                if asked or due:
                    self.world.alone(lambda: self._write(optimizer, history))
                if asked:
                    raise Stopped(asked, self._outlook(history)) if self.world.first else Dismissed(128 + asked)

    def _announced(self, tokens: Sequence[int]) -> list[Part]:
        """The loss of each step, told where there are several, or where one is slow."""
        if len(self.objective.parts) > 1:
            say(self.objective.describe(tokens), self.quiet)
        if self.objective.above and is_offloaded(self.model) and self.window.stop < len(layers_of(self.model)):
            say("the layers above the window are read from the disk for every micro-batch: this is slow", self.quiet)
        return self.objective.schedule(tokens)

    def _write(self, optimizer: torch.optim.Optimizer, history: History) -> None:
        if self.snapshot is not None:
            self.snapshot.write(self.replacement, optimizer, history)

    def _left_alone(self, lost: WorkerLost, optimizer: torch.optim.Optimizer, history: History) -> WorkerLost:
        """What the first process has is the end of the last whole step: it is written before anything is said."""
        if self.snapshot is None or not history.step:
            return lost
        if self.world.first:
            self._write(optimizer, history)
        return lost.at(f"at step {history.step} of {history.steps}")

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
