"""What a run works with: its folder on disk, and the model, tokenizer and text, each loaded when first needed."""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from llm_streamline import checkpoint, fidelity, fingerprints
from llm_streamline.errors import UserError
from llm_streamline.estimate import Estimate, estimate_of
from llm_streamline.families import layers_of
from llm_streamline.files import TEMPORARY, remove, remove_leftovers, write_text
from llm_streamline.folding import check_foldable
from llm_streamline.lock import LOCK
from llm_streamline.memory import memory_limit
from llm_streamline.offload import is_offloaded, round_stored
from llm_streamline.parallel import ALONE, World
from llm_streamline.precision import multiplies_bfloat16
from llm_streamline.progress import say
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.recipe_file import changed_keys, read_yaml, to_yaml
from llm_streamline.records import FOLDED, Inputs, ModelShape, Record
from llm_streamline.replacement import ReplacementLayers, build_replacement
from llm_streamline.shape import shape_of
from llm_streamline.text import Parts, read_parts

RECIPE = "recipe.yaml"
MADE = {  # what a run makes in its folder: all that --fresh may delete
    *("inputs.json", "similarity.json", "similarity.png", "heat-map.png", "ranking.json", "plan.json"),
    *("checkpoint.safetensors", "checkpoint-best.safetensors", "cache", "rounds"),
    *("healed", "healing.safetensors", "healing-best.safetensors", "w4a16.json", "model-w4a16"),
    *("tracking", "replacement", "model", "scores.json", "own-text.jsonl", "items", "scores", "evaluation.json"),
    *("report.html", "int8.json", "model-int8", "int4.json", "model-q4_k_m.gguf", "chain.json", RECIPE),
}
R = TypeVar("R", bound=Record)


def own_contents(folder: Path) -> set[str]:
    """Names in a folder, but for the lock's and what a killed run left half-written."""
    if not folder.exists():
        return set()
    return {entry.name for entry in folder.iterdir() if not entry.name.startswith((TEMPORARY, LOCK))}


def output_folder(path: Path | None) -> Path:
    """Where to write, which need not exist yet. Errors: UserError for no path, or that of a file."""
    if path is None:
        raise UserError("no output folder was given; name one with -o, such as -o streamlined.")
    if path.exists() and not path.is_dir():
        raise UserError(f"-o {path} is a file; give a folder that is new or empty.")
    return path


class RunFolder:
    """The run folder: a stage whose file is there is done. Nothing is made on disk before the first result."""

    def __init__(self, path: Path, recipe: Recipe, fresh: bool = False, world: World = ALONE) -> None:
        self.path, self._recipe, self._fresh, self._world = path, recipe, fresh, world

    @classmethod
    def open(cls, path: Path | None, recipe: Recipe, fresh: bool = False, world: World = ALONE) -> RunFolder:
        """Continue or begin a run in `path`, in the first process; it may be no path of another's.

        Errors: UserError where it is not ours to continue, or to delete.
        """
        path = output_folder(path)
        contents = own_contents(path)
        fresh = fresh and RECIPE in contents
        if fresh:
            check_deletable(path, contents, recipe)
        elif RECIPE in contents:
            changed = changed_keys(Recipe(**read_yaml(path / RECIPE)), recipe)
            if changed:
                raise UserError(
                    f"-o {path} holds a run of another recipe ({', '.join(changed)} changed); "
                    "repeat the command as it was, begin again with --fresh, or give another folder."
                )
        elif contents:
            raise UserError(f"-o {path} is not empty and not a run of this tool; give a folder that is new or empty.")
        return cls(path, recipe, fresh, world)

    def check_inputs(self, inputs: Callable[[], Inputs], finished: bool = False) -> None:
        """Refuse to go on with a run, or a `finished` one, that began with another model or text. Errors: UserError."""
        if self.has("inputs.json") and (finished or not self.has("scores.json")) and not self._fresh:
            then, now = Inputs.read(self.path / "inputs.json"), inputs()
            if then != now:
                what = "model" if then.model != now.model else "text"
                raise UserError(
                    f"the {what} is not the one that the run in {self.path} began with; "
                    "put it back, begin again with --fresh, or give another folder."
                )

    def begin(self) -> None:
        """Delete what a killed run left half-written and, to begin afresh, all that an earlier run made.

        The recipe goes last: until then the folder is known as a run. Errors: UserError where something stays.
        """
        remove_leftovers(self.path)
        if self._fresh:
            for name in MADE - {RECIPE}:
                remove(self.path / name)
            if left := own_contents(self.path) - {RECIPE}:
                raise UserError(f"{self.path / min(left)} cannot be deleted; delete it yourself, or give another -o.")
            remove(self.path / RECIPE)

    def file(self, name: str) -> Path:
        """Where a result belongs, with the recipe lying beside it before it is made."""
        if not (self.path / RECIPE).exists():
            write_text(self.path / RECIPE, to_yaml(self._recipe))
        return self.path / name

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def stage(self, name: str, kind: type[R], make: Callable[[], R]) -> R:
        """The record in `name`, made by all processes and written by the first unless an earlier run has done so."""
        kept = self._world.led(lambda: kind.read(self.path / name) if self.has(name) else None)
        if kept is not None:
            return kept
        record = make()
        self._world.alone(lambda: record.write(self.file(name)))
        return record


