"""What a run will cost, from the model's configuration and the recipe alone: memory, disk, tokens and time by stage.

The bytes are sums of what each stage holds at its peak; the shares that could not be derived were read from measured
runs (`docs/log.md`). Symbols as in `forward.py`: B sequences of T tokens in a micro-batch, D width, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_streamline.checkpoint import context_length
from llm_streamline.errors import UserError
from llm_streamline.families import inner_width
from llm_streamline.layerwise import GROUP_TOKENS
from llm_streamline.memory import FORWARD_TOKENS, default_batch
from llm_streamline.offload import shard_bytes
from llm_streamline.records import FOLDED, Record
from llm_streamline.text import CALIBRATION_TOKENS, DEFAULT_TOKENS, VALIDATION_TOKENS, block_length

if TYPE_CHECKING:
    from llm_streamline.workspace import Workspace

LIBRARIES = 450 * 10**6  # bytes that torch and its like take in a process that has run a model
CHECKER = 330 * 10**6  # the same in the process that checks a saved folder, which has run no text
STATES = 2**25  # of float32 copies while states are compared, of which two are alive
VALIDATIONS = 6
BLAME = {
    "analysis": "a smaller --block",
    "closed form": "a smaller --block or --replace layer",
    "training": "--batch 1, a smaller --block or --replace none",
    "assembly": "--compute bfloat16, or a machine with more",
    "verification": "a machine with more",
    "scores": "a smaller --block",
}


@dataclass(frozen=True)
class Sizes:
    """The numbers that costs depend on; bytes are of one value in the format computed in, or in that stored."""

    total: int  # parameters
    layer: int  # of the largest decoder layer
    largest: int  # of the largest single weight in one
    layers: int
    width: int
    inner: int
    vocabulary: int
    trained: int  # parameters of the replacement, or of the layer that a map is folded into
    solved: bool  # whether it is had in closed form
    compute_bytes: int
    stored_bytes: int
    saved_bytes: int
    block: int
    forward: int  # tokens of a micro-batch where nothing is trained
    batch: int  # sequences of one where something is
    calibration: int  # tokens, as the next two
    training: int
    validation: int
    ram: int  # bytes of the machine's memory

    @property
    def outside(self) -> int:
        """Parameters that are in no decoder layer."""
        return max(0, self.total - self.layer * self.layers)


class Stage(Record):
    """One stage's cost: bytes at its peak, bytes on the disk, tokens that pass through the model.

    `on_device` says whether the bytes are of the device that computes, or of the machine's own memory. `seconds` is
    None where nothing was timed.
    """

    name: str
    on_device: bool
    memory: int
    disk: int
    tokens: int
    seconds: float | None = None


class Estimate(Record):
    """The stages of a run, in order, with the bytes that the device and the machine have.

    `offloaded` says whether layers stay on the disk while the model computes, `writes_offloaded` while it is written.
    """

    model: str
    memory: int
    ram: int
    offloaded: bool
    writes_offloaded: bool
    stages: list[Stage]

    def available(self, stage: Stage) -> int:
        return self.memory if stage.on_device else self.ram

    @property
    def disk(self) -> int:
        """Bytes on the disk at its fullest: what is written stays, but for the states."""
        return sum(stage.disk for stage in self.stages)

    @property
    def fits(self) -> bool:
        return all(stage.memory <= self.available(stage) for stage in self.stages)

    def check(self, free: int) -> None:
        """Errors: UserError for what cannot fit in memory, or in `free` bytes of disk."""
        if problem := self.problem(free):
            raise UserError(problem)

    def problem(self, free: int) -> str | None:
        """What does not fit and what would help, in a sentence."""
        worst = max(self.stages, key=lambda stage: stage.memory / self.available(stage))
        if not self.fits:
            return (
                f"{worst.name} of {self.model} takes about {worst.memory / 1e9:.2f} GB and there are "
                f"{self.available(worst) / 1e9:.2f} GB; give {BLAME[worst.name]}, or more with --memory."
            )
        if self.disk > free:
            return (
                f"a run of {self.model} takes about {self.disk / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free; "
                "free some space, or choose another output folder (-o)."
            )
        return None


def predict(sizes: Sizes, offloaded: bool, writes_offloaded: bool) -> list[Stage]:
    """The stages' costs, with the model held or its layers on the disk, while it computes and while it is written."""
    held = sizes.outside if offloaded else sizes.total
    model = LIBRARIES + held * sizes.compute_bytes
    after = sizes.total  # at most: which layers go is not known yet
    checked = _verification(sizes, model, writes_offloaded, after)
    written = _assembly(sizes, model, writes_offloaded, sizes.ram)
    return [
        _analysis(sizes, model, offloaded),
        *_training(sizes, model, offloaded),
        Stage(name="assembly", on_device=False, memory=written, disk=after * sizes.saved_bytes, tokens=0),
        Stage(name="verification", on_device=False, memory=checked, disk=0, tokens=0),
        _scores(sizes, model, offloaded, after),
    ]


