"""The demo: the bundled model shortened by a quarter of its layers, and its questions asked before and after."""

from __future__ import annotations

from pathlib import Path

from llm_streamline import checkpoint
from llm_streamline.evaluate.questions import accuracy, read_questions
from llm_streamline.forward import substituted
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import Result
from llm_streamline.run import compress
from llm_streamline.workspace import Workspace

LEARNING_RATE = 4e-3  # the bundled model is narrow and its weights are large
QUESTIONS = Path(__file__).parent / "demo" / "questions.jsonl"


def demo(runtime: Runtime) -> tuple[Result, dict[str, float]]:
    """The run's result, and the share of questions that the dense, the merely cut and the saved model get right."""
    recipe = Recipe(model=checkpoint.BUNDLED, data=(checkpoint.BUNDLED,), remove="25%", lr=LEARNING_RATE)
    result = compress(recipe, runtime)
    questions, quiet = read_questions(QUESTIONS), runtime.quiet
    work = Workspace(recipe, runtime)
    dense = accuracy(work.model, work.tokenizer, questions, "the dense model", quiet)
    with substituted(work.model, result.plan.plain_window):
        deleted = accuracy(work.model, work.tokenizer, questions, "the merely cut model", quiet)
    saved = work.load(checkpoint.Source(result.model))
    replaced = accuracy(saved, work.tokenizer, questions, "the saved model", quiet)
    return result, {"dense": dense, "deleted": deleted, "replaced": replaced}
