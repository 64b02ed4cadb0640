"""A model folder as llama.cpp's converter reads it, which knows some configurations by names of earlier years."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_streamline.architectures import GGUF_SPELLINGS


def respelled(folder: Path, scratch: Path) -> Path:
    """The folder itself, or one in `scratch` of links to its files, with the names that are missing added."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = GGUF_SPELLINGS.get(config.get("model_type"), {})
    added = {name: value for name, path in named.items() if (value := _at(config, path)) is not None}
    added = {name: value for name, value in added.items() if name not in config}
    if not added:
        return folder
    view = scratch / folder.name
    view.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name != "config.json":
            (view / file.name).symlink_to(file.resolve())
    (view / "config.json").write_text(json.dumps(config | added, indent=2), encoding="utf-8")
    return view


def _at(config: dict[str, Any], path: str) -> Any:
    """What lies at a dotted path; None where nothing does."""
    found: Any = config
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found