def _waiting(sizes: Sizes, tokens: int, offloaded: bool) -> int:
    """Bytes of the states of as many tokens as share a reading of the weights."""
    return min(tokens, GROUP_TOKENS) * sizes.width * sizes.compute_bytes if offloaded else 0


def _analysis(sizes: Sizes, model: int, offloaded: bool) -> Stage:
    group = _waiting(sizes, sizes.calibration, offloaded)
    states = group or (sizes.layers + 1) * sizes.forward * sizes.width * sizes.compute_bytes
    memory = model + states + max(passing(sizes, sizes.forward, offloaded), 2 * STATES)
    disk = group * (sizes.layers + 1)
    return Stage(name="analysis", on_device=True, memory=memory, disk=disk, tokens=sizes.calibration)


def _scores(sizes: Sizes, model: int, offloaded: bool, after: int) -> Stage:
    tokens = max(sizes.block, min(sizes.forward, 2048))
    saved = 0 if offloaded else after * sizes.compute_bytes
    logits = tokens * sizes.vocabulary * (sizes.compute_bytes + 8)
    memory = model + saved + _waiting(sizes, sizes.validation, offloaded)
    memory += max(passing(sizes, tokens, offloaded), logits)
    return Stage(name="scores", on_device=True, memory=memory, disk=0, tokens=3 * sizes.validation)


def passing(sizes: Sizes, tokens: int, offloaded: bool) -> int:
    """Bytes alive while a micro-batch passes a layer: what its MLP holds at once, and a layer in another format."""
    converted = offloaded and sizes.compute_bytes != sizes.stored_bytes
    values = 4 * sizes.width + 4 * sizes.inner
    return tokens * values * sizes.compute_bytes + (sizes.layer * sizes.compute_bytes if converted else 0)


def _training(sizes: Sizes, model: int, offloaded: bool) -> list[Stage]:
    if not sizes.trained:
        return []
    if sizes.solved:
        return [_closed_form(sizes, model, offloaded)]
    step = sizes.batch * sizes.block
    weights = sizes.trained * 4 * 4  # a weight, its gradient and two moments, in float32
    cast = sizes.trained * 2 if sizes.compute_bytes == 2 else 0
    backward = step * (14 * sizes.width + 5 * sizes.inner) * 4
    waiting = 2 * _waiting(sizes, max(sizes.training, sizes.validation), offloaded)
    peak = max(backward + weights, passing(sizes, step, offloaded) + weights)
    return [
        Stage(
            name="training",
            on_device=True,
            memory=model + waiting + cast + peak,
            disk=(3 + 1 + 1) * sizes.trained * 4,
            tokens=sizes.training + VALIDATIONS * sizes.validation,
        )
    ]


