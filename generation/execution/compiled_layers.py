"""Decoder layers compiled for decode steps of one shape."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import CompileConfig, GenerationConfig
from transformers.utils import logging

from ..stock_model import decoder_of
from .step_graph import reason_not_to_record

logger = logging.get_logger(__name__)


class SlotsOfLayer:
    """One layer's keys and values, and where this step writes: all that a compiled layer may know of the cache."""

    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        self.keys[self.rows, :, self.slots] = key_states.transpose(1, 2)
        self.values[self.rows, :, self.slots] = value_states.transpose(1, 2)
        return self.keys, self.values


def forward_in_step(run: Callable[..., Any], layer: nn.Module, cache: Any, slots: Any) -> Callable[..., Any]:
    """A layer's forward by `run`, which gets no more of the cache than the layer's own `slots`."""
    own = SlotsOfLayer()

    def forward(*args: Any, **kwargs: Any) -> Any:
        own.keys, own.values = slots.keys, slots.values
        own.rows, own.slots = cache.write_index(slots.keys.device)
        return run(layer, *args, **{name: own if value is cache else value for name, value in kwargs.items()})

    return forward


def run_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


_compiled: WeakKeyDictionary[nn.Module, dict[Any, Callable[..., Any]]] = WeakKeyDictionary()
# Modes that record CUDA graphs, of each layer if torch may choose. Here the layers are compiled without, and the whole
# step is recorded.
LAYER_MODES = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile_config_of(model: nn.Module, generation_config: GenerationConfig) -> CompileConfig | None:
    """How the layers are to be compiled; None where they are not: as transformers has it, on an accelerator unless
    `disable_compile`, on a CPU only where a `compile_config` is given, and never where weights are moved about."""
    config = generation_config.compile_config
    if generation_config.disable_compile or (config is None and model.device.type == "cpu"):
        return None
    devices = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        logger.warning_once("`compile_config` is left aside: layers whose weights are offloaded cannot be compiled.")
        return None
    return config or CompileConfig(dynamic=False)


def is_recorded(model: nn.Module, config: CompileConfig | None) -> bool:
    """Whether the steps of a model so compiled become CUDA graphs: on a GPU where the mode says so, as transformers'
    own does, and nothing speaks against it, which is told."""
    if config is None or config.mode not in LAYER_MODES or model.device.type != "cuda":
        return False
    if (reason := reason_not_to_record(model)) is not None:
        logger.warning_once(f"Steps are compiled but not recorded as CUDA graphs, which would be faster: {reason}.")
    return reason is None


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's stack of layers, one for each of `config.num_hidden_layers`."""
    decoder = decoder_of(model)
    num_layers = model.config.get_text_config().num_hidden_layers
    stacks = (m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers)
    if (stack := next(stacks, None)) is None:
        raise ValueError(
            f"`compile_config` compiles the decoder's layers, but {type(decoder).__name__} holds no list of its "
            f"{num_layers} layers. Pass `disable_compile=True`."
        )
    return stack


class CompiledLayers:
    """The decoder's layers, each run by one function that is compiled once for all layers of a kind: their weights are
    its arguments.

    Every shape of a step has a function of its own, code and all, so that what torch knows of one (guards, its limit of
    recompilations) says nothing of another.
    """

    def __init__(self, model: nn.Module, config: CompileConfig):
        self.model = model
        self.layers = decoder_layers(model)
        self.options = {name: value for name, value in config.to_dict().items() if value is not None}
        if (mode := self.options.get("mode")) in LAYER_MODES:
            self.options["mode"] = LAYER_MODES[mode]
        self.checked: dict[Any, Callable[..., Any]] = {}  # what this decode has run, as it may run from then on
        self.forwards: dict[Any, list[tuple[dict[str, Any], Callable[..., Any]]]] = {}

    def compiled(self, function: Callable[..., Any], shape: tuple[Any, ...]) -> Callable[..., Any]:
        """The function as it is compiled for one shape of step, when it is first called. One that this decode has
        called before is not asked again whether all is as it was."""
        if (checked := self.checked.get((function, shape))) is not None:
            return checked
        found = self._compiled(function, shape)

        def first(*args: Any) -> Any:
            result = found(*args)
            self.checked[function, shape] = found
            return result

        return first

    def _compiled(self, function: Callable[..., Any], shape: tuple[Any, ...]) -> Callable[..., Any]:
        key = function.__name__, shape, tuple(sorted((name, str(value)) for name, value in self.options.items()))
        known = _compiled.setdefault(decoder_of(self.model), {})
        if key not in known:
            logger.warning_once(
                "The decoder's layers are compiled at the first step of each shape, which takes seconds to a minute. "
                "Later texts of about this length do not wait for it."
            )
            assert isinstance(function, FunctionType)
            code = function.__code__.replace(co_name=f"{function.__name__}_{len(known)}")
            known[key] = torch.compile(FunctionType(code, function.__globals__), **self.options)
        return known[key]

    @contextmanager
    def running(self, cache: Any, shape: tuple[int, ...]) -> Iterator[None]:
        """While this is open, a forward of this shape runs through the compiled layers.

        torch asks of each layer whether all is as it was when it was compiled; a decode asks once, and then only what
        tells one kind of layer from another, or where there is but one kind, nothing.
        """
        is_checked = (run_layer, shape) in self.checked
        run = self.checked[run_layer, shape] if is_checked else self._compiled(run_layer, shape)
        if (forwards := self.forwards.get((run, cache))) is None:
            layers = zip(cache.layers, self.layers, strict=True)
            forwards = [(layer.__dict__, forward_in_step(run, layer, cache, slots)) for slots, layer in layers]
            self.forwards[run, cache] = forwards
        for attributes, forward in forwards:
            attributes["forward"] = forward
        try:
            with torch.compiler.set_stance(skip_guard_eval_unsafe=is_checked):
                yield
            self.checked[run_layer, shape] = run
        finally:
            for attributes, _ in forwards:
                del attributes["forward"]
