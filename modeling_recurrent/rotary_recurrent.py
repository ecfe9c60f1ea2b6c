"""Rotary positions: adjacent pairs from a stored table (Huginn), and split halves with scalings (Llama).

B rows, T tokens, H heads, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def rotary_table(config: Any, device: torch.device | str | None = None) -> torch.Tensor:
    """Cosines and sines of every position, [1, positions, 1, D/2, 2] in fp32: the checkpoint's `freqs_cis`."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    positions = torch.arange(config.block_size, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / config.rope_base**exponents)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None]


def paired_rotary(rotary: torch.Tensor) -> torch.Tensor:
    """[..., D/2, 2] cosines and sines as `rotate_pairs` takes them: cosines, then sines signed for their channel.

    [B, T, 1, D/2, 2] to [2, B, T, 1, 1, D]; the axes of size 1 are for query and key, and for the heads.
    """
    cos, sin = rotary.unbind(-1)
    signed = torch.stack([-sin, sin], dim=-1).flatten(-2)
    return torch.stack([cos.repeat_interleave(2, dim=-1), signed])[:, :, :, None]


def rotate_pairs(heads: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate adjacent pairs (even channel real, odd imaginary) of [B, T, 2, H, D] in fp32."""
    cos, sin = rotary
    precise = heads.float()
    swapped = precise.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(precise * cos, swapped, sin).to(heads.dtype)


class SplitHalfRotary(nn.Module):
    """Cosines and sines of positions, each frequency at channels d and d + D/2, scaled as the config says.

    `config.rope_parameters` has `rope_theta`, `rope_type` ("default", "linear", "llama3" or "yarn") and that type's own
    fields.
    """

    inverse_frequencies: torch.Tensor

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        kind = config.rope_parameters["rope_type"]
        if kind not in ("default", "linear", "llama3", "yarn"):
            raise ValueError(
                f"`rope_type` must be 'default', 'linear', 'llama3' or 'yarn' (the scalings that do not change with "
                f"the length of the text), but config.json says {kind!r}. Load such a checkpoint with the code that "
                f"trained it."
            )
        frequencies, self.scaling = self.frequencies()
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def frequencies(self, device: torch.device | None = None) -> tuple[torch.Tensor, float]:
        """[D/2] inverse frequencies in fp32, and the factor on cosines and sines."""
        kind = self.config.rope_parameters["rope_type"]
        if kind != "default":
            compute: Callable = ROPE_INIT_FUNCTIONS[kind]
            return compute(self.config, device)
        width, theta = self.config.head_dim, self.config.rope_parameters["rope_theta"]
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        return 1.0 / theta**exponents, 1.0

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Move the frequencies, but keep them fp32: bf16 lacks many positions above 256."""
        super()._apply(fn, recurse)
        if self.inverse_frequencies.dtype != torch.float32:
            self.inverse_frequencies = self.frequencies(self.inverse_frequencies.device)[0]
        return self

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Cosines and sines at positions [B, T], computed in fp32: [2, B, 1, T, D] of `dtype`."""
        angles = position_ids[..., None].float() * self.inverse_frequencies
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return (torch.stack([angles.cos(), angles.sin()]) * self.scaling).to(dtype)


def rotate_halves(heads: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate channels d and d + D/2 of [B, H, T, D] into each other."""
    cos, sin = rotary
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin
