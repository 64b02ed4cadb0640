"""What a run's numbers mean, in words: for people who open the report or the model card and want to know if it is good.

Losses are in nats per token on the validation text; `excess` is what a model loses against the dense one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_streamline.quantities import counted
from llm_streamline.records import Fit, LayerPlan, LinearFit, Loss, Manifest, Scores, Window, runs_of

LOADERS = {"int8": "torchao", "w4a16": "compressed-tensors"}
FEW_SEQUENCES = 8  # validation sequences below which a loss is a rough figure
# excess in nats -> word and sentence; 0.02 nats are 2 % of perplexity, 0.1 are 11 %, 0.3 are 35 %, 1 is 172 %
GRADES = (
    (0.02, "good", "Hardly anything was lost"),
    (0.1, "good", "A little was lost"),
    (0.3, "fair", "A noticeable part was lost"),
    (1.0, "poor", "Much was lost"),
    (math.inf, "bad", "The saved model is badly damaged"),
)
_STAND_INS = {
    "layer": "one trained layer of the model's own kind stands",
    "mlp": "one layer with a trained MLP and silent attention stands",
    "merged": "one layer made of the window's stands",
    "ffn": "one trained feed-forward network stands",
    "swiglu": "one trained SwiGLU network stands",
    "linear": "one linear map stands",
}


@dataclass(frozen=True)
class Verdict:
    """`grade` is good, fair, poor or bad; `title` says it in one line and `sentences` in three."""

    grade: str
    title: str
    sentences: list[str]


def judge(plan: LayerPlan, scores: Scores) -> Verdict:
    """What was removed, what it costs, what came back; whatever the replacement did, plainly."""
    excess = scores.excess(scores.saved)
    grade, title = next(((g, t) for limit, g, t in GRADES if excess <= limit), ("bad", "The loss is not a number"))
    if replacement_failed(plan, scores):
        grade = grade if grade == "bad" else "poor"
        title = "The replacement did not help"
    return Verdict(grade, title, [removed(plan), cost(plan, scores), came_back(plan, scores)])


def replacement_failed(plan: LayerPlan, scores: Scores) -> bool:
    """Whether the saved model is no better than the source cut to the same depth; NaN is no better."""
    return not plan.merely_cut and not scores.saved.nats < scores.cut.nats


def removed(plan: LayerPlan) -> str:
    runs = runs_of(plan.gone)
    named = [layers(runs[0]), *(layers(run).partition(" ")[2] for run in runs[1:])]
    several = len(plan.gone) > 1
    named[0] = named[0].replace("Layer ", "Layers ") if several else named[0]
    which = f"{_listed(named)} ({len(plan.gone)} of {plan.num_layers}) {'are' if several else 'is'} gone"
    place = "the place of each run" if plan.others and plan.each else f"{'their' if several else 'its'} place"
    after = plan.num_layers - plan.net
    fewer = 1 - plan.parameters_after / plan.parameters_before
    return (
        f"{which}; {stand_in(plan)} in {place}. "
        f"That leaves {after} of {plan.num_layers} layers and {fewer:.1%} fewer parameters."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def layers(window: Window) -> str:
    return plural(window, f"Layer {window.start}", f"Layers {window.start} to {window.stop - 1}")


def plural(window: Window, one: str, several: str) -> str:
    return one if len(window) == 1 else several


def stand_in(plan: LayerPlan) -> str:
    if plan.replace == "none":
        return "nothing stands"
    if plan.folded is not None:
        return f"a linear map, folded into the MLP of layer {plan.folded}, stands"
    if plan.each > 1:
        return f"{plan.each} trained layers of the model's own kind stand"
    return _STAND_INS[plan.replace.partition(":")[0]]


def cost(plan: LayerPlan, scores: Scores) -> str:
    dense, saved = perplexity(scores.dense.nats), perplexity(scores.saved.nats)
    sentence = f"On the validation text, perplexity goes from {dense} to {saved} ({rise(scores, scores.saved)})"
    if plan.merely_cut:
        return f"{sentence}."
    cut = perplexity(scores.cut.nats)
    return f"{sentence}; merely cut to the same depth, the model would be at {cut} ({rise(scores, scores.cut)})."


def perplexity(nats: float) -> str:
    """exp of a loss, or a word where that has outgrown all use."""
    return f"{math.exp(nats):.4g}" if nats < 10 else f"{nats:.1f} nats"


def rise(scores: Scores, which: Loss) -> str:
    """How much higher a perplexity is than the dense model's."""
    excess = scores.excess(which)
    if not abs(excess) < math.log(10):  # also true of nan
        return "more than 10 times as high" if excess > 0 else f"{excess:+.2f} nats"
    return f"{math.expm1(excess):+.1%}"


def came_back(plan: LayerPlan, scores: Scores) -> str:
    if plan.merely_cut:
        return "Nothing was trained: this is the price of removing the layers."
    by = helper(plan)
    if replacement_failed(plan, scores):
        worse = scores.saved.nats - scores.cut.nats
        return (
            f"The saved model's loss is {worse:.4f} nats above that of the merely cut model: {by[0].lower()}{by[1:]} "
            f"makes it worse than nothing would. {_advice(plan)}, or use --replace none."
        )
    share = recovered(scores)
    if share is None:
        return "Cutting alone costs nothing on this text, and the saved model is better still."
    if share > 1:
        below = f"ends {scores.dense.nats - scores.saved.nats:.4f} nats below the dense model"
        return f"{by} brings back all of the loss that cutting alone costs, and {below}."
    return f"{by} brings back {share:.0%} of the loss that cutting alone costs."


