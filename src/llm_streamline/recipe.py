"""Recipe (what to make), beside Runtime (how to make it): one schema each for YAML, flags, Python and the manifest."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from llm_streamline.conflicts import CHECKS
from llm_streamline.heal import check_heal, parse_heal
from llm_streamline.objective import HEALING, LOGITS_HEALING, LOSS, STATES_ONLY, Objective, check_loss, parse_objective
from llm_streamline.presets import PRESETS
from llm_streamline.quantities import Count, Fraction
from llm_streamline.replace import BEST, ONE_OF_ITS_OWN, SOLVED, check_replace, solvable
from llm_streamline.runtime import Runtime as Runtime
from llm_streamline.schema import Schema, as_several, as_text
from llm_streamline.windows import Window, parse_windows

TEMPERATURE = 2.0  # as measured (docs/decisions/0012-start-and-temperature.md)


class Recipe(Schema):
    """What to make. Two runs of one recipe on one machine give the same weights, bit for bit."""

    model: str = Field(description="Folder or Hub name of the causal LM to shorten; 'bundled' is the demo model.")
    data: Annotated[tuple[str, ...], BeforeValidator(as_several)] = Field(
        (),
        description="Text to measure and train on: a .txt, .jsonl or .parquet file, a folder or 'glob' of them, "
        "hub:NAME[:SPLIT] for a Hub data set, or 'bundled'. Repeat it for several sources; SOURCE@0.7 gives one a "
        "share of the tokens.",
    )
    field: str | None = Field(
        None, description="The JSON field (or data-set column) that holds the text or the chat; found if not given."
    )
    mixture: str | None = Field(
        None,
        description="Shares of the tokens by domain: slimpajama (the paper's), or NAME=SHARE,NAME=SHARE. "
        "[default: the text as it is]",
    )
    domain: str = Field(
        "meta.redpajama_set_name",
        min_length=1,
        description="With --mixture: the field that names a document's domain, dotted.",
    )
    preset: str | None = Field(
        None,
        description=f"A named set of values below, as published: {', '.join(PRESETS)}. What you give wins.",
    )
    remove: Annotated[str | None, BeforeValidator(as_text)] = Field(
        None, description="Net layers to remove: a number (8) or a share of the layers (25%). [default: 25%]"
    )
    window: str | None = Field(
        None,
        description="The layers to replace, 0-based and half-open: 21:30 is layers 21 to 29; 3:6,8:11 is two windows, "
        "each with a replacement of its own. Instead of --remove.",
    )
    windows: Count = Field(
        1,
        description="How many windows to remove instead of one: apart, as even in length as can be, each with a "
        "replacement of its own, chosen one after the other, with those before left out of the model.",
    )
    rounds: Count = Field(
        1,
        description="With --windows: how often to remove and train. The second of two rounds chooses its windows on "
        "the model with the replacements of the first in place, and trains these again with its own; the training "
        "tokens are shared evenly.",
    )
    for_: Literal["gguf"] | None = Field(
        None,
        alias="for",
        description="A format that the model is to be exported to: with gguf, so many layers go that llama.cpp, which "
        "tells some models' layers apart by their number, still takes each for what it is.",
    )
    max_params: Count | None = Field(
        None,
        description="Remove as few layers as bring the model to this many parameters, e.g. 5B. Instead of --remove.",
    )
    select: (
        Literal["auto", "cosine", "relative", "loss", "kl", "replaceability", "last", "influence", "greedy"] | None
    ) = Field(
        None,
        description="What decides between the windows of one length: cosine (the paper's), relative change, loss or kl "
        "after deletion, replaceability (what no linear map explains), last (the highest), or auto: the best few by "
        "these, ranked by loss with a linear map in their place, or without one for --replace none and linear. With "
        "--replace none also single layers, wherever they lie: influence (those that change the state least) or greedy "
        "(one after the other, by the loss after deletion). [default: auto, and cosine where the model does not fit in "
        "memory]",
    )
    protect_first: int = Field(1, ge=0, description="How many first layers no window may take.")
    protect_last: int = Field(1, ge=0, description="How many last layers no window may take.")
    replace: Annotated[str, AfterValidator(check_replace)] = Field(
        "layer",
        description="What stands in for the window: none; layer (one of the model's own), layer:2 for two; mlp (one "
        "with its attention silent); merged (the window's own layers made one, untrained); the paper's ffn or swiglu, "
        "also as ffn:residual or swiglu:residual; linear (a map in closed form, folded into the MLP below the window), "
        "linear:free (one in a layer's place) or linear:patch (there, one that only scales the state's channels); both "
        "are trained from there by a --loss that has no closed form.",
    )
    init: Literal["best", "inherited", "random"] | None = Field(
        None,
        description="Start of the replacement: the best of the pruned layers, that by which alone in their place the "
        "loss rises least; inherited from the first ones; or random. [default: best for layer and mlp, inherited for "
        "more than one layer or where the model does not fit in memory, random for ffn and swiglu; a trained map "
        "begins as its closed form]",
    )
    family_from: str | None = Field(
        None,
        description="Try a kind of model that is not proven: the path of the list of its decoder layers, such as "
        "model.layers. What is saved is checked against the source as ever; with --replace layer, merged or none.",
    )
    custom_code: bool = Field(
        False,
        description="Let the saved model carry code of its own, as ffn, swiglu, linear:free and linear:patch need: it "
        "then loads only with trust_remote_code=True.",
    )
    loss: Annotated[str | None, AfterValidator(check_loss)] = Field(
        None,
        description="Distillation loss: of the states at the window's end nmse (each token's squared error over its "
        "target's squared norm), mse (the paper's Eq. 4) or cosine; of the next-token distributions, through the "
        "frozen layers above, kl (from the dense model's), kl:100 (over its 100 likeliest tokens), lm (of the text "
        "itself) or kl+0.5lm (both, the text's half as much); or several by share of the training tokens, "
        "mse:0.6,kl:0.4, of which the last is what is validated. "
        f"[default: {LOSS}; {STATES_ONLY} where layers above the window would be read from the disk]",
    )
    temperature: float | None = Field(
        None, gt=0, description="With a loss of kl: what logits are divided by before softmax. [default: 2]"
    )
    tokens: Count | None = Field(
        None, description="Training tokens, e.g. 250k. [default: 1M, or what the text gives if that is less]"
    )
    calibration_tokens: Count | None = Field(
        None, description="Tokens on which similarity is measured. [default: 65536, a tenth of a small text]"
    )
    validation_tokens: Count | None = Field(
        None,
        description="Tokens held out to choose the best weights and report loss. "
        "[default: 32768, a tenth of a small text]",
    )
    heal: Annotated[str, AfterValidator(check_heal)] = Field(
        "none",
        description="What else trains once the replacement is there, whose weights are not the source's any more then: "
        "lora (adapters on all layers that stay, merged in the end), lora:8 for their rank, layers:2 (the two on "
        "either side of the cut, whole), last:3 (the last three), or all; with +norm and +head also those after the "
        "last layer, as norm and head alone do.",
    )
    heal_share: float = Field(
        0.9, gt=0, lt=1, description="With --heal: its share of the training tokens; all where nothing else trains."
    )
    heal_loss: Annotated[str | None, AfterValidator(check_loss)] = Field(
        None,
        description="With --heal: its loss, as --loss takes it, of the states after the last layer or the logits. "
        f"[default: {HEALING}; {LOGITS_HEALING} where the norm or the head trains]",
    )
    heal_lr: float | None = Field(
        None,
        gt=0,
        description="With --heal: the peak learning rate of the layers that stay; what stands in for others keeps its "
        "own. [default: that of training; for whole layers 0.05 of it]",
    )
    block: Count | None = Field(
        None, gt=1, description="Tokens per sequence. [default: the model's context, 2048 at most]"
    )
    batch: Count | None = Field(
        None,
        description="Sequences per micro-batch. [default: by memory, for 1000 steps or more of 16k tokens or fewer]",
    )
    epochs: Count = Field(1, description="How often the training tokens are gone through, each time in another order.")
    accumulate: Count = Field(1, description="Micro-batches per optimizer step.")
    lr: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate. [default: at width 256 2e-3, with muon 4e-3, falling with the width]",
    )
    min_lr: float | None = Field(None, ge=0, description="Learning rate of the last step. [default: a tenth of --lr]")
    optimizer: Literal["muon", "adamw"] | None = Field(
        None,
        description="What takes the steps: muon for weights that are matrices with adamw for the rest, or adamw "
        "alone, as always for the adapters of --heal lora. [default: muon for 250 steps or more]",
    )
    weight_decay: float = Field(1e-3, ge=0, description="The optimizer's weight decay.")
    warmup: Fraction = Field(0.01, description="Share of the steps in which the learning rate rises.")
    clip: float = Field(5.0, gt=0, description="Largest gradient norm.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the text split, the training order and random starts.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Number format of the saved model. [default: the checkpoint's]"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset_first(cls, values: Any) -> Any:
        """A preset's values, where none are given."""
        preset = values.get("preset")
        if preset is None:
            return values
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r} is not known; choose one of {', '.join(PRESETS)}")
        return {**PRESETS[preset], **values}

    @model_validator(mode="after")
    def _without_conflicts(self) -> Recipe:
        for check in CHECKS:
            if conflict := check(self):
                raise ValueError(conflict)
        return self

    @property
    def scattered(self) -> bool:
        """Whether single layers go, wherever they lie."""
        return self.select in ("influence", "greedy")

    @property
    def trains(self) -> bool:
        """Whether there is anything to learn from text."""
        return self.learns or self.heals

    @property
    def learns(self) -> bool:
        """Whether what stands in for the window learns anything."""
        return self.replace not in ("none", "merged")

    @property
    def heals(self) -> bool:
        return parse_heal(self.heal) is not None

    @property
    def healing(self) -> Recipe:
        """The settings of healing, where this recipe's are those of the replacement's training."""
        own = {"loss": self.heal_loss_used, "lr": self.heal_lr or self.lr}
        if self.heal_lr:
            own["min_lr"] = None  # which is of the other rate
        if self.heal.startswith("lora"):
            own["optimizer"] = "adamw"  # an orthogonal step of one factor makes no such step of their product
        return self.model_copy(update=own)

    @property
    def objective(self) -> Objective:
        return parse_objective(self.loss_used)

    @property
    def trained_by(self) -> list[Objective]:
        """What lowers anything: the replacement's losses where it learns, and healing's."""
        return [one.objective for one, trains in ((self, self.learns), (self.healing, self.heals)) if trains]

    @property
    def loss_used(self) -> str:
        """The loss asked for, or the default where the model is held; a closed form has one of states alone."""
        return self.loss or (STATES_ONLY if self.solved else LOSS)

    @property
    def heal_loss_used(self) -> str:
        """The loss of healing asked for, or the default; norm and head are nothing to a loss of states."""
        heal = parse_heal(self.heal)
        return self.heal_loss or (LOGITS_HEALING if heal and heal.above else HEALING)

    @property
    def from_disk(self) -> Recipe:
        """This recipe where the model's layers stay on the disk: its default loss does not look through them."""
        return self if self.loss else self.model_copy(update={"loss": STATES_ONLY})

    @property
    def network(self) -> bool:
        """Whether the replacement is a network that stock transformers does not know."""
        return self.replace in ("linear:free", "linear:patch") or self.replace.partition(":")[0] in ("ffn", "swiglu")

    @property
    def solved(self) -> bool:
        """Whether the replacement is had in closed form, so that nothing is trained."""
        known = solvable(self.replace)
        return bool(known) and (self.loss is None or self.loss in known or not self.each)

    @property
    def start(self) -> str:
        """How the replacement's weights begin: 'best', 'inherited', 'random' or, of what has one, its closed form."""
        if solvable(self.replace):
            return SOLVED
        if self.init is not None:
            return self.init
        return "random" if self.network else BEST if self.replace in ONE_OF_ITS_OWN else "inherited"

    @property
    def given(self) -> list[Window]:
        """The windows named by --window, from the bottom up."""
        return parse_windows(self.window) if self.window is not None else []

    @property
    def count(self) -> int:
        """How many windows go."""
        return len(self.given) or self.windows

    @property
    def occupied(self) -> int:
        """Layers occupied by the replacements of all windows."""
        return self.count * self.each

    @property
    def each(self) -> int:
        """Layers occupied by the replacement of one window: none and linear 0, layer:k k, anything else 1."""
        if self.replace in ("none", "linear"):
            return 0
        count = self.replace.partition(":")[2]
        return int(count) if count.isdigit() else 1
