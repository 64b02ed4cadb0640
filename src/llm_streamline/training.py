"""What stands in for the window: trained or solved for, kept in the run folder, and taken from there."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from llm_streamline import figures
from llm_streamline.cache import Cached, StateCache, cache_bytes
from llm_streamline.checkpoint import context_length
from llm_streamline.errors import UserError
from llm_streamline.files import atomic, remove, sha256
from llm_streamline.linear import fit_linear, load_folded, solved_start
from llm_streamline.memory import alive_layers
from llm_streamline.merging import MERGED, merged_layers
from llm_streamline.optimizers import optimizer_for
from llm_streamline.passages import Passages, passages_of
from llm_streamline.progress import say
from llm_streamline.quantities import counted
from llm_streamline.recipe import Recipe
from llm_streamline.records import Fit, Fitted, LayerPlan
from llm_streamline.replace import SOLVED
from llm_streamline.replacement import ReplacementLayers
from llm_streamline.snapshot import Snapshot
from llm_streamline.student import spanning
from llm_streamline.text import DEFAULT_TOKENS, block_length, shuffled
from llm_streamline.tracking import tracking
from llm_streamline.train import Settings, Trainer, rates
from llm_streamline.workspace import RunFolder, Workspace

CACHE = "cache"  # states for later epochs
SNAPSHOT = "checkpoint.safetensors"  # the state of a training that has not come to its end
ROUNDS = "rounds"  # what rounds before the last have chosen and trained


def check_training(work: Workspace) -> None:
    """Errors: UserError for lessons that cannot be, and for gradients through layers that are not held."""
    check_lessons(work)
    recipe = work.recipe
    if recipe.count > 1 and recipe.occupied and work.offloads:
        raise UserError(
            f"{recipe.count} windows are trained through the layers between them, which have to be held in memory, and "
            f"{recipe.model} does not fit in {work.room / 1e9:.1f} GB; remove one window, or use a machine with more."
        )


def check_lessons(work: Workspace) -> None:
    """Errors: UserError for rates, losses and shares of the tokens that cannot be, on whatever machine."""
    recipe, config = work.recipe, work.config
    sequences = (recipe.tokens or DEFAULT_TOKENS) * recipe.epochs // block_length(recipe, context_length(config))
    healing = healing_share(recipe, sequences) if sequences else 0  # too few tokens are refused where text is read
    learning = sequences - healing if recipe.learns else 0
    stages = ((recipe, "--loss", learning), (recipe.healing, "--heal-loss", healing))
    for one, flag, own in stages:
        if own:
            rates(one, config.hidden_size, optimizer_for(one, own))
            one.objective.check(config.vocab_size, flag)


def weights_of(recipe: Recipe, turn: int) -> str:
    """The folder of what a round has trained; the last one's is the run's."""
    return "replacement" if turn == recipe.rounds else f"{ROUNDS}/replacement-{turn}"


def state_of(recipe: Recipe, turn: int) -> str:
    """The file with the state of a round's training while that lasts."""
    return SNAPSHOT if turn == recipe.rounds else f"{ROUNDS}/{turn}-{SNAPSHOT}"


def plan_of(turn: int) -> str:
    return f"{ROUNDS}/plan-{turn}.json"


