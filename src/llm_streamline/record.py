"""What every record of the package is: frozen, checked, JSON in and out."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from llm_streamline.errors import UserError
from llm_streamline.files import write_text

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    def write(self, path: Path) -> None:
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls: type[R], path: Path) -> R:
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is damaged; delete it and repeat the command to make it anew.") from error
