"""The model's own layers with windows replaced, run as one: what trains is trained through those that do not.

A student stands between two boundaries, as a replacement of all that lies there, and shares every frozen weight with
the dense model, on whose states or logits, or the text beside them, it is trained. Between the ends of several windows
it trains what stands in for each; between 0 and L, once that is there, low-rank adapters on the layers that stay, or
some of them whole, and the norm and the head above them. What comes out of this are changed weights under the source's
names, adapters merged: nothing needs peft to load.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_streamline.above import weights_above
from llm_streamline.errors import UserError
from llm_streamline.families import layers_of, layers_prefix
from llm_streamline.forward import LayerCall
from llm_streamline.heal import Heal, parse_heal
from llm_streamline.optimizers import Pace
from llm_streamline.records import LayerPlan
from llm_streamline.replacement import ReplacementLayers

BASE, ADAPTER = ".base_layer", "default"  # peft's names for the weights under an adapter, and for our one adapter
_DOT = "/"  # in the names of weights above the layers, as a module's own weights have no dots in theirs


class Student(ReplacementLayers):
    """Layers of the shortened model in a row, each run with what the dense model's layer in its place was given.

    `places` are those layers, counted from the row's lower boundary; `above` are weights that follow the last of them,
    which train from copies. `state_dict` holds what trains and nothing else.
    """

    def __init__(
        self, layers: Sequence[nn.Module], places: Sequence[int], above: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(layers)
        self._places = list(places)
        self.quick: dict[int, float] = {}  # of layers in the row, how many times the learning rate they train with
        self.pace_above = 1.0  # how many times the learning rate the weights above them train with
        for name, value in (above or {}).items():
            self.register_parameter(name.replace(".", _DOT), nn.Parameter(value.detach().float().clone()))

    def run(self, hidden: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        """A state (B, T, D) at the lower boundary -> at the upper; `calls` are of the dense model's layers between."""
        for layer, place in zip(self, self._places, strict=True):
            hidden = calls[place].replay(layer, hidden)
        return hidden

    def above(self) -> dict[str, nn.Parameter]:
        return {name.replace(_DOT, "."): value for name, value in self.named_parameters(recurse=False)}

    def paces(self) -> list[Pace]:
        found: dict[float, list[nn.Parameter]] = {}
        for new, layer in enumerate(self):
            own = [value for value in layer.parameters() if value.requires_grad]
            if own:
                found.setdefault(self.quick.get(new, 1.0), []).extend(own)
        above = list(self.above().values())
        paces = [Pace(rate, weights) for rate, weights in found.items()]
        return [*paces, Pace(self.pace_above, above, turned=False)] if above else paces

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        own = self.state_dict()
        if own.keys() != state_dict.keys():
            raise ValueError(f"weights of another student: {min(own.keys() ^ state_dict.keys())}")
        for name, value in state_dict.items():
            own[name].data.copy_(value)

    @torch.no_grad()
    def changed(self) -> Iterator[tuple[int, str, Tensor]]:
        """Per changed weight the new layer's number, its name within it, and its float32 value, adapters merged."""
        for new, layer in enumerate(self):
            adapted = {name: module for name, module in layer.named_modules() if hasattr(module, "lora_A")}
            for name, module in adapted.items():
                base = module.base_layer.weight
                yield new, f"{name}.weight", base.float() + module.get_delta_weight(ADAPTER).float()
            for name, value in layer.named_parameters():
                if value.requires_grad and "lora_" not in name:
                    yield new, name.replace(BASE, ""), value.float()


def spanning(model: PreTrainedModel, plan: LayerPlan, replacement: ReplacementLayers) -> ReplacementLayers:
    """What is trained between the ends of `plan.span`: of several windows a student, with `replacement`'s own layers.

    The layers between the windows are the model's own, and none of them trains.
    """
    if not plan.others:
        return replacement
    stand_ins = dict(zip(plan.replaced(), list(replacement), strict=True))
    sources = [source for source in plan.sources() if source in plan.span.layers()]
    layers = [stand_ins.get(source, layers_of(model)[source]) for source in sources]
    return Student(layers, [source - plan.span.start for source in sources])


