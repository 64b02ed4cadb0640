"""What recipes, runtimes and requests share: what is wrong with one is told in a sentence that names its flag."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from llm_streamline.errors import UserError


def as_text(value: Any) -> Any:
    """A whole number as its digits, so that `remove=8` means what `--remove 8` does."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def as_several(value: Any) -> Any:
    """One name, or path, as a tuple of one; paths as names. Errors: ValueError for an empty name."""
    several = (value,) if isinstance(value, (str, Path)) else value
    if isinstance(several, (tuple, list)):
        several = tuple(str(one) if isinstance(one, Path) else one for one in several)
        if "" in several:
            raise ValueError("a name is empty")
    return several


class Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(_sentence(error, type(self))) from error


def _sentence(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first of pydantic's complaints, in one sentence that names the field as users know it."""
    problem = error.errors()[0]
    key = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, schema.model_fields, n=1, cutoff=0.0)[0]
        return f"key {key!r} is not known; the nearest is {nearest!r}: correct or remove it."
    if problem["type"] == "missing":
        return f"no {key.upper()} was given; give a model folder, a Hub name, or 'bundled'."
    complaint = problem["msg"].removeprefix("Value error, ")
    if not key:
        return f"{complaint}."
    field = next(field for name, field in schema.model_fields.items() if key in (name, field.alias))
    help_text = (field.description or "").split(" [default")[0]
    flag = f"--{key.replace('_', '-')}"
    return f"{flag} was given {problem['input']!r} ({complaint}); it takes: {help_text}"
