"""The training curve, also told to a tracker of accelerate's where one was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_streamline.errors import UserError
from llm_streamline.history import Track
from llm_streamline.recipe import Recipe
from llm_streamline.workspace import Workspace


def check_tracker(name: str | None) -> None:
    if name is None:
        return
    from accelerate.tracking import get_available_trackers

    known = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if name not in known:
        raise UserError(
            f"--tracker {name} is not installed; there is {', '.join(known) or 'none'}: "
            "install it, for example with 'llm-streamline[track]', or leave it out."
        )


@contextmanager
def tracking(work: Workspace) -> Iterator[Track]:
    """Log the curve to an accelerate tracker where one was asked for."""
    name = work.runtime.tracker
    if name is None or not work.world.first:
        yield lambda values, step: None
        return
    from accelerate import Accelerator

    folder = work.runtime.output or Path()
    accelerator = Accelerator(log_with=name, project_dir=str(folder), cpu=work.device == "cpu")
    accelerator.init_trackers("tracking", config=flat(work.recipe))
    yield lambda values, step: accelerator.log(values, step=step)
    accelerator.end_training()


def flat(recipe: Recipe) -> dict[str, Any]:
    """The recipe as trackers take it: numbers and words only."""
    values = recipe.model_dump(exclude_none=True).items()
    return {key: value if isinstance(value, (int, float, str)) else " ".join(map(str, value)) for key, value in values}
