"""A model folder as an ONNX graph with a cache of keys and values, and that graph run by onnxruntime.

The graph takes `input_ids` (B, T), `attention_mask` (B, P + T) and, for each layer, the keys and values of the P tokens
before; it returns `logits` (B, T, V) and the keys and values of all P + T. Inputs and outputs are called what optimum
calls them. P may be 0, and positions are counted from the mask, so that prompts padded on the left are right.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_streamline.errors import UserError, reason
from llm_streamline.files import atomic, is_storage_failure

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

GRAPH = "model.onnx"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_BESIDE = (  # what a tokenizer may be made of, and the settings; never weights, nor what is said of the folder
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)
# sizes of the example that is traced: all different, and none 1, lest they be taken for one another or as fixed
_BATCH, _TOKENS, _PAST = 3, 7, 5
_SINGLY = 4  # so many tokens go through the cache one by one when a graph is proven
_TOLERANCE = 1e-4  # largest difference of a logit, relative to the largest logit, in float32


def export_onnx(folder: Path, target: Path) -> None:
    """Write `target`/model.onnx, in float32, with its weights and the model's settings and tokenizer beside it.

    The graph is run once, through its cache, and must say what the model says; what does not is not published.
    Errors: UserError for a folder or a model that cannot be exported, and for a target that is not empty.
    """
    _require(*_NEEDED)
    import torch

    from llm_streamline.checkpoint import Source, load_model

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder of a HuggingFace causal LM.")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} is there already and not an empty folder; give a folder that is new or empty.")
    model = load_model(Source(str(folder)), torch.float32)
    _refuse_moving_positions(model)
    past = _example_past(model)
    with atomic(target) as written:
        written.mkdir()
        with _refusing(model):
            expected = _expected(model)
            _write_graph(model, past, written / GRAPH)
            _prove(OnnxModel(written), *expected)
        for pattern in _BESIDE:
            for path in filter(Path.is_file, folder.glob(pattern)):
                shutil.copyfile(path, written / path.name)


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}; install them with: pip install 'llm-streamline[onnx]'.")


@contextmanager
def _refusing(model: PreTrainedModel) -> Iterator[None]:
    """Errors: UserError for whatever torch cannot trace or say in ONNX, or onnxruntime cannot run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the tracer and the translator concern their own code
            yield
    except Exception as error:  # both fail in ways of their own, and in those of the model's code
        if is_storage_failure(error):
            raise
        raise UserError(
            f"model type {model.config.model_type!r} cannot be exported to ONNX by the installed torch and "
            f"transformers ({reason(error.__cause__ or error)}); give another model or take another format."
        ) from error


def _expected(model: PreTrainedModel) -> tuple[list[int], np.ndarray]:
    """A prompt, past any sliding window where one so long can be run, and the model's own logits (T, V) on it."""
    import torch

    from llm_streamline.families import sliding_window
    from llm_streamline.oracle import prompt_length

    length, _ = prompt_length(model.config, sliding_window(model.config))
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ids[0].tolist(), model(input_ids=ids, use_cache=False).logits[0].numpy()


def _prove(runner: OnnxModel, ids: list[int], expected: np.ndarray) -> None:
    """Errors: ArithmeticError where the graph says something else, at once or with the last tokens one by one."""
    pieces = [ids[:-_SINGLY], *([one] for one in ids[-_SINGLY:])]
    for found in (runner.logits(ids), runner.in_pieces(pieces)):
        error = np.abs(found - expected).max() / np.abs(expected).max()
        if not error <= _TOLERANCE:  # also true of nan
            raise ArithmeticError(f"the graph's logits differ by {error:.2g} relative")


def _refuse_moving_positions(model: PreTrainedModel) -> None:
    """Errors: UserError where the length of the text changes a position: keys in the cache would be of another time."""
    ropes = json.dumps(getattr(model.config, "rope_parameters", None), default=str)
    for kind in ("longrope", "dynamic"):
        if f'"{kind}"' in ropes:
            raise UserError(
                f"the model's rotary positions are of type {kind!r}, which computes the cached keys anew once the text "
                "grows long, and ONNX cannot; give a model whose positions stay."
            )


