"""Stage 4, where asked for: the layers that stay train too, and what they have learned goes into the source."""

from __future__ import annotations

from dataclasses import replace

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from llm_streamline.above import tied, untie
from llm_streamline.checkpoint import round_weights
from llm_streamline.errors import UserError
from llm_streamline.heal import HEAD, Heal, parse_heal
from llm_streamline.progress import say
from llm_streamline.quantities import counted
from llm_streamline.records import Fit, LayerPlan, Window
from llm_streamline.replacement import ReplacementLayers
from llm_streamline.snapshot import Snapshot
from llm_streamline.student import check_installed, in_experts, split, student_of
from llm_streamline.tracking import tracking
from llm_streamline.train import Settings, Trainer, rates
from llm_streamline.training import announce, keep, lessons, shared_replacement, trained_before
from llm_streamline.workspace import RunFolder, Workspace

HEALED = "healed"
GENTLER = 0.05  # of the learning rate: weights of a trained model bear less than a layer that stands in for others
SNAPSHOT = "healing.safetensors"


def check_healing(work: Workspace) -> None:
    """Errors: UserError where the layers that are to be trained cannot be held, or what trains them is not here."""
    check_installed(work.recipe.heal)
    check_size(work.recipe.heal, work.shape.num_layers - 1)
    if work.recipe.heals and (work.offloads or work.estimate.writes_offloaded):
        raise UserError(
            f"--heal {work.recipe.heal} trains layers that have to be held in memory, and {work.recipe.model} does not "
            f"fit in {work.room / 1e9:.1f} GB; leave it out, or use a machine with more."
        )


def check_size(text: str, left: int) -> None:
    """Errors: UserError where `--heal` reaches past the layers that are left, of which there are `left` at most."""
    wanted = parse_heal(text)
    if wanted and wanted.kind in ("layers", "last") and wanted.size > left:
        raise UserError(
            f"--heal {text} reaches past the {counted(left, 'layer')} that can be left; give less, or --heal "
            f"{Heal('all', above=wanted.above)}."
        )


def check_heals(text: str, plan: LayerPlan) -> None:
    """Before anything is trained. Errors: UserError where `--heal` would train stand-ins alone, or too many."""
    check_size(text, len(plan.sources()))
    wanted = parse_heal(text)
    if not wanted or wanted.above or wanted.kind == "lora":
        return
    kept = (new for new, source in enumerate(plan.sources()) if source not in plan.gone)
    if not any(wanted.whole(new, plan) for new in kept):
        raise UserError(f"--heal {text} finds no layer to train among those that stay; give another, or none.")


def heal(work: Workspace, plan: LayerPlan, folder: RunFolder) -> Fit | None:
    """`healed/` with the weights of what has trained and their Fit; None where nothing else was to train."""
    wanted = parse_heal(work.recipe.heal)
    if wanted is None:
        return None
    world = work.world
    snapshot = Snapshot(folder.path / SNAPSHOT, work.runtime.checkpoint_every, world=world)
    if fit := world.led(lambda: trained_before(folder, snapshot, HEALED)):
        return fit
    _, training = lessons(work)
    replacement = shared_replacement(work, plan, folder)
    student = world.attempt(lambda: student_of(work.model, plan, replacement, wanted).to(work.device))
    student.load_state_dict(world.led(student.state_dict))
    settings = world.led(lambda: _settings(work, training, wanted).continued(snapshot))
    student.quick = stand_ins_pace(work, plan, settings)
    student.pace_above = 1.0 if work.recipe.heal_lr or wanted.kind != "lora" else GENTLER
    announce(f"healing ({wanted})", training, settings, work.runtime.quiet)
    if wanted.kind == "lora" and (count := in_experts(student)):
        say(f"{count:,} parameters of experts, which are held as one tensor, get no adapters", work.runtime.quiet)
    whole = Window(start=0, stop=plan.num_layers)
    with tracking(work) as track:
        trainer = Trainer(work.model, whole, student, settings, work.runtime.quiet, track, snapshot)
        trainer.world = world
        fit = trainer.fit(training, work.parts.validation)
    if world.first:
        keep(student.state_dict(), fit, folder.file(HEALED), "Healing the rest")
        snapshot.remove()
    return fit


def stand_ins_pace(work: Workspace, plan: LayerPlan, settings: Settings) -> dict[int, float]:
    """Of the shortened model's layers those that stand in, which go on to train at the rate they began with."""
    own = rates(work.recipe, work.config.hidden_size, settings.optimizer)[0]
    return {new: own / settings.lr for new, source in enumerate(plan.sources()) if source in plan.replaced()}


def _settings(work: Workspace, training: Tensor, wanted: Heal) -> Settings:
    """Those of the recipe's healing; gradients need the inner states of every layer."""
    alive = (work.shape.num_layers, work.config.hidden_size)
    settings = Settings.resolve(work.recipe.healing, training, alive, work.memory, work.bfloat16)
    gentler = 1.0 if work.recipe.heal_lr or wanted.kind == "lora" else GENTLER
    return replace(settings, lr=gentler * settings.lr, min_lr=gentler * settings.min_lr)


@torch.no_grad()
def load_healed(
    work: Workspace, source: PreTrainedModel, plan: LayerPlan, replacement: ReplacementLayers, folder: RunFolder
) -> frozenset[str]:
    """Put what healing has learned into the weights of `source`, and of the replacement; returns the source's names."""
    wanted = parse_heal(work.recipe.heal)
    if wanted is None:
        return frozenset()
    student = student_of(source, plan, replacement, wanted)
    student.load_state_dict(load_file(folder.path / HEALED / f"{HEALED}.safetensors"))
    stays, replaced = split(student, source, plan)
    if HEAD in wanted.above and tied(source):
        untie(source)
    weights = source.state_dict()
    for name, value in stays.items():
        weights[name].copy_(value)
    replacement.load_state_dict(replaced, strict=False)
    round_weights(source, work.dtype)
    return frozenset(stays)
