"""Attention of masked queries that share key heads, without a copy of the keys and values for each of them.

A sequences, Q queries, S slots, H heads, G of them to a key head, D channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "wavedraft_grouped"
LEFT_TO_SDPA = ("position_bias", "cache", "softcap")  # left to transformers' sdpa, whatever it does with them


def attend_grouped(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa [A, Q, H, D], where the G heads that share a key head are read as G times as many queries.

    transformers repeats every cached key and value G times where there is a mask: at 2048 slots a third of the time
    attention takes. (Dense attention to the prefix, merged with the masked corner by log-sum-exp, is slower than this
    on a CPU: `benchmarks/attention_forms.py`.)
    """
    num_groups = query.shape[1] // key.shape[1]
    has_more = kwargs.get("dropout") or any(kwargs.get(name) is not None for name in LEFT_TO_SDPA)
    is_masked = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4 and attention_mask.shape[1] == 1
    if num_groups == 1 or has_more or not is_masked:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    num_rows, num_heads, num_queries, _ = query.shape
    mask = attention_mask.expand(-1, num_groups, -1, -1).flatten(1, 2).unsqueeze(1)
    grouped = query.reshape(num_rows, key.shape[1], num_groups * num_queries, -1)
    states = nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, scale=kwargs.get("scaling")
    )
    return states.view(num_rows, num_heads, num_queries, -1).transpose(1, 2).contiguous(), None


def has_attention_interface(model: Any) -> bool:
    """Whether the model's attention is transformers' sdpa, reached through its attention interface."""
    return model.config._attn_implementation == "sdpa" and getattr(model, "_supports_attention_backend", False)


@contextmanager
def grouped_attention(model: Any) -> Iterator[None]:
    """Makes one forward, whose masks are made already, attend this way."""
    AttentionInterface.register(GROUPED, attend_grouped)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)  # for another thread's forward in the meantime
    model.config._attn_implementation = GROUPED
    try:
        yield
    finally:
        model.config._attn_implementation = "sdpa"
