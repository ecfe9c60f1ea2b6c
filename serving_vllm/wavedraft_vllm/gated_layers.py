"""A gated adapter in vLLM's linear layers: it acts on the rows of masks alone.

n query tokens, D and E channels in and out (a rank's share), r the adapter's rank, P parts of a fused layer.
"""

from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from .settings import ADAPTER_CONFIG, ADAPTER_FILE, read_json

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class GatedMethod(LinearMethodBase):
    """A layer's own product, and x @ down @ up where the gate is 1.

    The layer computes through its `quant_method`, also below vLLM's LoRA layers, so that is where the adapter goes.
    In a layer that is split by its input, each rank's share of the correction is summed with the layer's own.
    """

    def __init__(self, plain: Any):
        self.plain = plain

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[n, D] -> [n, E]"""
        result = self.plain.apply(layer, x, bias)
        gate = layer.draft_gate[: x.shape[0], None].to(layer.draft_down.dtype)
        reduced = functional.linear(x.to(layer.draft_down.dtype), layer.draft_down) * gate
        return result + functional.linear(reduced, layer.draft_up).to(result.dtype)

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.plain.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.plain.process_weights_after_loading(layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["plain"], name)


def gate_layers(model: nn.Module, adapter: Path, gate: Tensor) -> None:
    """Gives each adapted layer of a loaded model its part of the adapter.

    Args:
        gate: [n] of as many query tokens as a step may have, 1 at masks, written before each forward.

    Raises:
        ValueError: the adapter is for layers that the model does not have, or not in this form.
    """
    stored = read_json(adapter / ADAPTER_CONFIG)
    rank = stored["r"]
    scale = stored["lora_alpha"] / (sqrt(rank) if stored.get("use_rslora") else rank)
    tensors = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(str(adapter / ADAPTER_FILE)).items()
    }
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase):
            _gate_layer(name.replace(".base_layer", ""), layer, tensors, scale, gate)
    if tensors:
        raise ValueError(
            f"The adapter {adapter} also changes {sorted(tensors)[0]} and {len(tensors) - 1} others, which "
            f"{type(model).__name__} has not as a linear layer. Serve the model that it was taught on."
        )


def _gate_layer(name: str, layer: LinearBase, tensors: dict[str, Tensor], scale: float, gate: Tensor) -> None:
    """Takes a layer's matrices out of `tensors`; without any the layer stays as it is."""
    parent, _, own = name.rpartition(".")
    names = [f"{parent}.{part}" for part in PARTS.get(own, (own,))]
    if not any(f"{part}.lora_A.weight" in tensors for part in names):
        return
    downs, ups = [], []
    for place, part in enumerate(names):
        down, up = tensors.pop(f"{part}.lora_A.weight", None), tensors.pop(f"{part}.lora_B.weight", None)
        size = _output_slice(layer, place)
        if down is None or up is None:  # this part of a fused layer is not adapted
            downs.append(None)
            ups.append(size.stop - size.start)
            continue
        _check_channels(part, down, up, layer.input_size, _num_outputs(layer, place))
        downs.append(down)
        ups.append(up[size] * scale)
    down = torch.cat([one for one in downs if one is not None])
    if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
        width = layer.input_size_per_partition
        down = down[:, layer.tp_rank * width : (layer.tp_rank + 1) * width]
    dtype, device = layer.params_dtype, gate.device
    layer.register_buffer("draft_gate", gate, persistent=False)
    layer.register_buffer("draft_down", down.to(device, dtype).contiguous(), persistent=False)
    layer.register_buffer("draft_up", _stacked(ups, len(down)).to(device, dtype).contiguous(), persistent=False)
    layer.quant_method = GatedMethod(layer.quant_method)


def _check_channels(part: str, down: Tensor, up: Tensor, num_inputs: int, num_outputs: int) -> None:
    """Also too many channels are refused: a model with fewer heads would otherwise draft by a piece of the adapter."""
    found, wanted = (down.shape[1], up.shape[0]), (num_inputs, num_outputs)
    if found != wanted:
        raise ValueError(
            f"The adapter's {part} reads {found[0]} channels and writes {found[1]}, but the model's reads {wanted[0]} "
            f"and writes {wanted[1]}. Serve the model that it was taught on."
        )


def _stacked(ups: list[Tensor | int], num_columns: int) -> Tensor:
    """The parts' [E, r] in a matrix [sum of E, P * r]: each reads its own r columns. A number is E of an absent one."""
    sizes = [up if isinstance(up, int) else up.shape[0] for up in ups]
    whole = torch.zeros(sum(sizes), num_columns)
    row = column = 0
    for up, size in zip(ups, sizes, strict=True):
        if not isinstance(up, int):
            whole[row : row + size, column : column + up.shape[1]] = up.float()
            column += up.shape[1]
        row += size
    return whole


def _num_outputs(layer: LinearBase, place: int) -> int:
    """The channels of one part of a layer, of all ranks."""
    if isinstance(layer, QKVParallelLinear):
        return (layer.total_num_heads if place == 0 else layer.total_num_kv_heads) * layer.head_size
    return layer.output_sizes[place] if isinstance(layer, MergedColumnParallelLinear) else layer.output_size


def _output_slice(layer: LinearBase, place: int) -> slice:
    """The rows of one part's `up` that this rank computes."""
    if isinstance(layer, QKVParallelLinear):
        if place == 0:
            return _share(layer.num_heads * layer.head_size, layer.tp_rank)
        return _share(layer.num_kv_heads * layer.head_size, layer.tp_rank // layer.num_kv_head_replicas)
    if isinstance(layer, MergedColumnParallelLinear):
        return _share(layer.output_sizes[place] // layer.tp_size, layer.tp_rank)
    if isinstance(layer, ColumnParallelLinear):
        return _share(layer.output_size_per_partition, layer.tp_rank)
    return slice(0, layer.output_size)


def _share(size: int, rank: int) -> slice:
    return slice(rank * size, (rank + 1) * size)
