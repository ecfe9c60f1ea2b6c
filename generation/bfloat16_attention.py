"""Attention of steps in bfloat16 on a CPU that has no products of it, by the C++ of `bfloat16_source`.

A query has the bits that PyTorch's own attention (of a CPU with AVX2) gives it alone over all slots up to the last it
sees, which is how plain decoding reads a token, whatever stands beside it here. What is cached is read once for all the
queries and heads that share it, and not at all where no query sees it: a step of constant shape has slots that no text
has reached yet. (Not the same bits: where plain decoding reads several heads as so many queries, as transformers does
in padded batches since 5.23, or hands over a window of slots.)

A sequences, Q queries, S slots, H heads, G key heads, D channels.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import nn

from .bfloat16_products import known_kernel
from .cpp_operators import operator
from .grouped_attention import LEFT_TO_SDPA, attend_grouped

CHANNELS = 16  # D is a multiple of them


def attend_in_bfloat16(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """`attend_grouped` [A, Q, H, D], and zeros for a query that sees nothing."""
    has_more = kwargs.get("dropout") or any(kwargs.get(name) is not None for name in LEFT_TO_SDPA)
    tensors = query, key, value, attention_mask
    if has_more or not isinstance(attention_mask, torch.Tensor) or not can_attend(*tensors):
        return attend_grouped(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return bfloat16_attention()(*tensors, scale), None


def can_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether the C++ is written for such tensors."""
    of_cache = key.shape[0], key.shape[2]
    is_masked = mask.dtype == torch.bool and mask.shape == (of_cache[0], 1, query.shape[2], of_cache[1])
    is_bfloat16 = all(tensor.dtype == torch.bfloat16 for tensor in (query, key, value))
    is_read_in_order = all(tensor.stride(-1) == 1 for tensor in (query, key, value, mask))
    return (
        is_masked
        and is_bfloat16
        and is_read_in_order
        and query.shape[-1] == value.shape[-1]
        and not (query.shape[-1] % CHANNELS)
    )


@cache
def has_bits_of_sdpa() -> bool:
    """Whether PyTorch's attention sums up as ours does, on this CPU: tried once, on random numbers."""
    generator = torch.Generator().manual_seed(0)
    for num_slots in (3, 45, 530):
        query = torch.randn(1, 8, 1, 64, generator=generator).bfloat16()
        key, value = torch.randn(2, 1, 8, num_slots, 64, generator=generator).bfloat16()
        mask = torch.ones(1, 1, 1, num_slots, dtype=torch.bool)
        expected = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        if not torch.equal(bfloat16_attention()(query, key, value, mask, 64**-0.5), expected):
            return False
    return True


def bfloat16_attention() -> Any:
    """The operator query [A, H, Q, D], key and value [A, G, S, D], mask [A, 1, Q, S], scale -> [A, Q, H, D]."""

    def attend(table, query, key, value, mask, scale):  # type: ignore[no-untyped-def]
        (num_rows, num_heads, num_queries, num_channels), (_, num_key_heads, num_slots, _) = query.shape, key.shape
        result = query.new_empty(num_rows, num_queries, num_heads, num_channels)
        sizes = num_rows, num_heads, num_key_heads, num_queries, num_slots, num_channels
        strides = *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], mask.stride(0), mask.stride(2)
        addresses = (tensor.data_ptr() for tensor in (query, key, value, mask, result))
        known_kernel().bfloat16_attention(
            *addresses, (ctypes.c_int64 * 6)(*sizes), (ctypes.c_int64 * 11)(*strides), scale
        )
        return result

    def shape_only(query: torch.Tensor, *others: Any) -> torch.Tensor:
        return query.new_empty(query.transpose(1, 2).shape)

    takes = "Tensor query, Tensor key, Tensor value, Tensor mask, float scale"
    return operator("bfloat16_attention", takes, attend, shape_only)
