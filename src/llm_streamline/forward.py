"""How every stage runs part of a model: inputs of a layer are captured from the model's own forward and replayed.

No decoder layer is ever called with guessed arguments: masks, position embeddings and whatever a family passes
besides are taken as its own forward passed them. Shapes: B sequences, T tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from llm_streamline.families import layers_of, mlp_output
from llm_streamline.records import LayerPlan, Window, runs_of


class _Reached(Exception):
    """Raised by a hook at the last boundary that is wanted; nothing above it is computed."""


@dataclass(frozen=True)
class LayerCall:
    """What the model's own forward passed to one layer besides its hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run `layer` on `hidden` (B, T, D) with the captured inputs, without a cache."""
        return hidden_of(layer(hidden, *self.args, **self.kwargs))


@dataclass(frozen=True)
class Passage:
    """A window's two boundaries on one batch: `entering` and `leaving` are (B, T, D), one call per layer.

    `ids` are the token ids (B, T), on the model's device.
    """

    entering: Tensor
    leaving: Tensor
    calls: list[LayerCall]
    ids: Tensor


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a decoder layer returned: a tensor, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def entering_state(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def captured_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LayerCall:
    """Everything but the hidden state and the cache, which families pass under several names, or by place."""
    rest = {key: _without_cache(value) for key, value in kwargs.items() if key != "hidden_states"}
    return LayerCall(tuple(_without_cache(value) for value in args[1:]), rest)


def _without_cache(value: Any) -> Any:
    return None if isinstance(value, Cache) else value


@contextmanager
def at_boundary(
    model: PreTrainedModel, boundary: int, action: Callable[[Tensor, LayerCall | None], None]
) -> Iterator[None]:
    """Call `action(state, call)` whenever a forward crosses `boundary` (0..L; L is before the final norm).

    `call` is what the layer above the boundary was given; None at boundary L, which has no layer above it.
    """
    layers = layers_of(model)

    def above(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        action(entering_state(args, kwargs), captured_call(args, kwargs))

    def below(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        action(hidden_of(output), None)

    if boundary < len(layers):
        handle = layers[boundary].register_forward_pre_hook(above, with_kwargs=True)
    else:
        handle = layers[-1].register_forward_hook(below)
    try:
        yield
    finally:
        handle.remove()


def stop_forward(_: Tensor, __: LayerCall | None) -> None:
    raise _Reached


@torch.no_grad()
def run_until_stopped(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """The model's own forward, up to the boundary where `stop_forward` is attached."""
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    except _Reached:
        return
    raise RuntimeError("the forward ended without crossing the boundary it should have stopped at")


def run_window(model: PreTrainedModel, window: Window, input_ids: Tensor) -> Passage:
    """Run the frozen layers [0, window.stop) once and return what crosses the window's boundaries."""
    ends: list[Tensor] = []
    calls: list[LayerCall | None] = []
    with ExitStack() as hooks:
        for layer in window.layers():
            hooks.enter_context(at_boundary(model, layer, lambda _, call: calls.append(call)))
        for boundary in (window.start, window.stop):
            hooks.enter_context(at_boundary(model, boundary, lambda state, _: ends.append(state)))
        hooks.enter_context(at_boundary(model, window.stop, stop_forward))
        run_until_stopped(model, input_ids)
    entering, leaving = ends
    return Passage(entering, leaving, [call for call in calls if call is not None], input_ids)


@torch.no_grad()
def returned_values(model: PreTrainedModel) -> int:
    """How many values the model's decoder layers return in a tuple; 0 where they return the hidden state itself."""
    outputs: list[Any] = []
    handle = layers_of(model)[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with at_boundary(model, 1, stop_forward):
            run_until_stopped(model, torch.zeros(1, 1, dtype=torch.long, device=model.device))
    finally:
        handle.remove()
    return len(outputs[0]) if isinstance(outputs[0], tuple) else 0


@contextmanager
def substituted(model: PreTrainedModel, window: Window, replacement: Sequence[nn.Module] = ()) -> Iterator[None]:
    """The source model with `window` skipped, or its first layers standing aside for `replacement`, through hooks.

    The window's own layers still run, with their own caches; what they return is discarded. This shares nothing
    with the assembled model but the source, so it is the oracle that an assembled model is checked against.
    """

    def override(module: nn.Module | None) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            hidden = entering_state(args, kwargs)
            if module is not None:
                hidden = captured_call(args, kwargs).replay(module, hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    stand_ins = [*replacement, *[None] * (len(window) - len(replacement))]
    handles = [
        layers_of(model)[layer].register_forward_hook(override(module), with_kwargs=True)
        for layer, module in zip(window.layers(), stand_ins, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def shortened(model: PreTrainedModel, plan: LayerPlan, replacement: Sequence[nn.Module] = ()) -> Iterator[None]:
    """As `substituted`, with all that a plan takes: the layers it rewrites, and single ones that go besides.

    Of `replacement`, all windows' layers from the bottom up, each window takes its own.
    """
    stand_ins = iter(replacement)
    with ExitStack() as hooks:
        for window, count in plan.rewritten():
            hooks.enter_context(substituted(model, window, list(islice(stand_ins, count))))
        for window in runs_of(plan.dropped):
            hooks.enter_context(substituted(model, window))
        yield


@contextmanager
def mlp_outputs(model: PreTrainedModel, layer: int) -> Iterator[list[Tensor]]:
    """What the MLP of `layer` adds to the stream, appended by every forward that passes it.

    (B, T, D), or (B * T, D) in families whose layers flatten their tokens for the MLP.
    Errors: UserError for a family in which that is not the output of any module.
    """
    outputs: list[Tensor] = []
    name, scale = mlp_output(model.config)

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        outputs.append(hidden_of(output) * scale)  # a copy: some families add to what they were given, in place

    handle = layers_of(model)[layer].get_submodule(name).register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def mlp_mapped(model: PreTrainedModel, layer: int, mapping: Tensor) -> Iterator[None]:
    """The model with what the MLP of `layer` adds mapped by (D, D): row vectors m become m @ mapping, in float32.

    Nothing is folded: this is what a folded map is checked against. Errors: as `mlp_outputs`.
    """

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        hidden = hidden_of(output)
        mapped = (hidden.float() @ mapping.float().to(hidden.device)).to(hidden.dtype)
        return (mapped, *output[1:]) if isinstance(output, tuple) else mapped

    handle = layers_of(model)[layer].get_submodule(mlp_output(model.config)[0]).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
