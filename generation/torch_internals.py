"""Private names of torch that several files use: the contents of a module, and options of torch's compiler.

torch's public functions take microseconds per module, and a decode reads a thousand modules.
"""

from concurrent.futures import ThreadPoolExecutor
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
    """The child modules of a module, by name. Writing to the dictionary changes the module."""
    return module._modules


def tensors_of(module: nn.Module) -> list[torch.Tensor | None]:
    """A module's own parameters and buffers."""
    return [*module._parameters.values(), *module._buffers.values()]


def hooks_of(module: nn.Module) -> list[Any]:
    """The ids of a module's forward hooks and forward pre-hooks; empty without hooks."""
    return [*module._forward_hooks, *module._forward_pre_hooks]


def pre_hooks_of(module: nn.Module) -> list[Any]:
    """A module's forward pre-hooks, as they were registered."""
    return [*module._forward_pre_hooks.values()]


def share_hooks(module: nn.Module, other: nn.Module) -> None:
    """Makes `module` run all present and future forward hooks of `other` too."""
    for name in HOOKS:
        setattr(module, name, getattr(other, name))


def times_written(tensor: torch.Tensor) -> int | None:
    """The number of in-place writes to a tensor; None for an inference tensor, which does not count them."""
    return None if tensor.is_inference() else tensor._version


def check_processor_meanwhile() -> None:
    """Lets the compiler's checks of a CPU run while functions are traced: seven seconds, once on a machine. Where they
    fail, the compiler fails alike, and says so."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    ThreadPoolExecutor(1).submit(pick_vec_isa)


def compiler_options_of(mode: str | None) -> dict[str, Any]:
    """The inductor options of a mode of `torch.compile`."""
    return torch._inductor.list_mode_options(mode)


def has_compiler_option(name: str) -> bool:
    """Whether inductor has an option of this name."""
    return name in torch._inductor.list_options()
