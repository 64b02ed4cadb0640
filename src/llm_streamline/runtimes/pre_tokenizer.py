"""How a tokenizer splits a text before it merges tokens, by llama.cpp's name for it.

llama.cpp's converter knows a tokenizer by a hash of what it makes of one text, so that it refuses every tokenizer that
was trained anew, whatever it is made of. What it is made of lies in tokenizer.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_streamline.architectures import PRE_TOKENIZERS


def pre_tokenizer(folder: Path) -> str | None:
    """llama.cpp's name for the splitting in a model folder's tokenizer.json; None for one that it has no name for."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or not _plain(tokenizer.get("normalizer")):
        return None
    return PRE_TOKENIZERS.get(tuple(_steps(tokenizer.get("pre_tokenizer") or {})))


def _plain(normalizer: dict[str, Any] | None) -> bool:
    """Whether ordinary text, which is composed (NFC), stays as it is."""
    return normalizer is None or normalizer == {"type": "NFC"}


def _steps(pre: dict[str, Any]) -> list[str]:
    """'words' for byte-level words, 'digits' for single ones, a pattern for itself; anything else by its type."""
    kind = pre.get("type")
    if kind == "Sequence":
        return [step for one in pre["pretokenizers"] for step in _steps(one)]
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        return ["words"] if pre.get("use_regex", True) else []
    if kind == "Digits" and pre.get("individual_digits"):
        return ["digits"]
    if kind == "Split" and pre.get("behavior") == "Isolated" and "Regex" in pre["pattern"]:
        return [pre["pattern"]["Regex"]]
    return [f"another: {kind}"]
