"""Settings of a model under the names by which llama.cpp's converter knew them in earlier years."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_streamline.architectures import GGUF_SPELLINGS


def earlier_names(folder: Path) -> dict[str, Any]:
    """What the converter looks for and config.json calls otherwise; empty for most models."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = GGUF_SPELLINGS.get(config.get("model_type"), {})
    return {name: _at(config, path) or default for name, (path, default) in named.items()}


def _at(config: dict[str, Any], path: str) -> Any:
    """What lies at a dotted path; None where nothing does."""
    found: Any = config
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found
