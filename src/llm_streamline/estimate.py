"""What a run will cost, from the model's configuration and the recipe alone: memory, disk, tokens and time by stage.

The bytes are sums of what each stage holds at its peak; the shares that could not be derived were read from measured
runs (`docs/log.md`). Symbols as in `forward.py`: B sequences of T tokens in a micro-batch, D width, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_streamline.crossing import maps_at_once, matrix_bytes
from llm_streamline.errors import UserError
from llm_streamline.layerwise import GROUP_TOKENS
from llm_streamline.offload import shard_bytes
from llm_streamline.records import Record
from llm_streamline.sizes import Sizes, sizes_of
from llm_streamline.upper import CHUNK_LOGITS

if TYPE_CHECKING:
    from llm_streamline.workspace import Workspace

LIBRARIES = 450 * 10**6  # bytes that torch and its like take in a process that has run a model
CHECKER = 330 * 10**6  # the same in the process that checks a saved folder, which has run no text
STATES = 2**25  # of float32 copies while states are compared, of which two are alive
TURNING = 16  # bytes per value of a matrix while Muon makes its step orthogonal: measured 12 to 16
LOGIT_COPIES = 8  # of a chunk in float32, while its gradient is taken: measured 7 (bench/logits.py)
RANKED_COPIES = 5  # in float32, while losses and KL are computed
BLAME = {
    "analysis": "a smaller --block",
    "ranking": "--select cosine, or a smaller --block",
    "start": "a smaller --block or --replace layer with --init inherited",
    "closed form": "a smaller --block or --replace layer",
    "healing": "--batch 1, a smaller --block, another --heal or none",
    "training": "--batch 1, a smaller --block or --replace none",
    "assembly": "--compute bfloat16, or a machine with more",
    "verification": "a machine with more",
    "scores": "a smaller --block",
}


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
                f"a run of {self.model} takes about {self.disk / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free "
                "or held by its folder; free some space, choose another output folder (-o), or leave out --cache."
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
        *_ranking(sizes, model, offloaded),
        *_start(sizes, model, offloaded),
        *_training(sizes, model, offloaded),
        *_healing(sizes, model),
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


def _ranking(sizes: Sizes, model: int, offloaded: bool) -> list[Stage]:
    """Branches past the windows: on average half of the layers lie above one.

    Where the model is held the analysis' pass is the first of the first ranking's too, and is counted there.
    """
    if sizes.ranked < 2 or (offloaded and not sizes.asked):
        return []
    tokens, width = max(sizes.block, sizes.forward // 2), sizes.width
    kept = 0 if offloaded else sizes.layers  # states of the other boundaries, while all are compared
    states = (2 * sizes.ranked + 1 + kept) * tokens * width * sizes.compute_bytes
    states = max(states, _waiting(sizes, sizes.calibration, offloaded))
    logits = RANKED_COPIES * 4 * min(CHUNK_LOGITS, tokens * sizes.vocabulary)
    together = min(sizes.mapped, maps_at_once(width))
    # second moments, what solving for a map takes besides, and the maps in float32
    maps = together * (matrix_bytes(width) + 8 * width**2) + 4 * 8 * width**2 if together else 0
    shared = 0 if offloaded else sizes.shared
    passes = 1 + sizes.ranked / 2 + (2 * -(-sizes.mapped // together) + sizes.mapped / 2 if together else 0)
    return [
        Stage(
            name="ranking",
            on_device=True,
            memory=model + states + maps + max(passing(sizes, tokens, offloaded), logits),
            disk=0,
            tokens=int((passes * sizes.windows - shared) * sizes.calibration),
        )
    ]


def _scores(sizes: Sizes, model: int, offloaded: bool, after: int) -> Stage:
    tokens = max(sizes.block, min(sizes.forward, 2048, sizes.validation))
    saved = 0 if offloaded and not sizes.whole else after * sizes.compute_bytes
    logits = tokens * sizes.vocabulary * (sizes.compute_bytes + 8)
    memory = model + saved + _waiting(sizes, sizes.validation, offloaded)
    memory += max(passing(sizes, tokens, offloaded), logits)
    return Stage(name="scores", on_device=True, memory=memory, disk=0, tokens=3 * sizes.validation)


def _start(sizes: Sizes, model: int, offloaded: bool) -> list[Stage]:
    """What training begins with: layers tried in the window's place up to the logits, or a map that is solved for."""
    if not sizes.starting:
        return []
    if sizes.whole:  # of networks only a map begins with something that is looked for
        memory = _closed_form(sizes, model, offloaded).memory
    else:
        tokens = max(sizes.block, sizes.forward // 2)
        logits = tokens * sizes.vocabulary * (sizes.compute_bytes + 8)
        memory = model + _waiting(sizes, sizes.calibration, offloaded) + max(passing(sizes, tokens, offloaded), logits)
    return [Stage(name="start", on_device=True, memory=memory, disk=0, tokens=sizes.starting)]


def passing(sizes: Sizes, tokens: int, offloaded: bool) -> int:
    """Bytes alive while a micro-batch passes a layer: what its MLP holds at once, and a layer in another format."""
    converted = offloaded and sizes.compute_bytes != sizes.stored_bytes
    values = 3 * sizes.width + 3 * sizes.inner
    return tokens * values * sizes.compute_bytes + (sizes.layer * sizes.compute_bytes if converted else 0)


def _training(sizes: Sizes, model: int, offloaded: bool) -> list[Stage]:
    if not sizes.training:
        return []
    if sizes.solved:
        return [_closed_form(sizes, model, offloaded)]
    step = sizes.batch * sizes.block
    weights = sizes.trained * 4 * sizes.copies + sizes.turned * TURNING
    cast = sizes.trained * 2 if sizes.compute_bytes == 2 else 0
    backward = _kept_for_backward(sizes, step)
    waiting = 2 * _waiting(sizes, max(sizes.training, sizes.validation), offloaded)
    peak = max(backward + weights + _looking_through(sizes, step, offloaded), passing(sizes, step, offloaded) + weights)
    return [
        Stage(
            name="training",
            on_device=True,
            memory=model + waiting + cast + peak,
            disk=(sizes.copies + sizes.rounds) * sizes.trained * 4 + sizes.cache,
            tokens=sizes.training + sizes.rounds * sizes.judged(sizes.training // sizes.rounds),
        )
    ]


def _healing(sizes: Sizes, model: int) -> list[Stage]:
    """Gradients pass every layer, and the head where the loss is of logits; the dense model has run before."""
    if not sizes.healed:
        return []
    step = sizes.heal_batch * sizes.block
    weights = sizes.healed * (4 * sizes.copies + (2 if sizes.compute_bytes == 2 else 0)) + sizes.turned * TURNING
    states = sizes.layers * _kept_for_backward(sizes, step) + sizes.heal_logits * LOGIT_COPIES * 4
    return [
        Stage(
            name="healing",
            on_device=True,
            memory=model + weights + states,
            disk=(sizes.copies + 1) * sizes.healed * 4,
            tokens=sizes.healing + sizes.judged(sizes.healing),
        )
    ]


def _kept_for_backward(sizes: Sizes, tokens: int) -> int:
    """Bytes of a layer's inner states that its gradients need."""
    return tokens * (14 * sizes.width + 5 * sizes.inner) * 4


def _looking_through(sizes: Sizes, tokens: int, offloaded: bool) -> int:
    """Bytes for a loss of logits: of the layers above the window, two models' states, and a chunk of logits.

    Layers on the disk are run again on the way back, one at a time with its weights, and keep only what enters them.
    """
    if not sizes.logits:  # layers between windows, if any
        return sizes.above * _kept_for_backward(sizes, tokens)
    state = tokens * sizes.width * sizes.compute_bytes
    if offloaded:
        layers = sizes.above * state + (_kept_for_backward(sizes, tokens) + 4 * sizes.layer if sizes.above else 0)
    else:
        layers = sizes.above * _kept_for_backward(sizes, tokens)
    return layers + 3 * state + sizes.logits * LOGIT_COPIES * 4


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
        tokens=sizes.solved * (sizes.training + sizes.validation),
    )


def _assembly(sizes: Sizes, model: int, offloaded: bool, ram: int) -> int:
    """The source in float32 beside the model computed with, or its layers one at a time."""
    if offloaded:
        written = shard_bytes(ram) + sizes.largest * 4
        return model + sizes.outside * 8 + sizes.trained * 6 + written
    return model + _copied(sizes) + sizes.trained * 6 + sizes.total * sizes.saved_bytes


def _copied(sizes: Sizes) -> int:
    """The source in float32, where the model computed with is none."""
    same = sizes.compute_bytes == 4 and sizes.stored_bytes == sizes.saved_bytes and not sizes.rounded
    return 0 if same else sizes.total * 4


def _verification(sizes: Sizes, model: int, offloaded: bool, after: int) -> int:
    """The process that checks, beside the one that waits for it."""
    waiting = model + sizes.trained * 6 + (sizes.outside * 8 if offloaded else _copied(sizes))
    checked = sizes.outside * 4 + sizes.largest * 8 if offloaded and not sizes.whole else after * 4
    return waiting + CHECKER + checked


def estimate_of(work: Workspace) -> Estimate:
    """With the model held as far as that fits: throughout, or while it computes, or not at all."""
    ways = ((False, False), (False, True), (True, True))
    found = [_estimate(work, sizes_of(work, way[0]), *way) for way in ways]
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
