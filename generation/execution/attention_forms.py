"""Attention no dearer than the structured mask makes it: no copies for queries that share key heads, and over a prompt
no mask at all.

A sequences, Q queries, S slots, H heads, G of them to a key head, D channels.
"""

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

TILE, FEW_TILES = 64, 96  # queries of a tile; up to so many tiles products are no slower on an H200
LEFT_TO_SDPA = ("position_bias", "cache", "softcap")  # left to transformers' sdpa, whatever it does with them


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attention of a model that drafts, [A, Q, H, D] -> [A, Q, H, D]: the form of the mask says how.

    A mask of fewer rows than there are queries is `mask_over_prompt`; one that is added to scores is of
    `masks_of_groups`; any other is the structured mask, or transformers' own.
    """
    if isinstance(attention_mask, torch.Tensor):
        if attention_mask.shape[-2] < query.shape[2]:
            return attend_over_prompt(module, query, key, value, attention_mask.shape[-2], **kwargs)
        if attention_mask.is_floating_point():
            return attend_in_step(module, query, key, value, attention_mask, **kwargs)
    return attend_grouped(module, query, key, value, attention_mask, **kwargs)


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
    return states.reshape(num_rows, num_heads, num_queries, -1).transpose(1, 2).contiguous(), None


def mask_over_prompt(num_masks: int, num_queries: int, device: torch.device) -> torch.Tensor:
    """Stands for the structured mask of P tokens and one block of masks after them, nothing cached and nothing padded:
    its last rows [1, 1, K, Q], which see all; the tokens' are causal."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(1, 1, num_masks, num_queries)


def attend_in_step(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """The same under a mask of `masks_of_groups`. A GPU's attention kernels give each tile of queries to one
    multiprocessor, which reads all slots one after the other. Where there are fewer tiles than multiprocessors, two
    products and a softmax, in float32 between them, are quicker: `benchmarks/gpu_attention.py`."""
    num_rows, num_heads, num_queries, num_channels = query.shape
    num_key_heads = key.shape[1]
    num_groups = num_heads // num_key_heads
    has_more = kwargs.get("dropout") or any(kwargs.get(name) is not None for name in LEFT_TO_SDPA)
    if has_more or mask.shape[-2] != num_groups * num_queries:
        return attend_grouped(module, query, key, value, mask[..., :num_queries, :], **kwargs)
    scale = kwargs.get("scaling") or num_channels**-0.5
    grouped = query.reshape(num_rows, num_key_heads, num_groups * num_queries, num_channels)
    if num_rows * num_key_heads * -(-grouped.shape[2] // TILE) > FEW_TILES:
        states = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    else:
        scores = float_product(grouped.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).unflatten(0, grouped.shape[:2])
        probs = (scores * scale + mask).softmax(dim=-1).to(value.dtype)
        states = torch.matmul(probs, value)
    return states.reshape(num_rows, num_heads, num_queries, num_channels).transpose(1, 2).contiguous(), None


def float_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[n, Q, D] times [n, D, S] in float32 (in float64 of such), which a GPU sums in anyway."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(left, right, out_dtype=torch.float32)
    dtype = torch.promote_types(left.dtype, torch.float32)
    return torch.bmm(left.to(dtype), right.to(dtype))


def attend_over_prompt(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_masks: int, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa, of the tokens as plain decoding reads them, and of the masks behind them; neither has a mask,
    which would cost sdpa its quick way over long prompts."""
    kwargs.pop("is_causal", None)
    num_tokens = query.shape[2] - num_masks
    tokens = (states[:, :, :num_tokens] for states in (query, key, value))
    of_tokens, _ = sdpa_attention_forward(module, *tokens, None, is_causal=True, **kwargs)
    of_masks, _ = sdpa_attention_forward(module, query[:, :, num_tokens:], key, value, None, is_causal=False, **kwargs)
    return torch.cat([of_tokens, of_masks], dim=1), None
