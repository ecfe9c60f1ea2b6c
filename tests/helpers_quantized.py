"""Quantized checkpoints as their packages write them, of random weights: no calibration, no GPU.

I input channels, O output channels, G channels a group.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
BLOCK = 16


def random_words(shape: tuple[int, int], draws: torch.Generator) -> Tensor:
    """int32 of random bits: eight random weights of 4 bits each."""
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=draws).to(torch.int32)


def random_scales(weight: Tensor, draws: torch.Generator) -> Tensor:
    """[I / G, O] in float16."""
    return (torch.rand(weight.shape[1] // GROUP, weight.shape[0], generator=draws) * 0.04 + 0.02).half()


def gptq(weight: Tensor, draws: torch.Generator) -> dict[str, Tensor]:
    (outputs, inputs), ones_less = weight.shape, 0x77777777  # each zero point is 8, and is stored less one
    return {
        "qweight": random_words((inputs // 8, outputs), draws),
        "qzeros": torch.full((inputs // GROUP, outputs // 8), ones_less, dtype=torch.int32),
        "scales": random_scales(weight, draws),
        "g_idx": (torch.arange(inputs) // GROUP).int(),
    }


def awq(weight: Tensor, draws: torch.Generator) -> dict[str, Tensor]:
    (outputs, inputs), eights = weight.shape, -0x77777778  # each zero point is 8
    return {
        "qweight": random_words((inputs, outputs // 8), draws),
        "qzeros": torch.full((inputs // GROUP, outputs // 8), eights, dtype=torch.int32),
        "scales": random_scales(weight, draws),
    }


def fp8(weight: Tensor, draws: torch.Generator) -> dict[str, Tensor]:
    """The weight over a scale for each block of 16 x 16."""
    outputs, inputs = weight.shape
    scales = torch.rand(outputs // BLOCK, inputs // BLOCK, generator=draws) * 0.01 + 0.005
    small = weight / scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return {"weight": small.to(torch.float8_e4m3fn), "weight_scale_inv": scales}


# Each kind: its layers' tensors, and the `quantization_config` of its config.json.
KINDS: dict[str, tuple[Callable[[Tensor, torch.Generator], dict[str, Tensor]], dict[str, Any]]] = {
    "gptq": (gptq, {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "awq": (awq, {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "fp8": (fp8, {"activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}),
}


def write_quantized(source: Path, target: Path, kind: str) -> None:
    """Copies a checkpoint, the linear layers of its decoder quantized."""
    layer_of, options = KINDS[kind]
    shutil.copytree(source, target)
    draws, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer, _, part = name.rpartition(".")
        if layer.endswith("_proj") and part == "weight":
            tensors |= {f"{layer}.{key}": value for key, value in layer_of(tensor, draws).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((target / "config.json").read_text())
    values["quantization_config"] = {"quant_method": kind, **options}
    (target / "config.json").write_text(json.dumps(values))