def _example_past(model: PreTrainedModel) -> list[torch.Tensor]:
    """Keys and values of a few tokens, layer by layer. Errors: UserError where that is not all a model remembers."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()  # without the configuration all its layers keep every token: the masks make the windows
    ids = torch.ones(_BATCH, _PAST, dtype=torch.long)
    try:
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        kept = _tensors(cache)
        plain = len(kept) == 2 * model.config.num_hidden_layers
        plain = plain and all(one.shape[:1] + one.shape[2:3] == (_BATCH, _PAST) for one in kept)
    except Exception:  # a model with another kind of memory meets a cache it cannot use
        plain = False
    if not plain:
        raise UserError(
            f"model type {model.config.model_type!r} does not remember the past as keys and values of every token in "
            "each layer, which is what ONNX can be given; give a model that does."
        )
    return kept


def _tensors(cache: Any) -> list[torch.Tensor]:
    """The keys of the first layer, its values, the keys of the second, and so on."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _names(prefix: str, tensors: Sequence[Any]) -> list[str]:
    return [f"{prefix}.{index}.{kind}" for index in range(len(tensors) // 2) for kind in ("key", "value")]


def _write_graph(model: PreTrainedModel, past: list[torch.Tensor], file: Path) -> None:
    """One step of the model by torch's exporter, every length free."""
    import torch

    # the graph must serve every length: eager attention and all chosen experts at once have no branch on them
    model.set_attn_implementation("eager")
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("batched_mm")
    batch, sequence, before = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
    sizes = {0: batch, 1: sequence}, {0: batch, 1: torch.export.Dim.DYNAMIC}, [{0: batch, 2: before}] * len(past)
    names = (
        {0: "batch", 1: "sequence"},
        {0: "batch", 1: "past + sequence"},
        [{0: "batch", 2: "past"}] * len(past),
    )
    ids = torch.ones(_BATCH, _TOKENS, dtype=torch.long)
    example = ids, torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.long), past
    with torch.no_grad():
        # what the trace would have to assume of a size is an error here; torch.onnx.export alone would assume it
        exported = torch.export.export(_step(model), example, dynamic_shapes=sizes)
    torch.onnx.export(
        exported,
        f=file,
        external_data=True,
        dynamo=True,
        verbose=False,
        dynamic_shapes=names,
        input_names=["input_ids", "attention_mask", *_names("past_key_values", past)],
        output_names=["logits", *_names("present", past)],
    )


def _step(model: PreTrainedModel) -> torch.nn.Module:
    """The model as a function of tensors alone, as the exporter wants it."""
    import torch
    from transformers import DynamicCache

    counts = "position_ids" in inspect.signature(model.forward).parameters  # others count from the mask by themselves

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, past: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            before = past[0].shape[2]
            torch._check(mask.shape[1] == before + ids.shape[1])
            cache = DynamicCache(zip(past[::2], past[1::2], strict=True))
            positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, before:]} if counts else {}
            out = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **positions)
            return out.logits, *_tensors(cache)

    return Step().eval()


class OnnxModel:
    """An exported model, run by onnxruntime on the CPU."""

    def __init__(self, path: Path) -> None:
        """`path` is the folder or its model.onnx. Errors: UserError for a file that is none or of another make."""
        _require("onnxruntime")
        import onnxruntime

        file = path / GRAPH if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{file} does not exist; give a folder with {GRAPH}, made by an export to ONNX.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # its warnings speak of graph surgery that no user can act on
        try:
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base that it names
            raise UserError(f"{file} does not load ({reason(error)}); export the model again.") from error
        inputs = {one.name: one.shape for one in self._session.get_inputs()}
        self._past = {name: shape for name, shape in inputs.items() if name.startswith("past_key_values.")}
        if set(inputs) != {"input_ids", "attention_mask", *self._past} or not self._past:
            raise UserError(f"{file} takes other inputs than an export of llm-streamline; export the model again.")

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """What the model expects after each of the T tokens: (T, V), float32."""
        return self.in_pieces([ids])

    def in_pieces(self, pieces: Iterable[Sequence[int]]) -> np.ndarray:
        """The same for tokens that enter piece by piece, those before through the cache."""
        found, past = [], self._nothing()
        for piece in pieces:
            logits, past = self._step(piece, past)
            found.append(logits)
        return np.concatenate(found)

    def greedy(self, ids: Sequence[int], new: int) -> list[int]:
        """So many tokens after the prompt, each the likeliest; after the prompt one token at a time enters."""
        given, past, made = list(ids), self._nothing(), []
        for _ in range(new):
            logits, past = self._step(given, past)
            given = [int(logits[-1].argmax())]
            made += given
        return made

    def close(self) -> None:
        del self._session

    def _nothing(self) -> dict[str, np.ndarray]:
        """The cache before the first token."""
        return {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in self._past.items()}

    def _step(self, given: Sequence[int], past: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits (T, V) after the given tokens, which follow those in the cache, and the cache with them in it."""
        total = next(iter(past.values())).shape[2] + len(given)
        tokens = {"input_ids": np.array([given], np.int64), "attention_mask": np.ones((1, total), np.int64)}
        wanted = ["logits", *(name.replace("past_key_values", "present") for name in past)]
        logits, *present = self._session.run(wanted, tokens | past)
        return logits[0], dict(zip(past, present, strict=True))
