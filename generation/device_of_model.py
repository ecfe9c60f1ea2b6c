"""Where a model computes, also where its weights are kept elsewhere between forwards."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes; weights that accelerate keeps elsewhere between forwards seem to be nowhere."""
    if model.device.type != "meta":
        return model.device
    return next(torch.device(hook.execution_device) for hook in _placing_hooks(model))


def devices_of(model: nn.Module) -> set[torch.device]:
    """All devices a model computes on: more than one where a `device_map` spread its layers."""
    return {torch.device(hook.execution_device) for hook in _placing_hooks(model)} or {model.device}


def is_hooked(model: nn.Module) -> bool:
    """Whether accelerate moves weights or states about between layers."""
    return next(_placing_hooks(model), None) is not None


def _placing_hooks(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "execution_device", None) is not None:
                yield one