def _closed_form(sizes: Sizes, model: int, offloaded: bool) -> Stage:
    """In float64: two sums of products of each part of the text, what solves them, and a micro-batch's states."""
    tokens = max(sizes.block, min(sizes.forward, sizes.training))
    waiting = 3 * _waiting(sizes, max(sizes.training, sizes.validation), offloaded)
    states = (4 * 8 + 3 * sizes.compute_bytes) * tokens * sizes.width
    solving = 10 * 8 * sizes.width**2
    return Stage(
        name="closed form",
        on_device=True,
        memory=model + waiting + max(passing(sizes, tokens, offloaded), states) + solving,
        disk=4 * sizes.width**2,
        tokens=sizes.training + sizes.validation,
    )


def _assembly(sizes: Sizes, model: int, offloaded: bool, ram: int) -> int:
    """The source in float32 beside the model computed with, or its layers one at a time."""
    if offloaded:
        written = shard_bytes(ram) + sizes.largest * 4
        return model + sizes.outside * 8 + sizes.trained * 6 + written
    return model + _copied(sizes) + sizes.trained * 6 + sizes.total * sizes.saved_bytes


def _copied(sizes: Sizes) -> int:
    """The source in float32, where the model computed with is none."""
    same = sizes.compute_bytes == 4 and sizes.stored_bytes == sizes.saved_bytes
    return 0 if same else sizes.total * 4


def _verification(sizes: Sizes, model: int, offloaded: bool, after: int) -> int:
    """The process that checks, beside the one that waits for it."""
    waiting = model + sizes.trained * 6 + (sizes.outside * 8 if offloaded else _copied(sizes))
    checked = sizes.outside * 4 + sizes.largest * 8 if offloaded else after * 4
    return waiting + CHECKER + checked


def sizes_of(work: Workspace) -> Sizes:
    """The sizes of a run, with the defaults that it would take. What the text gives is not known: it may be less."""
    recipe, shape, config = work.recipe, work.shape, work.config
    block = block_length(recipe, context_length(config))
    layer, occupied = max(shape.layers), recipe.occupied
    tokens = (recipe.tokens or DEFAULT_TOKENS) * recipe.epochs
    blocks = max(1, tokens // block)
    return Sizes(
        total=shape.total,
        layer=layer,
        largest=work.largest_weight,
        layers=shape.num_layers,
        width=config.hidden_size,
        inner=inner_width(config),
        vocabulary=config.vocab_size,
        trained=(shape.network or layer) * (1 if recipe.replace == FOLDED else occupied),
        solved=recipe.solved,
        compute_bytes=work.compute_dtype.itemsize,
        stored_bytes=work.checkpoint_dtype.itemsize,
        saved_bytes=work.dtype.itemsize,
        block=block,
        forward=max(block, FORWARD_TOKENS // block * block),
        batch=recipe.batch or default_batch((blocks, block), recipe, config.hidden_size, work.memory),
        calibration=recipe.calibration_tokens or CALIBRATION_TOKENS,
        training=0 if recipe.replace == "none" else tokens,
        validation=recipe.validation_tokens or VALIDATION_TOKENS,
        ram=work.ram,
    )


def estimate_of(work: Workspace) -> Estimate:
    """With the model held as far as that fits: throughout, or while it computes, or not at all."""
    sizes = sizes_of(work)
    ways = ((False, False), (False, True), (True, True))
    found = [_estimate(work, sizes, *way) for way in ways]
    return next((one for one in found if one.fits), found[-1])


def _estimate(work: Workspace, sizes: Sizes, offloaded: bool, writes_offloaded: bool) -> Estimate:
    return Estimate(
        model=work.recipe.model,
        memory=work.room,
        ram=min(work.ram, work.room) if work.device == "cpu" else work.ram,
        offloaded=offloaded,
        writes_offloaded=writes_offloaded,
        stages=predict(sizes, offloaded, writes_offloaded),
    )