def train_replacement(work: Workspace, plan: LayerPlan, folder: RunFolder, turn: int | None = None) -> Fitted:
    """Stage 3: `replacement/` with the weights, their Fit and, where trained, its figure; None where there is none.

    Of several rounds it is the last one where no other `turn` is asked for.
    """
    turn = turn or work.recipe.rounds
    if work.recipe.solved or not work.recipe.learns:
        return fit_linear(work, plan, folder, partial(_solved_on, work)) if work.recipe.solved else None
    world = work.world
    snapshot = Snapshot(folder.path / state_of(work.recipe, turn), work.runtime.checkpoint_every, world=world)
    if fit := world.led(lambda: trained_before(folder, snapshot, weights_of(work.recipe, turn))):
        return fit
    training = lesson(work, turn)
    replacement = world.attempt(lambda: untrained(work, plan, folder, turn).to(work.device))
    if work.recipe.start == SOLVED and not world.led(snapshot.path.exists):
        replacement.load_state_dict(solved_start(work, plan))
    replacement.load_state_dict(world.led(replacement.state_dict))  # that another machine may round otherwise
    settings = world.led(lambda: settings_of(work, training).continued(snapshot))
    title = f"training, round {turn} of {work.recipe.rounds}" if work.recipe.rounds > 1 else "training"
    announce(title, training, settings, work.runtime.quiet)
    with tracking(work) as track:
        network = spanning(work.model, plan, replacement)
        trainer = Trainer(work.model, plan.span, network, settings, work.runtime.quiet, track, snapshot)
        trainer.source, trainer.world = source_of(work, plan, settings, folder), world
        fit = trainer.fit(training, work.parts.validation)
    if world.first:
        keep(replacement.state_dict(), fit, folder.file(weights_of(work.recipe, turn)), "Training the replacement")
        forget_training(folder, snapshot)
    return fit


def untrained(work: Workspace, plan: LayerPlan, folder: RunFolder, turn: int) -> ReplacementLayers:
    """What a round begins with: fresh stand-ins for its own windows, and those of the round before as they were left.

    Only the first process has these; it hands them on.
    """
    replacement = work.replacement(work.model, plan.replaced(), plan.starts)
    if turn > 1 and work.world.first:
        own = dict(zip(plan.replaced(), list(replacement), strict=True))
        before = LayerPlan.read(folder.path / plan_of(turn - 1))
        kept = load_replacement(work, work.model, before, folder, turn - 1)
        for place, layer in zip(before.replaced(), list(kept), strict=True):
            own[place].load_state_dict(layer.state_dict())
    return replacement


def earlier_fits(work: Workspace, folder: RunFolder) -> list[Fit]:
    """What the rounds before the last have done."""
    turns = range(1, work.recipe.rounds)
    return [Fit.read(folder.path / weights_of(work.recipe, turn) / "fit.json") for turn in turns]


def lesson(work: Workspace, turn: int) -> Tensor:
    """The round's share of what the replacement is trained on. Errors: UserError where a round has none."""
    blocks, rounds = lessons(work)[0], work.recipe.rounds
    if len(blocks) < rounds:
        raise UserError(
            f"--rounds {rounds} of {len(blocks)} sequences leaves one without any; give more --tokens, or fewer rounds."
        )
    return blocks.tensor_split(rounds)[turn - 1]


def lessons(work: Workspace) -> tuple[Tensor, Tensor]:
    """Token ids (N, T) in the order of training: the replacement's, and those that are left for healing.

    All epochs of them, and none for healing where there is none, or for a replacement where nothing trains.
    """
    work.share()
    recipe = work.recipe
    blocks = torch.cat([shuffled(work.parts.training, seed) for seed in epoch_seeds(recipe)])
    healing = healing_share(recipe, len(blocks))
    return blocks[: len(blocks) - healing], blocks[len(blocks) - healing :]


def healing_share(recipe: Recipe, sequences: int) -> int:
    """How many of them healing has. Errors: UserError where it, or what stands in, would have none."""
    if not recipe.heals:
        return 0
    healing = round(sequences * recipe.heal_share) if recipe.learns else sequences
    if not 0 < healing <= sequences - recipe.learns:
        raise UserError(
            f"--heal-share {recipe.heal_share:g} of {sequences} sequences leaves nothing for one of the two "
            "trainings; give more --tokens, or another share."
        )
    return healing


def _solved_on(work: Workspace) -> Tensor:
    """All of the training part, once; of a run that heals what is not left for that."""
    work.share()
    return lessons(work)[0] if work.recipe.heals else work.parts.training


