"""The code that a model folder carries where its replacement is no layer that stock transformers knows.

Two files: a copy of `networks.py`, and a short one that puts its layer into the family's stock model. The folder's
model type is one that transformers does not know, so that it refuses the folder unless its code is trusted, instead
of loading it as the stock model with a layer of random weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llm_streamline import networks
from llm_streamline.families import layers_prefix
from llm_streamline.files import write_text

PREFIX = "streamlined_"
_MODELING = '''"""{model} with one decoder layer replaced by a network of `streamlined_networks.py`.

Written by llm-streamline. Load it with AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).
"""

from {config_module} import {config}
from {model_module} import {model}

from .streamlined_networks import install


class StreamlinedConfig({config}):
    model_type = "{model_type}"


class StreamlinedForCausalLM({model}):
    config_class = StreamlinedConfig

    def __init__(self, config):
        super().__init__(config)
        install(self.get_submodule("{layers}"), config.streamlined)
'''


def write_custom_code(model: PreTrainedModel, spec: dict[str, Any], folder: Path) -> None:
    """Add the code to a saved model's folder and name it in its config.json."""
    config = type(model.config)
    names = {
        "model": type(model).__name__,
        "model_module": type(model).__module__,
        "config": config.__name__,
        "config_module": config.__module__,
        "model_type": PREFIX + model.config.model_type,
        "layers": layers_prefix(model.config).removesuffix("."),
    }
    write_text(folder / "modeling_streamlined.py", _MODELING.format(**names))
    write_text(folder / "streamlined_networks.py", Path(networks.__file__).read_text(encoding="utf-8"))
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {
        "model_type": names["model_type"],
        "architectures": ["StreamlinedForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_streamlined.StreamlinedConfig",
            "AutoModelForCausalLM": "modeling_streamlined.StreamlinedForCausalLM",
        },
        "streamlined": spec,
    }
    write_text(path, json.dumps(values, indent=2) + "\n")


def has_own_code(folder: Path) -> bool:
    """Whether a folder is one of ours with a network that stock transformers does not know."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")).startswith(
            PREFIX
        )
    except (OSError, ValueError, AttributeError):
        return False
