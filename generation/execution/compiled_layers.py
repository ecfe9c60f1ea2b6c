"""Decoder layers compiled for decode steps of one shape."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig, GenerationConfig
from transformers.utils import logging

from ..kept_with_model import compiled_for
from ..step_graph import LAYER_MODES
from ..stock_model import can_choose_experts, decoder_layers
from ..torch_internals import compiler_options_of, hooks_of
from .gated_linear import told_by_row

logger = logging.get_logger(__name__)


def compile_config_of(model: Any, generation_config: GenerationConfig) -> CompileConfig | None:
    """How to compile the layers, or None. As in transformers, layers are compiled on an accelerator unless
    `disable_compile`, on a CPU with a `compile_config`, and never with offloaded weights."""
    config = generation_config.compile_config
    if generation_config.disable_compile or (config is None and model.device.type == "cpu"):
        return None
    if told_by_row(model):
        logger.warning_once("`compile_config` is left aside: rows with adapters of their own run as PEFT runs them.")
        return None
    devices = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        logger.warning_once("`compile_config` is left aside: offloaded layers cannot be compiled.")
        return None
    return config or CompileConfig(dynamic=False)


def is_captured(model: Any, config: CompileConfig | None) -> bool:
    """Whether compiled steps become CUDA graphs: on a GPU in one of `LAYER_MODES`, unless a reason prevents it."""
    if config is None or config.mode not in LAYER_MODES or model.device.type != "cuda":
        return False
    if (reason := reason_not_to_record(model)) is not None:
        logger.warning_once(f"Steps are compiled but not recorded as CUDA graphs, which would be faster: {reason}.")
    return reason is None


class SlotsOfLayer:
    """A compiled layer's view of the cache: its keys and values, and the places that this step writes."""

    keys: Tensor
    values: Tensor
    rows: Tensor
    slots: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        self.keys[self.rows, :, self.slots] = key_states.transpose(1, 2)
        self.values[self.rows, :, self.slots] = value_states.transpose(1, 2)
        return self.keys, self.values


def run_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


class CompiledLayers:
    """The decoder's layers, run by one compiled function for all layers of a kind, which takes the weights as
    arguments. Every shape of step has its own function (`compiled_for`).

    Args:
        of_inductor: inductor options in addition to those of `config`.

    Attributes:
        changes: each layer's replaced forwards.
        runs: current functions of layers, by changes; empty: not compiled.
        checked: functions called in this decode.
    """

    def __init__(self, model: nn.Module, config: CompileConfig, of_inductor: dict[str, Any] | None = None):
        self.model = model
        self.layers = decoder_layers(model)
        self.options = {name: value for name, value in config.to_dict().items() if value is not None}
        if (mode := self.options.get("mode")) in LAYER_MODES:
            self.options["mode"] = LAYER_MODES[mode]
        if of_inductor and self.options.get("backend", "inductor") == "inductor":
            # torch takes a mode or options, and a mode is a set of options.
            of_mode = compiler_options_of(self.options.pop("mode", None) or "default")
            self.options["options"] = of_mode | of_inductor | self.options.get("options", {})
        self.changes: list[Any] = []
        self.runs: dict[Any, Callable[..., Any]] = {}
        self.cache: Any = None
        self.checked: set[Any] = set()

    def compiled(self, function: Callable[..., Any], shape: tuple[Any, ...]) -> Callable[..., Any]:
        """The function, compiled at its first call for one shape of step."""
        return compiled_for(self.model, function, shape, self.options)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Makes the layers run the functions in `self.runs`, if any, inside the context."""
        self.changes = [own_forwards_in(layer) for layer in self.layers]
        forwards = [self._forward_of(number, layer, layer.forward) for number, layer in enumerate(self.layers)]
        places = zip(self.layers, forwards, strict=True)
        with swapped([(layer.__dict__, "forward", forward) for layer, forward in places]):
            yield

    def _forward_of(self, number: int, layer: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward by `self.runs`, which gets only the layer's own slots of the cache."""
        own, changes = SlotsOfLayer(), self.changes[number]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.runs:
                return plain(*args, **kwargs)
            slots = self.cache.layers[number]
            own.keys, own.values = slots.keys, slots.values
            own.rows, own.slots = self.cache.write_index(slots.keys.device)
            return self.runs[changes](
                layer, *args, **{name: own if value is self.cache else value for name, value in kwargs.items()}
            )

        return forward

    @contextmanager
    def step(self, cache: Any, shape: tuple[int, ...]) -> Iterator[None]:
        """Runs the layers compiled inside the context, for a step of this shape with this cache.

        torch checks guards at each call of a compiled layer. A decode checks them once per function. Later calls only
        check the guards that distinguish kinds of layers, or none for a single kind. Since torch 2.15 these guards miss
        a part with a replaced `forward`, so a layer with such parts has its own function.
        """
        self.runs = {changes: self.compiled(run_layer, (shape, changes)) for changes in set(self.changes)}
        self.cache = cache
        functions = set(self.runs.values())
        try:
            with torch.compiler.set_stance(skip_guard_eval_unsafe=functions <= self.checked):
                yield
            self.checked |= functions
        finally:
            self.runs, self.cache = {}, None


def own_forwards_in(layer: nn.Module) -> tuple[tuple[str, int], ...]:
    """The parts of a layer with a replaced `forward`, and the ids of the replacements."""
    parts = ((name, part.__dict__.get("forward")) for name, part in layer.named_modules() if part is not layer)
    return tuple((name, id(forward)) for name, forward in parts if forward is not None)


@contextmanager
def swapped(places: list[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """While this is open, a part stands at each place: among these parts, by this name."""
    kept = [(siblings, name, siblings.get(name)) for siblings, name, _ in places]
    try:
        for siblings, name, part in places:
            siblings[name] = part
        yield
    finally:
        for siblings, name, part in kept:
            siblings[name] = part
            if part is None:
                del siblings[name]


def reason_not_to_record(model: nn.Module) -> str | None:
    """Why a forward may wait for the GPU or run more than kernels, according to transformers' flags, or None."""
    quantizer = getattr(model, "hf_quantizer", None)
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "its weights are on several devices"
    if not getattr(model, "_can_compile_fullgraph", False):
        return "transformers does not mark it as compilable as a whole"
    experts = getattr(model.config.get_text_config(), "_experts_implementation", None)
    if can_choose_experts(model) and experts == "eager":
        return "its experts run one by one, as the tokens choose them (`experts_implementation='eager'`)"
    if quantizer is not None and not quantizer.is_compileable:
        return "transformers does not mark its quantization as compilable"
    for name, module in model.named_modules():
        rope_type = module.__dict__.get("rope_type", "")
        rope_types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
        if any("dynamic" in str(one) or one == "longrope" for one in rope_types):
            return f"its rotary embedding depends on the length of the text ({rope_type})"
        if hooks_of(module):
            return f"{name or 'the model'} has forward hooks, which a graph would skip"
    return None
