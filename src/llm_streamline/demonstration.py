"""The demo: the bundled model shortened by a quarter of its layers, and its questions asked before and after."""

from __future__ import annotations

from pathlib import Path

from llm_streamline import checkpoint
from llm_streamline.forward import substituted
from llm_streamline.page import write_report
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import Accuracy, Result
from llm_streamline.run import shorten
from llm_streamline.scoring.questions import accuracy, read_questions
from llm_streamline.workspace import RunFolder, Workspace

LEARNING_RATE = 4e-3  # the bundled model is narrow and its weights are large
QUESTIONS = Path(__file__).parent / "demo" / "questions.jsonl"


def demo(runtime: Runtime) -> tuple[Result, Accuracy]:
    """The run's result, and the share of questions that the dense, the merely cut and the saved model get right."""
    recipe = Recipe(model=checkpoint.BUNDLED, data=(checkpoint.BUNDLED,), remove="25%", lr=LEARNING_RATE)
    result = shorten(recipe, runtime)
    folder = RunFolder.open(runtime.output, recipe)
    asked = folder.has("accuracy.json")
    answers = folder.stage("accuracy.json", Accuracy, lambda: ask(Workspace(recipe, runtime), result))
    if not asked or not Path(result.report).exists():
        write_report(folder.path)
    return result, answers


def ask(work: Workspace, result: Result) -> Accuracy:
    """The questions to each of the three models."""
    questions, quiet = read_questions(QUESTIONS), work.runtime.quiet
    dense = accuracy(work.model, work.tokenizer, questions, "the dense model", quiet)
    with substituted(work.model, result.plan.plain_window):
        deleted = accuracy(work.model, work.tokenizer, questions, "the merely cut model", quiet)
    saved = work.load(checkpoint.Source(result.model))
    replaced = accuracy(saved, work.tokenizer, questions, "the saved model", quiet)
    return Accuracy(questions=len(questions), dense=dense, deleted=deleted, replaced=replaced)
