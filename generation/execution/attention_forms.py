"""Attention under the structured mask: no copies for queries that share key heads, no mask over a prompt.

A sequences, Q queries, S slots, H heads, G of them to a key head, D channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..kept_with_model import kept_with
from ..stock_model import attention_of

TILE, FEW_TILES = 64, 96  # queries of a tile; up to so many tiles products are no slower on an H200
LEFT_TO_SDPA = ("position_bias", "cache", "softcap")  # left to transformers' sdpa, whatever it does with them


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of a model that drafts, [A, Q, H, D] -> [A, Q, H, D]: the form of the mask says how.

    A mask of fewer rows than queries is `mask_over_prompt`; one that is added to scores is of `masks_of_step`; any
    other is the structured mask, or transformers' own.
    """
    if isinstance(attention_mask, Tensor):
        if attention_mask.shape[-2] < query.shape[2]:
            return attend_over_prompt(module, query, key, value, attention_mask.shape[-2], **kwargs)
        if attention_mask.is_floating_point():
            return attend_in_step(module, query, key, value, attention_mask, **kwargs)
    return attend_grouped(module, query, key, value, attention_mask, **kwargs)


def attend_grouped(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa [A, Q, H, D], where the G heads that share a key head are read as G times as many queries.

    With a mask, transformers repeats keys and values G times: at 2048 slots a third of attention's time. (Dense
    attention to the prefix, merged by log-sum-exp, is slower on a CPU: `benchmarks/attention_forms.py`.)
    """
    num_groups = query.shape[1] // key.shape[1]
    is_masked = isinstance(attention_mask, Tensor) and attention_mask.dim() == 4 and attention_mask.shape[1] == 1
    if num_groups == 1 or is_left_to_sdpa(kwargs) or not is_masked:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    mask = attention_mask.expand(-1, num_groups, -1, -1).flatten(1, 2).unsqueeze(1)
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[3])
    states = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=kwargs.get("scaling"))
    return states.reshape(*query.shape[:3], -1).transpose(1, 2).contiguous(), None


def is_left_to_sdpa(kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("dropout")) or any(kwargs.get(name) is not None for name in LEFT_TO_SDPA)


def mask_over_prompt(num_masks: int, num_queries: int, device: torch.device) -> Tensor:
    """Stands for the structured mask of a prompt, nothing cached or padded, and one block of masks: its last rows
    [1, 1, K, Q], which see all; the tokens' are causal."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(1, 1, num_masks, num_queries)


