"""Where a model computes, also where its weights are kept elsewhere between forwards, or shared among ranks."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder below the lm_head: one object, whichever class a model is seen through. `custom_generate` sees a
    stock model through a new view at every call, so that what is kept of a model is kept by its decoder."""
    return getattr(model, model.base_model_prefix)


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


def is_shared_by_ranks(model: Any) -> bool:
    """Whether a forward needs every rank, for the weights each holds a part of (FSDP, ZeRO-3): what `generate` decides
    where `synced_gpus` is not given, and a model that `fully_shard` alone has sharded."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return (
        isinstance(model, FSDPModule)
        or model._extract_generation_mode_kwargs(None, {}, None, None, None)["synced_gpus"]
    )


def _placing_hooks(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "execution_device", None) is not None:
                yield one