def student_of(model: PreTrainedModel, plan: LayerPlan, replacement: ReplacementLayers, heal: Heal) -> Student:
    """The shortened model's layers, ready to be healed; what of the replacement was trained trains on.

    Errors: UserError where there is nothing that could be.
    """
    stand_ins = iter(list(replacement))
    layers: list[nn.Module] = []
    for source in plan.sources():
        layers.append(next(stand_ins) if source in plan.replaced() else sharing(layers_of(model)[source]))
    student = Student(layers, plan.sources(), weights_above(model, heal.above))
    kept = [new for new, source in enumerate(plan.sources()) if source not in plan.gone]
    if heal.kind == "lora":
        _adapt([layers[new] for new in kept], heal.size)
    else:
        for new in kept:
            if heal.whole(new, plan):
                layers[new] = _own(layers[new])
                student[new] = layers[new]
    trains = any(value.requires_grad for new in kept for value in layers[new].parameters())
    if heal.kind and not heal.above and not trains:
        raise UserError(f"--heal {heal} finds nothing to train in the layers that stay; give another, or none.")
    return student


def healed_parameters(model: PreTrainedModel, heal: Heal, cuts: int = 1) -> int:
    """How many parameters train of layers that stay, and above them, at most: which layers those are is not known yet.

    Args: cuts: in how many places layers go.
    """
    layers = list(layers_of(model))
    above = sum(value.numel() for value in weights_above(model, heal.above).values())
    if heal.kind == "lora":
        linear = [module for layer in layers for module in layer.modules() if is_linear(module)]
        return above + heal.size * sum(sum(module.weight.shape) for module in linear)  # type: ignore[arg-type, misc]
    counts = sorted((sum(value.numel() for value in layer.parameters()) for layer in layers), reverse=True)
    most = {"all": len(layers), "layers": 2 * heal.size * cuts, "last": heal.size, "": 0}
    return above + sum(counts[: most[heal.kind]])


def check_installed(heal: str) -> None:
    """Errors: UserError for adapters without peft."""
    wanted = parse_heal(heal)
    if wanted and wanted.kind == "lora" and not find_spec("peft"):
        raise UserError(f"--heal {heal} needs peft, which is not here; install llm-streamline[heal].")


def sharing(layer: nn.Module) -> nn.Module:
    """The layer's modules anew around the same weights, so that they can be wrapped where the original is not."""
    shared = {id(value): value for value in (*layer.parameters(), *layer.buffers())}
    return copy.deepcopy(layer, shared).requires_grad_(False)


def _own(layer: nn.Module) -> nn.Module:
    """The layer with float32 weights of its own, which train."""
    return copy.deepcopy(layer).float().requires_grad_(True)


def _adapt(layers: Sequence[nn.Module], rank: int) -> None:
    """Low-rank adapters on every linear map, which begin as nothing added. Experts in one tensor are no such map."""
    from peft import LoraConfig, inject_adapter_in_model

    for layer in layers:
        past = read_past(layer)
        linear = [name for name, module in layer.named_modules() if is_linear(module) and name not in past]
        turned = any(isinstance(layer.get_submodule(name), Conv1D) for name in linear)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, fan_in_fan_out=turned)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # adapters begin with one random factor, the other at zero
            inject_adapter_in_model(config, layer, adapter_name=ADAPTER)
        for name, value in layer.named_parameters():
            value.requires_grad_("lora_" in name)
            if "lora_" in name:
                value.data = value.data.float()


def read_past(layer: nn.Module) -> set[str]:
    """Maps of a state-space mixer whose weights its kernels read themselves, so that an adapter would not be seen.

    peft refuses adapters there.
    """
    mixers = [name for name, module in layer.named_modules() if hasattr(module, "A_log")]
    return {".".join(filter(None, (name, "out_proj"))) for name in mixers}


def in_experts(student: Student) -> int:
    """Parameters of frozen layers that are held as one tensor for all experts."""
    holders = [module for module in student.modules() if not isinstance(module, nn.Conv1d)]
    held = [value for module in holders for value in module.parameters(recurse=False) if value.ndim == 3]
    return sum(value.numel() for value in held if not value.requires_grad)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def split(student: Student, model: PreTrainedModel, plan: LayerPlan) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Healed weights in float32: those that stay, under the source's names, and the replacement's own."""
    prefix, sources, places = layers_prefix(model.config), plan.sources(), plan.replaced()
    stays: dict[str, Tensor] = {name: value.detach().float() for name, value in student.above().items()}
    replaced: dict[str, Tensor] = {}
    for new, name, value in student.changed():
        if sources[new] in places:
            replaced[f"{places.index(sources[new])}.{name}"] = value
        else:
            stays[f"{prefix}{sources[new]}.{name}"] = value
    return stays, replaced