def attend_in_step(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """The same under a mask of `masks_of_step` for groups. A GPU's attention kernels give each tile of queries to one
    multiprocessor. Where there are fewer tiles, two products and a softmax, in float32 between them, are quicker:
    `benchmarks/gpu_attention.py`."""
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[3])
    if is_left_to_sdpa(kwargs) or mask.shape[-2] != grouped.shape[2]:
        return attend_grouped(module, query, key, value, mask[..., : query.shape[2], :], **kwargs)
    scale = kwargs.get("scaling") or query.shape[3] ** -0.5
    if len(query) * key.shape[1] * -(-grouped.shape[2] // TILE) > FEW_TILES:
        states = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    else:
        scores = float_product(grouped.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).unflatten(0, grouped.shape[:2])
        probs = (scores * scale + mask).softmax(dim=-1).to(value.dtype)
        states = torch.matmul(probs, value)
    return states.reshape(*query.shape[:3], -1).transpose(1, 2).contiguous(), None


def float_product(left: Tensor, right: Tensor) -> Tensor:
    """[n, Q, D] times [n, D, S] in float32, or float64 of such."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(left, right, out_dtype=torch.float32)
    dtype = torch.promote_types(left.dtype, torch.float32)
    return torch.bmm(left.to(dtype), right.to(dtype))


def attend_over_prompt(
    module: Any, query: Tensor, key: Tensor, value: Tensor, num_masks: int, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa, of the tokens as plain decoding reads them, and of the masks after them. Neither has a mask,
    which would cost sdpa its quick way."""
    kwargs.pop("is_causal", None)
    num_tokens = query.shape[2] - num_masks
    tokens = (states[:, :, :num_tokens] for states in (query, key, value))
    of_tokens, _ = sdpa_attention_forward(module, *tokens, None, is_causal=True, **kwargs)
    of_masks, _ = sdpa_attention_forward(module, query[:, :, num_tokens:], key, value, None, is_causal=False, **kwargs)
    return torch.cat([of_tokens, of_masks], dim=1), None


NUM_BELIEVED = 8  # tokens read alone that were bit for bit what the wide forward gave, before it is believed


@dataclass(frozen=True)
class Spans:
    """What the clean tokens of a forward see: token i of row b the slots up to `cached[b] + i`, its own.

    Attributes:
        is_real_slot: [A, at least all slots], False for padding; None where the batch has none.
    """

    cached: list[int]
    num_clean: int
    is_real_slot: Tensor | None
    has_window: bool


_spans: ContextVar[Spans | None] = ContextVar("spans", default=None)


def attend_token_by_token(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa, once for each clean token and once for all masks: [A, Q, H, D]."""
    spans = _spans.get()
    if spans is None:  # a prompt's forward, or another thread's
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    if spans.has_window and "sliding_window" not in kwargs:
        raise ValueError(
            f"{type(module).__name__} does not tell its attention function how wide its window is, so `exact` cannot "
            "call it token by token. Load the model with attn_implementation='eager', or leave out `exact`."
        )
    tokens = []
    for row, cached in enumerate(spans.cached):
        for i in range(spans.num_clean):
            stop = cached + i + 1
            start = 0 if window is None else max(0, stop - window)
            seen = slice(row, row + 1), slice(None), slice(start, stop)
            mask = None
            if spans.is_real_slot is not None:
                mask = spans.is_real_slot[row, start:stop].to(key.device).view(1, 1, 1, -1)
            token = query[row : row + 1, :, i : i + 1]
            tokens.append(sdpa_attention_forward(module, token, key[seen], value[seen], mask, **kwargs)[0])
    states = torch.cat(tokens, dim=1).view(len(spans.cached), spans.num_clean, *tokens[0].shape[2:])
    if query.shape[2] > spans.num_clean:
        masks, mask = query[:, :, spans.num_clean :], attention_mask[:, :, spans.num_clean :]
        states = torch.cat([states, sdpa_attention_forward(module, masks, key, value, mask, **kwargs)[0]], dim=1)
    return states, None


@dataclass
class Rounding:
    """How one model rounds on one device in one dtype, found out once.

    Attributes:
        dependent: shapes of the linear layers that give a token other bits beside others than alone.
        num_equal: tokens read alone since that gave the wide forward's bits; None once one did not.
    """

    dependent: set[torch.Size] = field(default_factory=set)
    num_equal: int | None = 0

    def compare(self, alone: Tensor, wide: Tensor) -> None:
        if self.num_equal is not None:
            self.num_equal = self.num_equal + 1 if torch.equal(alone, wide) else None

    @property
    def is_believed(self) -> bool:
        return (self.num_equal or 0) >= NUM_BELIEVED


def rounding_of(model: Any) -> Rounding:
    """Tries each shape of linear layer on random tokens the first time. Only on a CPU in half precision: elsewhere
    hardly any shape is independent, and token by token they cost more than plain decoding."""
    key = model.dtype, model.device, attention_of(model.config)
    known = kept_with(model).roundings
    if key not in known:
        known[key] = Rounding()
        if model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16):
            layers = {layer.weight.shape: layer for layer in linear_layers(model)}
            known[key].dependent = {shape for shape, layer in layers.items() if depends_on_width(layer)}
    return known[key]


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """All that clean tokens pass: an adapter's own layers see masks only."""
    named = model.named_modules()
    return [module for name, module in named if isinstance(module, nn.Linear) and ".lora_" not in name]


@torch.no_grad()
def depends_on_width(layer: nn.Linear) -> bool:
    num_tokens = 64 if layer.weight.numel() < 2**22 else 16
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(num_tokens, layer.in_features, generator=generator).to(layer.weight.dtype)
    alone = [functional.linear(tokens[i : i + 1], layer.weight, layer.bias) for i in range(num_tokens)]
    return not torch.equal(functional.linear(tokens, layer.weight, layer.bias), torch.cat(alone))


@contextmanager
def products_token_by_token(model: nn.Module, rounding: Rounding) -> Iterator[None]:
    """While this is open, linear layers that depend on width compute each clean token by itself."""

    def correct(layer: Any, args: Any, output: Tensor) -> Tensor:
        spans = _spans.get()
        for i in range(0 if spans is None else spans.num_clean):  # all rows together, as plain decoding multiplies them
            output[:, i : i + 1] = functional.linear(args[0][:, i : i + 1], layer.weight, layer.bias)
        return output

    layers = [layer for layer in linear_layers(model) if layer.weight.shape in rounding.dependent]
    handles = [layer.register_forward_hook(correct) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def clean_tokens_alone(spans: Spans) -> Iterator[None]:
    """Makes one forward of this thread treat its clean tokens one by one."""
    token = _spans.set(spans)
    try:
        yield
    finally:
        _spans.reset(token)
