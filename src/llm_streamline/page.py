"""Run or evaluation -> report.html: one self-contained page to judge it by, made from the folder's files alone.

Nothing in it is measured anew and nothing tells the time: made again from the same files, it has the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from llm_streamline import charts, findings, scoreboard, tables, verdict
from llm_streamline.card import TEMPLATES, score_rows, trainings
from llm_streamline.comparison import compared, saved_of, units
from llm_streamline.evaluation import CHAIN, EVALUATION, Chain, Evaluation
from llm_streamline.files import write_text
from llm_streamline.oracle import MANIFEST
from llm_streamline.ranking import Ranking, confidences, ranking_in
from llm_streamline.ranking import table as ranking_rows
from llm_streamline.records import LayerPlan, LinearFit, Manifest, Scores, Similarity, runs_of

PAGE = "report.html"


def write_report(folder: Path) -> Path:
    """`folder`/report.html from a finished run. Errors: UserError for a damaged file."""
    manifest = Manifest.read(folder / "model" / MANIFEST)
    html = render(
        manifest.model_copy(update={"scores": Scores.read(folder / "scores.json")}),
        Similarity.read(folder / "similarity.json"),
        (folder / "recipe.yaml").read_text(encoding="utf-8"),
        Evaluation.read(folder / EVALUATION) if (folder / EVALUATION).exists() else None,
        ranking_in(folder),
        Chain.read(folder / CHAIN) if (folder / CHAIN).exists() else None,
    )
    write_text(folder / PAGE, html)
    return folder / PAGE


def write_evaluation_report(folder: Path) -> Path:
    """`folder`/report.html from an evaluation. Errors: UserError for a damaged file."""
    write_text(folder / PAGE, render_evaluation(Evaluation.read(folder / EVALUATION)))
    return folder / PAGE


def render(
    manifest: Manifest,
    similarity: Similarity,
    recipe: str,
    found: Evaluation | None = None,
    ranking: Ranking | None = None,
    chain: Chain | None = None,
) -> str:
    plan, scores, fit = manifest.plan, manifest.scores, manifest.fit
    assert scores is not None  # a page of a run that is not finished is not asked for
    saved = saved_of(found) if found else None
    return _template("report.html.j2").render(
        name=Path(plan.model).name or plan.model,
        m=manifest,
        plan=plan,
        solved=verdict.solved(fit) if isinstance(fit, LinearFit) else None,
        hooked=verdict.hooked(plan),
        scores=scores,
        column=accuracy_column(found),
        judged=verdict.judge(plan, scores),
        judged_tasks=[findings.sentence(found, saved)] if found and saved else [],
        notes=verdict.notes(manifest),
        picked=verdict.picked(manifest),
        cut=verdict.cut(plan),
        warnings=found.warnings if found else (),
        tiles=[*tiles(plan, scores), *(scoreboard.tiles(found, saved) if found and saved else [])],
        board=scoreboard.board(found) if found else None,
        chain=chain and tables.chain(chain),
        bars=excess_bars(plan, scores),
        before=source_layers(plan),
        after=plan.layer_map(),
        rows=score_rows(plan, scores),
        data_parts=data_parts(manifest),
        domains=manifest.data.get("domains", {}),
        recipe=recipe,
        trainings=[(title, one, charts.training_chart(one)) for title, one in trainings(manifest)],
        similarity=similarity,
        **similarity_parts(similarity, plan),
        **ranking_parts(ranking),
    )


def ranking_parts(ranking: Ranking | None) -> dict[str, Any]:
    """What the page says of the windows that were ranked; nothing where none were."""
    ranked = ranking and tables.Table(*ranking_rows(ranking), names=1)
    mapped = ranking is not None and "replaceability" in ranking.winners
    told = confidences(ranking) if ranking else ""
    return {"ranking": ranking, "ranked": ranked, "mapped": mapped, "confidences": told}


def render_evaluation(found: Evaluation) -> str:
    several = compared(found)
    names = ", ".join(one.label for one in several or found.models)
    return _template("evaluation.html.j2").render(
        title=f"{names} against {found.against}" if several else names,
        found=found,
        sentences=findings.sentences(found),
        warnings=found.warnings,
        tiles=scoreboard.tiles(found, several[0]) if len(several) == 1 else [],
        overview=tables.overview(found),
        board=scoreboard.board(found),
    )


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    return environment.get_template(name)


@dataclass(frozen=True)
class Column:
    """The accuracies of the dense, the merely cut and the saved model on one task."""

    task: str
    values: list[str]


def accuracy_column(found: Evaluation | None) -> Column | None:
    """By the first task that ranks; None where there is none."""
    saved = saved_of(found) if found else None
    if found is None or saved is None:
        return None
    unit = next(iter(findings.ranking(units(found, saved))), None)
    if unit is None:
        return None
    cut = scoreboard.cut_value(found, unit)
    return Column(unit.name, [f"{unit.before:.2f}", "" if cut is None else f"{cut:.2f}", f"{unit.after:.2f}"])


def tiles(plan: LayerPlan, scores: Scores) -> list[tuple[str, str, str]]:
    """The few figures one takes away: what, how much, and what that is."""
    fewer = 1 - plan.parameters_after / plan.parameters_before
    share = None if plan.merely_cut else verdict.recovered(scores)
    found = [
        ("layers", f"{plan.num_layers} → {plan.num_layers - plan.net}", f"{plan.net} fewer, net"),
        ("parameters", f"{-fewer:+.1%}", f"{plan.parameters_before:,} → {plan.parameters_after:,}"),
        (
            "perplexity",
            verdict.rise(scores, scores.saved),
            f"{verdict.perplexity(scores.dense.nats)} → {verdict.perplexity(scores.saved.nats)} on the validation text",
        ),
    ]
    if share is not None:
        found.append(("brought back", f"{share:.0%}", "of the loss that cutting alone costs"))
    return found


def excess_bars(plan: LayerPlan, scores: Scores) -> list[tuple[str, str, float, str]]:
    """Name, excess loss in words, length in percent and kind of a bar each for the cut and the saved model."""
    found = [("merely cut", scores.excess(scores.cut), "cut"), ("saved", scores.excess(scores.saved), "saved")]
    if plan.merely_cut:
        found = found[1:]
    longest = max([excess for _, excess, _ in found if excess > 0], default=1.0)
    return [(name, f"{e:+.4f}", round(100 * max(0.0, e) / longest, 2), kind) for name, e, kind in found]


def source_layers(plan: LayerPlan) -> list[tuple[int, bool]]:
    """The source's layers, each with whether it was removed."""
    return [(layer, layer in plan.gone) for layer in range(plan.num_layers)]


