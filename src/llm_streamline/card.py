"""The model card, README.md of a model folder, from the manifest beside it; and what it carries on from the source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llm_streamline import findings, tables, verdict
from llm_streamline.comparison import Unit, is_share, saved_of, units
from llm_streamline.evaluation import Evaluation
from llm_streamline.files import write_text
from llm_streamline.records import Fit, LayerPlan, LinearFit, Manifest, Scores

CARD = "README.md"
TEMPLATES = Path(__file__).parent / "templates"
_CARRIED = ("license", "license_name", "license_link", "language")
_LICENCE_FILES = re.compile(r"(licen[cs]e|notice|copying)([._-].*)?", re.IGNORECASE)
_FROM_HUB = ("README.md", "LICENSE", "NOTICE")  # one request each, so no guessing of more


def source_files(path: str) -> list[Path]:
    """The source's own card and licence files: of a folder, or fetched from the Hub where that answers."""
    if Path(path).is_dir():
        return [p for p in sorted(Path(path).iterdir()) if p.is_file() and (p.name == CARD or is_licence(p))]
    found = (_fetched(path, name) for name in _FROM_HUB)
    return [file for file in found if file]


def is_licence(path: Path) -> bool:
    return bool(_LICENCE_FILES.fullmatch(path.name))


def _fetched(repository: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name))
    except Exception:  # absent, offline, gated: whatever it is, a card is no reason for a run to fail
        return None


def origin(path: str, files: list[Path]) -> dict[str, Any]:
    """What the card says of the source: `base_model` where it is on the Hub, and its licence and language.

    Args: path: a folder or Hub name. files: what `source_files` found of it.
    """
    found = {} if Path(path).is_dir() else {"base_model": path}
    cards = [_metadata(file) for file in files if file.name == CARD]
    carried = {key: value for card in cards for key, value in card.items() if key in _CARRIED and _is_plain(value)}
    licences = [file for file in files if is_licence(file) and not file.name.lower().startswith("notice")]
    if "license" not in carried and licences:
        carried |= _licence_of(licences[0])
    return {**found, **carried}


def _metadata(card: Path) -> dict[str, Any]:
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(card) or {}
    except Exception:  # a source's card may hold anything; what cannot be read is not carried on
        return {}


def _is_plain(value: Any) -> bool:
    """A word, or several: what the Hub takes for a licence or a language."""
    several = value if isinstance(value, list) else [value]
    return bool(several) and all(isinstance(one, str) and one for one in several)


def _licence_of(file: Path) -> dict[str, str]:
    """The Hub's name of the licence in a file; any but the two plainest is called `other` and pointed to."""
    head = " ".join(file.read_text(encoding="utf-8", errors="replace").split())[:300].lower()
    if "apache license version 2.0" in head:
        return {"license": "apache-2.0"}
    if "mit license" in head:
        return {"license": "mit"}
    return {"license": "other", "license_name": "see-license-file", "license_link": file.name}


def write_card(manifest: Manifest, folder: Path, evaluation: Evaluation | None = None) -> None:
    write_text(folder / CARD, card_text(manifest, evaluation))