def helper(plan: LayerPlan) -> str:
    """What makes up for the window, as a subject of one number."""
    if plan.replace == "none":
        return "Healing"
    what = "The training of the replacements" if plan.others else "The replacement"
    if plan.replace == "merged":
        what = "What the layers are merged into"
    return what if plan.heal == "none" else f"{what}, with healing,"


def _advice(plan: LayerPlan) -> str:
    if plan.replace == "merged" and plan.heal == "none":
        return "Train what stands in (--replace layer)"
    solved = plan.replace.partition(":")[0] == "linear"
    more = "Give more or other text (or a lower learning rate, where the map was trained)"
    return more if solved else "Train on more or other text, lower the learning rate"


def picked(manifest: Manifest) -> str:
    """What the validation part has chosen, besides giving the losses; empty where nothing was to choose."""
    if isinstance(manifest.fit, Fit) or manifest.healing:
        return "the best weights"
    return "the ridge" if manifest.fit else ""


def cut(plan: LayerPlan) -> str:
    """What the merely cut model lacks, and by what that was chosen where it is not what the plan itself removes."""
    named = f"layers {plan.plain_window} removed and nothing in their place"
    if list(plan.plain_window.layers()) == plan.gone:
        return named
    return f"{named}, chosen by cosine; by another score there may be a better cut"


def recovered(scores: Scores) -> float | None:
    """Share of the cut's excess loss that the replacement brings back; None where cutting costs nothing."""
    cut = scores.excess(scores.cut)
    return (scores.cut.nats - scores.saved.nats) / cut if cut > 0 else None


def hooked(plan: LayerPlan) -> str:
    """What of the source model that the saved one was held against hooks did what with."""
    if plan.folded is not None:
        return "its window skipped, and the layer below it standing aside for one with the map folded in,"
    what = "its window" if len(plan.cuts()) == 1 else "its windows"
    return f"{what} {'skipped' if plan.replace == 'none' else 'replaced'}"


def solved(fit: LinearFit) -> str:
    """What a closed form found, in a line."""
    ridge = {None: "no ridge helped: the identity", 0.0: "measured"}.get(fit.ridge, f"ridge {fit.ridge}")
    found = f"a linear map on {fit.tokens:,} tokens, {ridge}; {fit.loss} {fit.validation_before:.5f} -> "
    found += f"{fit.validation_after:.5f}"
    if fit.loss == "cosine":  # whose last problem is about states of another length
        return found
    return f"{found}, {fit.validation_unexplained:.1%} of what the window adds is left unexplained"


def healed(plan: LayerPlan, tensors: int) -> str:
    """What healing has left of the source, in a sentence."""
    besides = " besides the replacement's" if plan.occupied or plan.folded is not None else ""
    are = "is" if tensors == 1 else "are"
    return f"Healed ({plan.heal}): {counted(tensors, 'tensor')}{besides} {are} not the source's any more."


def notes(manifest: Manifest) -> list[str]:
    """What one has to know before using the model, besides how good it is."""
    plan, fit, scores = manifest.plan, manifest.fit, manifest.scores
    found = []
    if scores and scores.dense.sequences < FEW_SEQUENCES:
        found.append(f"The losses are of only {scores.dense.tokens:,} tokens: take them as rough.")
    if plan.folded is not None:
        found.append(
            f"Layer {plan.folded}, the one below the window, is not the source's any more: the map is folded into its "
            "MLP's output projection, at no cost in parameters or time."
        )
    if isinstance(fit, LinearFit) and fit.ridge is None:
        then = (
            "the model is saved as merely cut"
            if plan.heal == "none"
            else "only healing has changed the merely cut model"
        )
        found.append(f"No linear map lowered the loss on the validation part; {then}.")
    if isinstance(fit, Fit) and fit.best_step == 0:
        found.append("Training did not improve the replacement; it is saved as it started.")
    if manifest.healing and manifest.healing.best_step == 0:
        found.append("Healing did not improve the model; it is saved as it was before.")
    elif manifest.healing:
        found.append(healed(plan, manifest.tensors["healed"]))
    if plan.replace == "mlp":
        found.append("The mlp's attention is silent but stays: on disk, in compute and in the KV cache it is a layer.")
    return found + on_loading(manifest)


def on_loading(manifest: Manifest) -> list[str]:
    """What one has to know to run it, and to trust it."""
    plan = manifest.plan
    found = []
    if manifest.quantised:
        found.append(
            f"The weights of its linear layers are {manifest.quantised}, and the losses told here are of the model "
            f"before that; it loads where {LOADERS[manifest.quantised]} is installed."
        )
    if path := manifest.recipe.get("family_from"):
        found.append(
            f"Nobody has proven that models of type {plan.model_type} survive this (--family-from {path}): only the "
            "check of this one against its source says so."
        )
    if plan.custom_code:
        found.append("The model carries code of its own and loads only with trust_remote_code=True.")
    return found
