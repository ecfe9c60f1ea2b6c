"""Functions as `torch.compile` compiles them for decode steps of few shapes, kept as long as the model they run."""

from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_compiled: WeakKeyDictionary[nn.Module, dict[Any, Callable[..., Any]]] = WeakKeyDictionary()


def compiled_for(
    model: nn.Module, function: Callable[..., Any], shape: tuple[Any, ...], options: dict[str, Any]
) -> Callable[..., Any]:
    """The function, compiled for one model and one shape of its arguments when it is first called.

    Each shape has a function of its own, code and all. What torch keeps of one shape (its guards, its limit of
    recompilations) then says nothing of another.

    Args:
        model: whose life the compiled code shares. The function gets it, or parts of it, as an argument.
        options: keywords of `torch.compile`.
    """
    known = _compiled.setdefault(model, {})
    key = function.__name__, shape, repr(sorted(options.items()))
    if key not in known:
        assert isinstance(function, FunctionType)
        code = function.__code__.replace(co_name=f"{function.__name__}_{len(known)}")
        known[key] = torch.compile(FunctionType(code, function.__globals__), **options)
    return known[key]


class CompiledParts:
    """The compiled functions of one model, as one decode calls them.

    At each call torch checks whether the model is still as it was when it was compiled. For the short parts of a small
    model this check takes a tenth of the time. A decode does not change its model, so each function is checked at its
    first call in a decode, and later calls skip the check.
    """

    def __init__(self, model: nn.Module, options: dict[str, Any]):
        self.model = model
        self.options = options
        self.checked: dict[Any, Callable[..., Any]] = {}
        self.without_checks = torch.compiler.set_stance(skip_guard_eval_unsafe=True)
        with self.without_checks:  # torch takes a new stance when it is made: leaving it restores the one before
            pass

    def run(self, function: Callable[..., Any], shape: tuple[Any, ...], *arguments: Any) -> Any:
        """Calls the function as it is compiled for this shape."""
        if (checked := self.checked.get((function, shape))) is not None:
            with self.without_checks:
                return checked(*arguments)
        compiled = compiled_for(self.model, function, shape, self.options)
        result = compiled(*arguments)
        self.checked[function, shape] = compiled
        return result
