"""The state of a model that a process keeps between decodes: one object per model, one place to clear."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.utils import logging

from .stock_model import decoder_of
from .torch_internals import check_processor_meanwhile

logger = logging.get_logger(__name__)


@dataclass
class KeptWithModel:
    """
    Attributes:
        lock: serializes decodes, which change the model's modules.
        step_times: what steps take, by what that depends on.
        compiled: compiled functions, by function, shape and options.
        graphs: CUDA graphs of steps, with their cache.
        copies, roundings: packed weights by layer, and rounding by device and dtype.
        heads: draft heads that calls have named, by name.
        asked_layers: what quantized layers do to a token beside others, by layer.
    """

    lock: Any = field(default_factory=threading.RLock)
    step_times: dict[Any, Any] = field(default_factory=dict)
    compiled: dict[Any, Any] = field(default_factory=dict)
    graphs: Any = None
    copies: WeakKeyDictionary[nn.Module, Any] = field(default_factory=WeakKeyDictionary)
    heads: dict[str, Any] = field(default_factory=dict)
    roundings: dict[Any, Any] = field(default_factory=dict)
    asked_layers: WeakKeyDictionary[nn.Module, Any] = field(default_factory=WeakKeyDictionary)


_kept: WeakKeyDictionary[nn.Module, KeptWithModel] = WeakKeyDictionary()
_guard = threading.Lock()


def kept_with(model: nn.Module) -> KeptWithModel:
    """The kept state of a model's decoder, shared by all views of the model."""
    with _guard:
        return _kept.setdefault(decoder_of(model), KeptWithModel())


def compiled_for(
    model: nn.Module, function: Callable[..., Any], shape: tuple[Any, ...], options: dict[str, Any]
) -> Callable[..., Any]:
    """The function, compiled at its first call for one shape of arguments, and kept with the model.

    torch's guards and its limit of recompiling apply to each shape alone.

    Args:
        options: keywords of `torch.compile`.
    """
    functions = kept_with(model).compiled
    key = function.__name__, shape, repr(sorted(options.items()))
    if key not in functions:
        if model.device.type == "cpu" and options.get("backend", "inductor") == "inductor":
            check_processor_meanwhile()
        assert isinstance(function, FunctionType)
        code = function.__code__.replace(co_name=f"{function.__name__}_{len(functions)}")
        functions[key] = torch.compile(FunctionType(code, function.__globals__), **options)
        logger.warning(
            f"Compiling decode steps of a new shape ({len(functions)} so far): up to a minute, once on this machine. "
            "Later texts of about this length do not wait."
        )
    return functions[key]


def one_thread_at_a_time(decode: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `decode(model, ...)` wait until no other thread decodes with this model."""

    @functools.wraps(decode)
    def waiting(model: Any, *args: Any, **kwargs: Any) -> Any:
        with kept_with(model).lock:
            return decode(model, *args, **kwargs)

    return waiting