def announce(title: str, training: Tensor, settings: Settings, quiet: bool) -> None:
    steps = -(-len(training) // (settings.batch * settings.accumulate))
    size = f"{counted(settings.batch * settings.accumulate, 'sequence')} of {training.shape[1]} tokens"
    say(
        f"{title} on {training.numel():,} tokens: {counted(steps, 'step')} of {size}, "
        f"learning rate {settings.lr:g} to {settings.min_lr:g}",
        quiet,
    )


def forget_training(folder: RunFolder, snapshot: Snapshot) -> None:
    """Delete what only a training that has not come to its end needs."""
    snapshot.remove()
    remove(folder.path / CACHE)


def epoch_seeds(recipe: Recipe) -> list[int]:
    return [recipe.seed + epoch for epoch in range(recipe.epochs)]


def source_of(work: Workspace, plan: LayerPlan, settings: Settings, folder: RunFolder) -> Passages | None:
    """States from the disk for later epochs, where a cache was asked for and is large enough to hold them."""
    limit, blocks = work.runtime.cache, work.parts.training
    if limit is None:
        return None
    size = cache_bytes(blocks, work.config.hidden_size, work.compute_dtype)
    if size > limit:
        say(f"no cache: its {size / 1e9:.3g} GB are more than --cache {limit / 1e9:.3g} GB", work.runtime.quiet)
        return None
    say(f"states are kept in {folder.path / CACHE} for later epochs: {size / 1e9:.3g} GB", work.runtime.quiet)
    owner = sha256(work.inputs().model_dump_json().encode(), str(plan.span).encode(), work.compute.encode())
    cache = StateCache(folder.path / CACHE, owner, blocks, work.config.hidden_size, work.compute_dtype)
    stream = passages_of(work.model, plan.span, settings.autocast)
    return Cached(work.model, plan.span, stream, cache, work.runtime.quiet)


def settings_of(work: Workspace, training: Tensor) -> Settings:
    recipe = work.recipe.from_disk if work.offloads else work.recipe
    alive = (alive_layers(recipe, work.shape.num_layers), work.config.hidden_size)
    return Settings.resolve(recipe, training, alive, work.memory, work.bfloat16)


def trained_before(folder: RunFolder, snapshot: Snapshot, name: str) -> Fit | None:
    if not folder.has(name):
        return None
    forget_training(folder, snapshot)  # where a run was killed in just this place
    return Fit.read(folder.path / name / "fit.json")


def keep(weights: dict[str, Tensor], fit: Fit, folder: Path, title: str) -> None:
    """What was trained, its Fit and its figure, in a folder of the weights' name."""
    with atomic(folder) as temporary:
        temporary.mkdir()
        save_file(weights, temporary / f"{folder.name}.safetensors")
        figures.draw_training(fit, temporary / "training.png", title)
        fit.write(temporary / "fit.json")


def load_replacement(
    work: Workspace, source: PreTrainedModel, plan: LayerPlan, folder: RunFolder, turn: int | None = None
) -> ReplacementLayers:
    """What the run folder holds, on the CPU, of the last round or another; what of it was trained still could be."""
    if plan.replace == "none":
        return ReplacementLayers()
    if plan.replace == MERGED:
        return merged_layers(source, plan.windows)
    if plan.folded is not None:
        return load_folded(source, plan, folder)
    replacement = work.replacement(work.model, plan.replaced()).cpu()
    kept = folder.path / weights_of(work.recipe, turn or work.recipe.rounds)
    replacement.load_state_dict(load_file(kept / f"{kept.name}.safetensors"))
    return replacement


def shared_replacement(
    work: Workspace, plan: LayerPlan, folder: RunFolder, turn: int | None = None
) -> ReplacementLayers:
    """The same in every process, of which the first alone has the folder."""
    own = work.world.first or plan.replace in ("none", MERGED)  # of these nothing lies there
    make = partial(load_replacement, work, work.model, plan, folder, turn)
    if not own:
        make = partial(work.replacement, work.model, plan.replaced())
    replacement = work.world.attempt(make)
    replacement.load_state_dict(work.world.led(replacement.state_dict))
    return replacement
