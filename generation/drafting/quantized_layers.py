"""Whether quantized layers let a token's result depend on the tokens beside it: drafts would then change the text.

D channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..kept_with_model import kept_with
from ..stock_model import device_of
from ..torch_internals import parts_of, tensors_of


def reason_of_layers(model: Any) -> str | None:
    """Why drafts could change the text of a model with quantized layers, or None. Each layer is asked once."""
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    kept = kept_with(model).asked_layers
    for name, layer in model.named_modules():
        kinds = tuple(type(tensor) for tensor in tensors_of(layer))
        holds = any(is_packed(tensor) for tensor in tensors_of(layer))
        if isinstance(layer, nn.Embedding) or "lora_A" in parts_of(layer) or not (holds or is_quantized):
            continue
        if not hasattr(layer, "in_features"):
            if any(is_packed(tensor) for tensor in layer.parameters(recurse=False)):
                return f"`{name}` ({type(layer).__name__}) has quantized weights, and is not a linear layer"
            continue
        if layer not in kept or kept[layer][0] != kinds:
            kept[layer] = kinds, _reason_of_layer(layer, model)
        if kept[layer][1]:
            return f"quantized layers such as `{name}` ({type(layer).__name__}) {kept[layer][1]}"
    return None


def is_packed(tensor: Tensor | None) -> bool:
    """Whether a tensor holds quantized weights."""
    if tensor is None or tensor.ndim < 2:
        return False
    is_small = tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool
    return is_small or tensor.dtype == torch.int32 or type(tensor.data).__name__ not in ("Tensor", "DTensor")


@torch.no_grad()
def _reason_of_layer(layer: Any, model: Any) -> str | None:
    """Asks one layer about a token beside two different ones."""
    place = next((tensor.device for tensor in tensors_of(layer) if tensor is not None), torch.device("meta"))
    device = device_of(model) if place.type == "meta" else place
    draws = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
    token, other = draws.to(device, model.dtype)
    beside_itself, beside_other = (torch.stack([token, one])[None] for one in (token, 100 * other))  # [1, 2, D]
    try:
        alike, different = layer(beside_itself)[0, 0], layer(beside_other)[0, 0]
        if torch.equal(alike, different):
            return None
        noise = (layer(beside_itself)[0, 0] - alike).abs().max()  # of products that are never twice the same
    except Exception as error:  # any package's
        return f"cannot be asked about one token ({type(error).__name__}: {error})"
    if (different - alike).abs().max() <= 4 * noise:
        return None
    return "round a token by the tokens beside it, masks too. Quantize activations by the token, or weights alone"
