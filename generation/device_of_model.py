"""Where a model computes, also where its weights are kept elsewhere between forwards."""

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes; weights that accelerate keeps elsewhere between forwards seem to be nowhere."""
    if model.device.type != "meta":
        return model.device
    return next(torch.device(m._hf_hook.execution_device) for m in model.modules() if _brings_weights(m))


def _brings_weights(module: nn.Module) -> bool:
    return getattr(getattr(module, "_hf_hook", None), "execution_device", None) is not None