def card_text(manifest: Manifest, evaluation: Evaluation | None = None) -> str:
    """The whole card; without scores, as long as they have not been measured, it says so."""
    import jinja2
    import yaml

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(  # Markdown, which has no use for escaped HTML: `plain` keeps names in their place
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    plan, scores = manifest.plan, manifest.scores
    return environment.get_template("card.md.j2").render(
        metadata=metadata(manifest, evaluation),
        tasks=task_rows(evaluation),
        said=said(evaluation),
        measured=[tables.timings(evaluation), tables.sizes(evaluation)] if evaluation else [],
        m=manifest,
        plan=plan,
        name=_plain(Path(plan.model).name),
        source=_plain(plan.model),
        removed=verdict.removed(plan),
        hooked=verdict.hooked(plan),
        solved=verdict.solved(manifest.fit) if isinstance(manifest.fit, LinearFit) else None,
        judged=verdict.judge(plan, scores) if scores else None,
        rows=score_rows(plan, scores),
        trainings=trainings(manifest),
        notes=verdict.notes(manifest),
        picked=verdict.picked(manifest),
        cut=verdict.cut(plan),
        recipe=yaml.safe_dump(manifest.recipe, sort_keys=False),
        command=manifest.command or "(called from Python)",
    )


def trainings(manifest: Manifest) -> list[tuple[str, Fit]]:
    """What was trained, in order: of the replacement, and of the rest."""
    title, rounds = "Training the replacement", len(manifest.earlier) + 1
    found = [(f"{title}, round {turn} of {rounds}", fit) for turn, fit in enumerate(manifest.earlier, start=1)]
    last = f"{title}, round {rounds} of {rounds}" if rounds > 1 else title
    both = ((last, manifest.fit), ("Healing the rest", manifest.healing))
    return [*found, *((title, fit) for title, fit in both if isinstance(fit, Fit))]


def metadata(manifest: Manifest, evaluation: Evaluation | None = None) -> str:
    """The YAML block that the Hub reads, with the saved model's accuracies where they rank."""
    from huggingface_hub import EvalResult, ModelCardData

    custom = ["custom_code"] if manifest.plan.custom_code else []
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=unit.name,
            dataset_name=unit.name,
            metric_type="accuracy",
            metric_value=round(unit.after, 4),
        )
        for unit in findings.ranking(_asked(evaluation))
    ]
    named: dict[str, Any] = (
        {"model_name": _plain(Path(manifest.plan.model).name), "eval_results": results} if results else {}
    )
    data = ModelCardData(
        **manifest.origin,
        **named,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llm-streamline", "layer-pruning", "distillation", *custom],
    )
    return data.to_yaml()


def score_rows(plan: LayerPlan, scores: Scores | None) -> list[tuple[str, str, str, str, str, str]]:
    """The lines of the table of scores: model, layers, parameters, loss, perplexity, excess."""
    if scores is None:
        return []
    depth, plain = plan.num_layers, plan.plain_window
    three = (
        ("dense", depth, plan.parameters_before, scores.dense),
        (f"cut {plain}", depth - len(plain), plan.plain_parameters, scores.cut),
        ("saved", depth - plan.net, plan.parameters_after, scores.saved),
    )
    return [
        (
            name,
            str(count),
            f"{parameters:,}",
            f"{loss.nats:.4f} ± {loss.se:.4f}",
            verdict.perplexity(loss.nats),
            "" if name == "dense" else f"{scores.excess(loss):+.4f}",
        )
        for name, count, parameters, loss in three
    ]


def _asked(evaluation: Evaluation | None) -> list[Unit]:
    """What the dense and the saved model of a run were asked."""
    saved = evaluation and saved_of(evaluation)
    return units(evaluation, saved) if evaluation and saved else []


def said(evaluation: Evaluation | None) -> list[str]:
    """The saved model against the dense one in a sentence, and what one is warned of."""
    saved = evaluation and saved_of(evaluation)
    return [findings.sentence(evaluation, saved), *evaluation.warnings] if evaluation and saved else []


def task_rows(evaluation: Evaluation | None) -> list[tuple[str, ...]]:
    """Task, accuracies, stability, effective n and flips; what ranks nothing stands in parentheses."""
    saved = evaluation and saved_of(evaluation)
    flips = {one.task: f"{one.flips:.1%}" for one in (saved.flips or () if saved else ())}
    return [_task_row(unit, flips.get(unit.name, "")) for unit in _asked(evaluation) if is_share(unit.dense)]


def _task_row(unit: Unit, flips: str) -> tuple[str, ...]:
    name = f"`{_cell(unit.name)}`"
    accuracies = [f"{value:.3f}" if unit.ranks else f"({value:.3f})" for value in (unit.before, unit.after)]
    if not unit.stability:
        return (name, *accuracies, "", "", flips)
    effective = sum(one.effective_items for one in unit.stability)
    stable = f"({unit.stable:.3f})" if unit.doubt else f"{unit.stable:.3f}"
    return (name, *accuracies, stable, f"{effective:,.0f} of {unit.items:,}", f"{unit.flipped / unit.items:.1%}")


def _cell(text: str) -> str:
    return _plain(text).replace("|", "/")


def _plain(text: str) -> str:
    """A name that cannot end the code span or the line it stands in."""
    return " ".join(text.replace("`", "'").split())
