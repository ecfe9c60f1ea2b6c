"""The private names of torch that more than one file needs: what a module holds, and options of torch's compiler.

torch's public ways answer a question about one module in microseconds. A decode asks it of a thousand modules.
"""

from typing import Any

import torch
from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def parts_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules directly below a module, by name. What is put into the dictionary stands there."""
    return module._modules


def tensors_of(module: nn.Module) -> list[torch.Tensor | None]:
    """A module's own parameters and buffers."""
    return [*module._parameters.values(), *module._buffers.values()]


def hooks_of(module: nn.Module) -> list[Any]:
    """What tells a module's forward hooks, and those before its forward, from others; empty without any."""
    return [*module._forward_hooks, *module._forward_pre_hooks]


def share_hooks(module: nn.Module, other: nn.Module) -> None:
    """Runs the hooks around the forward of `other`, now and later, around that of `module` too."""
    for name in HOOKS:
        setattr(module, name, getattr(other, name))


def times_written(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written to in place; None for a tensor of inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


def compiler_options_of(mode: str | None) -> dict[str, Any]:
    """The options of torch's own compiler that a mode of `torch.compile` stands for."""
    return torch._inductor.list_mode_options(mode)


def has_compiler_option(name: str) -> bool:
    """Whether torch's own compiler knows an option of this name."""
    return name in torch._inductor.list_options()