def check_deletable(folder: Path, contents: set[str], recipe: Recipe) -> None:
    """Errors: UserError where --fresh would take more than an earlier run's results, or what this one reads."""
    if foreign := contents - MADE:
        raise UserError(f"--fresh would delete {folder / min(foreign)}, which no run made; move it away.")
    for name in (recipe.model, *recipe.data):
        path = Path(re.sub(r"@[\d.]+$|[^/]*[*?\[].*$", "", name))  # without a share; of a pattern, its folder
        if path.exists() and path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--fresh would delete {name}, which this run reads; give another -o.")


class Workspace:
    """The source model and its text, as the recipe and the runtime ask for them."""

    def __init__(self, recipe: Recipe, runtime: Runtime, world: World = ALONE) -> None:
        self.world, self._shared = world, False
        self.recipe = recipe
        self.runtime = runtime = runtime if world.first else runtime.model_copy(update={"quiet": True})
        allowed = (runtime.allow_pickle, runtime.trust_remote_code)
        self.source = checkpoint.Source(recipe.model, *allowed, recipe.family_from)
        if runtime.threads:
            torch.set_num_threads(runtime.threads)
        if runtime.quiet:
            logging.disable_progress_bar()

    @cached_property
    def config(self) -> PretrainedConfig:
        return checkpoint.load_config(self.source)

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without weights, on the device that holds nothing."""
        return checkpoint.without_weights(self.config)

    @cached_property
    def shape(self) -> ModelShape:
        """Exact parameter counts, from a model without weights."""
        return shape_of(self.skeleton, self.recipe)

    def check_replacement(self, starts: Sequence[int]) -> None:
        """Errors: UserError where no window that begins at one of `starts` can be given what the recipe asks for."""
        if self.recipe.replace == FOLDED:
            check_foldable(self.config, starts)
        refusal = None
        for start in starts if self.recipe.occupied else ():
            try:
                with torch.device("meta"):
                    self.replacement(self.skeleton, [start])
                return
            except UserError as error:
                refusal = error
        if refusal:
            raise refusal

    def replacement(
        self, model: PreTrainedModel, places: Sequence[int], starts: Sequence[int] | None = None
    ) -> ReplacementLayers:
        """What the recipe puts into those places, untrained. Errors: UserError where the family cannot give it."""
        return build_replacement(model, places, self.recipe.start, self.recipe.seed, self.recipe.replace, starts)

    @cached_property
    def device(self) -> str:
        asked, count = self.runtime.device, torch.cuda.device_count()
        known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{number}" for number in range(count))]
        if asked != "auto" and asked not in known:
            raise UserError(f"--device {asked} is not to be had here; there is {', '.join(known)}.")
        found = ("cuda" if count else "cpu") if asked == "auto" else asked
        return f"cuda:{self.world.local_rank % count}" if found == "cuda" and self.world.size > 1 else found

    @cached_property
    def bfloat16(self) -> bool:
        """Whether to compute in bfloat16: where asked, or where the machine multiplies it fast."""
        if self.runtime.compute != "auto":
            return self.runtime.compute == "bfloat16"
        return multiplies_bfloat16(self.device)

    @cached_property
    def checkpoint_dtype(self) -> torch.dtype:
        return checkpoint.checkpoint_dtype(self.source, self.config)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The number format of the saved model."""
        return getattr(torch, self.recipe.dtype) if self.recipe.dtype else self.checkpoint_dtype

    @cached_property
    def model(self) -> PreTrainedModel:
        """The frozen source, in the number format to compute in."""
        model = self.load(self.source)
        self._refuse_overflow(model)
        return model

    def check_checkpoint(self) -> None:
        """Refuse a local checkpoint that is not whole, and say what of it is not kept. Errors: UserError."""
        for note in fidelity.losses_of(self.source, self.config, None if self.recipe.dtype else self.dtype):
            say(note, self.runtime.quiet)

    def _refuse_overflow(self, model: PreTrainedModel) -> None:
        if (self.recipe.dtype or fidelity.rounded(self.source, self.dtype)) and fidelity.overflows(self.dtype, model):
            name = str(self.dtype).removeprefix("torch.")
            raise UserError(f"--dtype {name} cannot hold the model's weights; use bfloat16 or float32.")

    def load(self, source: checkpoint.Source) -> PreTrainedModel:
        own = "source" if source == self.source else Path(source.name).name  # whose tensors have the same names
        offload = self.scratch / own if self.offloads else None
        return checkpoint.load_model(source, self.compute_dtype, self.device, offload)

    @cached_property
    def largest_weight(self) -> int:
        """Numbers in the largest weight of a decoder layer."""
        return max(value.numel() for layer in layers_of(self.skeleton) for value in layer.parameters())

    @cached_property
    def estimate(self) -> Estimate:
        return estimate_of(self)

    @cached_property
    def offloads(self) -> bool:
        """Whether the model's layers stay on the disk, as some stage would not fit with all of them held."""
        offloads = self.estimate.offloaded
        if offloads:
            why = f"the model does not fit in {self.room / 1e9:.1f} GB"
            say(f"{why}: its layers are read from the disk, one by one", self.runtime.quiet)
        return offloads

    @property
    def room(self) -> int:
        """This process's part of the memory, which others of its machine may have to share."""
        spread = self.device.startswith("cuda") and ":" not in self.runtime.device
        return self.memory // -(-self.world.local_size // (torch.cuda.device_count() if spread else 1))

    @cached_property
    def scratch(self) -> Path:
        """A folder for what is too large for memory; gone with the workspace, or with the next run's beginning.

        Only the first process has it in the run folder, which it alone cleans and which no other may see.
        """
        output = self.runtime.output if self.world.first and not self.runtime.dry_run else None
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=output))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    def let_go(self) -> None:
        """Delete what was too large for memory."""
        if "scratch" in self.__dict__:
            remove(self.scratch)

    def load_saved(self, folder: Path, custom_code: bool) -> PreTrainedModel:
        """A model that this run has written and verified, in the number format to compute in."""
        if not custom_code and self.offloads:
            return self.load(checkpoint.Source(str(folder)))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.compute_dtype, trust_remote_code=custom_code)
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def ram(self) -> int:
        """Bytes of memory of the machine, where models are written and checked whatever computes them."""
        return self.runtime.memory if self.runtime.memory and self.device == "cpu" else memory_limit()

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bfloat16 else torch.float32

    @property
    def compute(self) -> str:
        """What the model computes in, and where."""
        return f"{str(self.compute_dtype).removeprefix('torch.')} on {self.device.partition(':')[0]}"

    def model_as_saved(self) -> PreTrainedModel:
        """The source on the CPU in float32, rounded to what the saved number format holds."""
        same = self.model.dtype == torch.float32 and self.dtype == self.checkpoint_dtype
        same = same and fidelity.holds(self.dtype, self.model)  # single tensors may be stored in a wider format
        if same and self.device == "cpu" and not self.recipe.heals:  # which changes what is returned
            return self.model
        offload = self.scratch if self.estimate.writes_offloaded else None
        model = checkpoint.load_model(self.source, torch.float32, offload=offload)
        if is_offloaded(model):
            round_stored(model, self.dtype)
        return checkpoint.round_weights(model, self.dtype)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return checkpoint.load_tokenizer(self.source, self.config.vocab_size)

    @cached_property
    def parts(self) -> Parts:
        context = checkpoint.context_length(self.config)
        parts = read_parts(self.recipe, self.tokenizer, context, self.runtime.quiet)
        for blocks in (parts.calibration, parts.training, parts.validation):
            checkpoint.check_ids(blocks, self.config.vocab_size)
        return parts

    def share(self) -> None:
        """The first process's text and number format become everyone's. Errors: as `World.led`."""
        if not self._shared:
            self.__dict__["parts"] = self.world.led(lambda: self.parts)
            self.__dict__["bfloat16"] = self.world.led(lambda: self.bfloat16)
            self._shared = True

    def inputs(self) -> Inputs:
        return Inputs(model=fingerprints.fingerprint(self.source), data=self.parts.summary())

    @cached_property
    def memory(self) -> int:
        """Bytes of memory where the model computes, in use or not: a default taken from it can be repeated."""
        if self.runtime.memory is not None:
            return self.runtime.memory
        if self.device.startswith("cuda"):
            return torch.cuda.mem_get_info(self.device)[1]
        return memory_limit()

    def batch(self, tokens: int) -> int:
        """Sequences that make up about `tokens` tokens."""
        return max(1, tokens // self.parts.validation.shape[1])
