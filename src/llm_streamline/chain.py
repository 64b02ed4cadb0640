"""A shortened model with fewer bits per weight besides: written, checked, and told beside the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llm_streamline import memory
from llm_streamline.checkpoint import weight_bytes
from llm_streamline.comparison import mean_accuracy, mean_stability, saved_of
from llm_streamline.errors import UserError
from llm_streamline.evaluation import Evaluation, Lighter, Link
from llm_streamline.export import export
from llm_streamline.families import layers_of
from llm_streamline.files import remove, sha256
from llm_streamline.lighter import (
    INT8,
    W4A16,
    by_llm_compressor,
    by_torchao,
    check_library,
    group_size,
    write_lighter,
)
from llm_streamline.oracle import MANIFEST
from llm_streamline.progress import say
from llm_streamline.records import Loss, Manifest, Scores
from llm_streamline.report import compared_lines
from llm_streamline.runtimes import gguf
from llm_streamline.runtimes.check import require
from llm_streamline.runtimes.language_model import CONTEXT, GgufLanguageModel
from llm_streamline.runtimes.patterns import gguf_period, why_not_gguf
from llm_streamline.scoring.given import Questions, Task
from llm_streamline.scoring.of_run import DENSE, Standing
from llm_streamline.scoring.perplexity import next_token_loss
from llm_streamline.workspace import RunFolder, Workspace

INT4, INT4_TYPE = "int4", "q4_k_m"
FOLDERS = {kind: f"model-{kind}" for kind in (INT8, W4A16)}
PLACES = {**FOLDERS, INT4: f"model-{INT4_TYPE}.gguf"}


def check_then(work: Workspace) -> None:
    """Errors: UserError, before anything is measured, where a lighter model cannot be written or run."""
    then = work.runtime.then
    if then and work.recipe.network:
        raise UserError(f"--then {then} is for models that load without code of their own; use a stock --replace.")
    if then in FOLDERS:
        check_library(then)
        if work.offloads:
            raise UserError(
                f"--then {then} holds the model in memory whole, and {work.recipe.model} does not fit in "
                f"{work.room / 1e9:.1f} GB; use --then int4, or a machine with more."
            )
    if then == W4A16:
        group_size(layers_of(work.skeleton))
    if then == INT4:
        require("llama.cpp")
        gguf.find_converter()
        if why := why_not_gguf(work.config):
            raise UserError(f"--then int4 writes GGUF, which {work.recipe.model} cannot be, as {why}; leave it out.")
        if gguf_period(work.config, work.recipe.model) > 1 and not work.recipe.for_:
            raise UserError("--then int4 writes GGUF, where llama.cpp counts this model's layers; add --for gguf.")


def check_asked(tasks: Sequence[Task], lighter: Sequence[str]) -> None:
    """Errors: UserError where a GGUF is to be asked what is not chosen by log-likelihood here."""
    other = next((task.name for task in tasks if not isinstance(task, Questions)), None)
    if other and INT4 in lighter:
        raise UserError(
            f"--tasks {other} is not for the {INT4} model, which is asked only questions with choices in .jsonl files; "
            f"leave it out, or begin another run without --then {INT4}."
        )


def kinds(then: str | None, folder: RunFolder, afresh: bool = False) -> list[str]:
    """Of lighter models the one that is asked for, and those that an earlier run has made."""
    made = [kind for kind in PLACES if not afresh and folder.has(f"{kind}.json") and folder.has(PLACES[kind])]
    return [kind for kind in PLACES if kind == then or kind in made]


def make_lighter(work: Workspace, folder: RunFolder, scores: Scores) -> list[Lighter]:
    """The model that `--then` asks for, in the run folder, with its validation loss, and those asked for before.

    Errors: UserError for a run of another text; VerificationError, with nothing written, for a model that does not
    compute what it should.
    """

    def make(kind: str) -> Lighter:
        folder.check_inputs(work.inputs, finished=True)
        return _int4(work, folder) if kind == INT4 else _folder(kind, work, folder, scores)

    return [folder.stage(f"{kind}.json", Lighter, partial(make, kind)) for kind in kinds(work.runtime.then, folder)]


def _folder(kind: str, work: Workspace, folder: RunFolder, scores: Scores) -> Lighter:
    target = folder.path / PLACES[kind]
    if not target.exists():
        say(f"writing the {kind} model and verifying it in a fresh process", work.runtime.quiet)
        quantise = by_torchao if kind == INT8 else by_llm_compressor(work.parts.calibration, work.runtime.quiet)
        write_lighter(kind, quantise, folder.path / "model", target, work.ram - memory.held(), scores)
    manifest = Manifest.read(target / MANIFEST)
    assert manifest.verification is not None
    claim = f"verified: logits within {manifest.verification.logits_error:.1e}, cached = uncached generation"
    loss = _loss(work, kind, work.load_saved(target, False))
    return Lighter(kind=kind, path=PLACES[kind], bytes=weight_bytes(target), loss=loss, claim=claim)


def _int4(work: Workspace, folder: RunFolder) -> Lighter:
    target = folder.path / PLACES[INT4]
    remove(target)  # of a run that was killed before it had said what it is
    found = export(str(folder.path / "model"), "gguf", target, INT4_TYPE)
    (claim, *_) = compared_lines(found.checks[-1])
    loss = _loss(work, INT4, GgufLanguageModel(target, _context(work)))
    return Lighter(kind=INT4, path=PLACES[INT4], bytes=found.bytes, loss=loss, claim=claim)


def _loss(work: Workspace, kind: str, model: Any) -> Loss:
    """On the validation text."""
    blocks, batch = work.parts.validation, work.batch(memory.FORWARD_TOKENS // 2)
    return next_token_loss(model, blocks, batch, f"the {kind} model", work.runtime.quiet)


def standing(work: Workspace, lighter: Lighter, saved: Standing, folder: Path) -> Standing:
    """The lighter model, to be asked what the others are."""
    path = folder / lighter.path
    load: Callable[[], Any] = partial(work.load_saved, path, False)
    if lighter.kind == INT4:
        load = partial(GgufLanguageModel, path, _context(work))
    fingerprint = sha256(saved.fingerprint.encode(), lighter.kind.encode(), str(lighter.bytes).encode())
    context = min(saved.context, _context(work)) if lighter.kind == INT4 else saved.context
    common = (work.compute, context, work.tokenizer)
    return Standing(str(path), fingerprint, *common, load, only_asked=lighter.kind == INT4)


def _context(work: Workspace) -> int:
    """Tokens that llama.cpp is to hold at once: a block of the run's text, however long."""
    return max(CONTEXT, work.parts.validation.shape[1])


def links(
    work: Workspace, scores: Scores, lighter: Sequence[Lighter], found: Evaluation | None, folder: Path
) -> list[Link]:
    """The dense, the shortened and the lighter models: size, loss, and what they keep of the dense one's answers."""
    models = {one.label: one for one in found.models} if found else {}
    saved = saved_of(found) if found else None
    parts = (
        ("dense", work.recipe.model, weight_bytes(Path(work.source.path)), scores.dense, models.get(DENSE)),
        ("shortened", "model", weight_bytes(folder / "model"), scores.saved, saved),
        *((f"and {one.kind}", one.path, one.bytes, one.loss, models.get(one.kind)) for one in lighter),
    )
    return [
        Link(
            name=name,
            path=path,
            bytes=size,
            nats=loss.nats,
            accuracy=mean_accuracy(score)[0] if score else None,
            stability=1.0 if score and name == DENSE else mean_stability(score)[0] if score else None,
        )
        for name, path, size, loss, score in parts
    ]
