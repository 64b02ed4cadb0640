"""The demo: the bundled model shortened by a quarter of its layers, and its questions asked before and after."""

from __future__ import annotations

from pathlib import Path

from llm_streamline import checkpoint
from llm_streamline.evaluation import Result
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.run import compress

QUESTIONS = Path(__file__).parent / "demo" / "questions.jsonl"


def demo(runtime: Runtime) -> tuple[Result, dict[str, float]]:
    """The run's result, and the share of questions that the dense, the merely cut and the saved model get right."""
    recipe = Recipe(model=checkpoint.BUNDLED, data=(checkpoint.BUNDLED,), remove="25%", tokens="100k")
    result = compress(recipe, runtime.model_copy(update={"tasks": (str(QUESTIONS),)}))
    assert result.evaluation
    names = {"dense": "dense", "cut": "deleted", "saved": "replaced"}
    return result, {names[one.label]: one.task(QUESTIONS.stem).value for one in result.evaluation.models}
