"""llama.cpp's own converter, with what it needs to be told of a model: a program for a process of its own.

`python -m llm_streamline.runtimes.convert CONVERTER NAME SETTINGS ARGUMENTS...` runs the script CONVERTER with the
arguments. NAME, if not empty, is how the tokenizer splits a text, where the converter knows no better; SETTINGS, in
JSON, are added to the model's.
"""

from __future__ import annotations

import importlib
import json
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


def add_settings(model_base: Any, settings: dict[str, Any]) -> None:
    """Let the converter find settings that a model's configuration has under other names."""
    known = model_base.load_hparams
    model_base.load_hparams = staticmethod(lambda *given, **named: settings | known(*given, **named))


def main(converter: Path, name: str, settings: dict[str, Any], arguments: list[str]) -> None:
    if str(converter.parent) not in sys.path:
        sys.path.insert(0, str(converter.parent))
    script = importlib.import_module(converter.stem)
    owner = script if hasattr(script, "TextModel") else importlib.import_module("conversion")
    if name:
        name_pre_tokenizer(owner.TextModel, name)
    add_settings(script.ModelBase, settings)
    sys.argv = [str(converter), *arguments]
    script.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4:])
