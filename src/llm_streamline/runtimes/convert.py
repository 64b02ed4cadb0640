"""llama.cpp's own converter, run with a name for the tokenizer's splitting: a program for a process of its own.

`python -m llm_streamline.runtimes.convert CONVERTER NAME ARGUMENTS...` runs the script CONVERTER with the arguments.
NAME is used where the converter knows no better; an empty one changes nothing.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def name_pre_tokenizer(text_model: Any, name: str) -> None:
    """Let the converter's class of text models fall back to a name where it would refuse a tokenizer."""
    known = text_model.get_vocab_base_pre

    def found(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return name

    text_model.get_vocab_base_pre = found


def main(converter: Path, name: str, arguments: list[str]) -> None:
    sys.path.insert(0, str(converter.parent))
    script = importlib.import_module(converter.stem)
    if name:
        owner = script if hasattr(script, "TextModel") else importlib.import_module("conversion")
        name_pre_tokenizer(owner.TextModel, name)
    sys.argv = [str(converter), *arguments]
    script.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