def similarity_parts(similarity: Similarity, plan: LayerPlan) -> dict[str, Any]:
    """The charts of layers and windows with all that is gone marked, and the cosine of each run's ends."""
    gone = runs_of(plan.gone)
    named = [f"{one}, {similarity.of(one):.4f} ± {similarity.error_of(one):.4f}" for one in gone]
    drawn = {"layer_chart": charts.layer_chart(similarity, gone), "heat_map": charts.heat_map(similarity, gone)}
    return {**drawn, "gone": gone, "outlined": "; ".join(named)}


def data_parts(manifest: Manifest) -> list[tuple[str, str, str, str, str]]:
    """Name, purpose, blocks, tokens and the start of the hash of each part of the text."""
    purposes = part_purposes(manifest)
    return [
        (name, purposes[name], f"{part['blocks']:,}", f"{part['tokens']:,}", part["sha256"][:8])
        for name, part in manifest.data.items()
        if name in purposes
    ]


def part_purposes(manifest: Manifest) -> dict[str, str]:
    """What each part of the text was for."""
    learners = {"what stands in": manifest.fit, "what stays": manifest.healing}
    taught, picked = [what for what, fit in learners.items() if fit], verdict.picked(manifest)
    return {
        "calibration": "measures similarity",
        "training": f"teaches {' and '.join(taught)}" if taught else "nothing learns from it",
        "validation": f"judges: {f'chooses {picked} and ' if picked else ''}gives the losses",
    }
