"""Make a HuggingFace causal language model shallower, keep what it knew, and prove it.

The public names are loaded on first use, so that `import llm_streamline` costs nothing: no torch, no seed, no log.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "compress": "run",
    "verify": "oracle",
    "evaluate": "run",
    "Recipe": "recipe",
    "Runtime": "recipe",
    "Request": "evaluation",
    "LayerPlan": "records",
    "UserError": "errors",
}
__all__ = ["LayerPlan", "Recipe", "Request", "Runtime", "UserError", "__version__", "compress", "evaluate", "verify"]

if TYPE_CHECKING:
    from llm_streamline.errors import UserError
    from llm_streamline.evaluation import Request
    from llm_streamline.oracle import verify
    from llm_streamline.recipe import Recipe, Runtime
    from llm_streamline.records import LayerPlan
    from llm_streamline.run import compress, evaluate


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
