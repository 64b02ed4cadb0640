"""The numbers that the cost of a run depends on, from the model's configuration and the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_streamline.checkpoint import context_length
from llm_streamline.families import inner_width, layers_of
from llm_streamline.fidelity import rounded
from llm_streamline.heal import parse_heal
from llm_streamline.history import VALIDATIONS, checked
from llm_streamline.memory import FORWARD_TOKENS, alive_layers, default_batch, layers_above
from llm_streamline.objective import passes_to_solve
from llm_streamline.optimizers import MUON, optimizer_for
from llm_streamline.ranking import SHORTLIST
from llm_streamline.records import FOLDED, PATCH, ModelShape
from llm_streamline.removal import net_layers
from llm_streamline.replace import BEST, SOLVED
from llm_streamline.student import healed_parameters
from llm_streamline.text import CALIBRATION_TOKENS, DEFAULT_TOKENS, VALIDATION_TOKENS, block_length
from llm_streamline.upper import chunk_positions

if TYPE_CHECKING:
    from llm_streamline.recipe import Recipe
    from llm_streamline.workspace import Workspace


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
    copies: int  # float32 values held for one that trains: itself, its gradient, and what the optimizer remembers
    turned: int  # values of the largest matrix that Muon makes orthogonal; 0 for AdamW
    healed: int  # parameters that train once the replacement is there; as the next three, 0 where none do
    heal_batch: int  # sequences of a micro-batch
    heal_logits: int
    healing: int  # tokens
    starting: int  # tokens that pass to find what training begins with
    whole: bool  # the shortened model has code of its own, and is loaded whole
    solved: int  # passes over the text by which it is had in closed form; 0 where it is trained
    above: int  # frozen layers that gradients pass on their way to the lowest stand-in, at most
    logits: int  # made at once for it; 0 where it looks at hidden states alone
    rounds: int  # of removal and training
    windows: int  # that go, or layers one by one: a ranking each
    ranked: int  # windows that are scored, at most
    mapped: int  # of those, windows that linear maps are fitted for
    shared: int  # passes of the first ranking that are the analysis' too, where the model is held
    asked: bool  # whether they are scored though the model's layers stay on the disk
    compute_bytes: int
    stored_bytes: int
    saved_bytes: int
    rounded: bool  # some tensors are stored in a wider format than the saved one
    cache: int  # bytes of the states kept for later epochs
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

    def judged(self, training: int) -> int:
        """Tokens that the checks of a training on `training` tokens read, the one before it included."""
        sequences = checked(training // self.block, max(1, self.validation // self.block))
        return (VALIDATIONS + 1) * sequences * self.block


def sizes_of(work: Workspace, offloaded: bool = False) -> Sizes:
    """The sizes of a run, with the defaults that it would take. What the text gives is not known: it may be less."""
    recipe, shape, config = work.recipe.from_disk if offloaded else work.recipe, work.shape, work.config
    block = block_length(recipe, context_length(config))
    layer, occupied = max(shape.layers), recipe.occupied
    tokens = (recipe.tokens or DEFAULT_TOKENS) * recipe.epochs
    blocks, vocabulary = max(1, tokens // block), config.vocab_size
    batch = _micro_batch(work, (max(1, blocks // recipe.rounds), block), alive_layers(recipe, shape.num_layers))
    states = 2 * tokens // recipe.epochs * config.hidden_size * work.compute_dtype.itemsize
    looks_through = recipe.objective.above and occupied
    return Sizes(
        total=shape.total,
        layer=layer,
        largest=work.largest_weight,
        layers=shape.num_layers,
        width=config.hidden_size,
        inner=inner_width(config),
        vocabulary=vocabulary,
        trained=(shape.network or layer) * (1 if recipe.replace == FOLDED else occupied),
        **_remembered(work, blocks // recipe.rounds),
        **_healing(work, blocks, tokens),
        starting=_starting(recipe, shape, offloaded),
        whole=recipe.network,
        solved=passes_to_solve(recipe.loss_used) + (recipe.replace == PATCH) if recipe.solved else 0,
        above=layers_above(recipe, shape.num_layers),
        logits=min(chunk_positions(batch, vocabulary), block) * batch * vocabulary if looks_through else 0,
        rounds=recipe.rounds,
        **_rankings(recipe, shape),
        asked=recipe.select is not None,
        compute_bytes=work.compute_dtype.itemsize,
        stored_bytes=work.checkpoint_dtype.itemsize,
        saved_bytes=work.dtype.itemsize,
        rounded=bool(rounded(work.source, work.dtype)),
        cache=states if occupied and states <= (work.runtime.cache or 0) else 0,
        block=block,
        forward=max(block, FORWARD_TOKENS // block * block),
        batch=batch,
        **_measured(recipe),
        ram=work.ram,
    )


def _measured(recipe: Recipe) -> dict[str, int]:
    return {
        "calibration": recipe.calibration_tokens or CALIBRATION_TOKENS,
        "validation": recipe.validation_tokens or VALIDATION_TOKENS,
    }


def _starting(recipe: Recipe, shape: ModelShape, offloaded: bool) -> int:
    """Each layer of the windows is tried alone in their place; or a map is solved for, once."""
    if offloaded and recipe.init is None and recipe.start == BEST:
        return 0
    calibration, validation = _measured(recipe).values()
    if recipe.start == BEST:
        given = sum(len(window) for window in recipe.given)
        return (given or net_layers(recipe, shape) + recipe.occupied) * calibration
    if recipe.start != SOLVED or recipe.solved:
        return 0
    return calibration + (0 if recipe.replace == PATCH else validation)  # by which a ridge is chosen


def _remembered(work: Workspace, sequences: int) -> dict[str, int]:
    """What an optimizer holds: Muon less than AdamW, where all that is large are matrices and not experts in one."""
    matrices = all(value.ndim < 3 for layer in layers_of(work.skeleton) for value in layer.parameters())
    heal = parse_heal(work.recipe.heal)
    by_adamw = heal is not None and (heal.kind == "lora" or heal.above)
    if optimizer_for(work.recipe, sequences) == MUON and matrices and not by_adamw:
        return {"copies": 3, "turned": work.largest_weight}
    return {"copies": 4, "turned": 0}


def _micro_batch(work: Workspace, blocks: tuple[int, int], layers: int) -> int:
    """Sequences of (N, T) token ids that pass so many layers at once while something trains."""
    recipe, alive = work.recipe, (layers, work.config.hidden_size)
    if recipe.batch:
        return min(recipe.batch, blocks[0])
    return default_batch(blocks, recipe.accumulate, alive, work.memory)


def _healing(work: Workspace, blocks: int, tokens: int) -> dict[str, int]:
    """What healing takes: parameters at most, sequences and logits at once, and tokens; and which it leaves."""
    recipe, config = work.recipe, work.config
    wanted = parse_heal(recipe.heal)
    if wanted is None:
        none = dict.fromkeys(("healed", "heal_batch", "heal_logits", "healing"), 0)
        return {**none, "training": tokens if recipe.learns else 0}
    block = block_length(recipe, context_length(config))
    blocks = blocks if not recipe.learns else max(1, round(blocks * recipe.heal_share))
    batch = _micro_batch(work, (blocks, block), work.shape.num_layers)
    cuts = work.shape.num_layers if recipe.scattered else recipe.count
    positions = min(chunk_positions(batch, config.vocab_size), block) if recipe.healing.objective.above else 0
    return {
        "healed": healed_parameters(work.skeleton, wanted, cuts) + max(work.shape.layers) * recipe.occupied,
        "heal_batch": batch,
        "heal_logits": positions * batch * config.vocab_size,
        "healing": blocks * block,
        "training": tokens - blocks * block if recipe.learns else 0,
    }


def _ranked(recipe: Recipe, layers: int) -> int:
    """As many windows as there are at most: those by which one net layer goes."""
    chosen = recipe.window is not None or recipe.select in ("cosine", "last", "influence")
    return 0 if chosen else layers - recipe.protect_first - recipe.protect_last - recipe.occupied


def _rankings(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """How many rankings, of how many windows at most, for how many of which maps are fitted."""
    ranked, greedy = _ranked(recipe, shape.num_layers), recipe.select == "greedy"
    mapped = min(SHORTLIST, ranked) if recipe.select in (None, "auto") and recipe.occupied else 0
    mapped = ranked if recipe.select == "replaceability" else mapped
    windows, shared = (net_layers(recipe, shape), 0) if greedy else (recipe.count, 1)
    return {"windows": windows, "ranked": ranked, "mapped": mapped, "shared": shared}
