"""A wide forward whose clean tokens leave, bit for bit, what each would leave in a forward of its own.

In half precision two kernels tell a token read beside others from one read alone: attention, which sums the same keys
in another order when it is given more of them, and matrix products that split their inner dimension. Both are called
token by token here, in the very call plain decoding would make. All else works on each token by itself.

A sequences, N clean tokens, Q queries, H heads, D channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..kept_with_model import kept_with
from ..stock_model import attention_of

NUM_BELIEVED = 8  # tokens read alone that were bit for bit what the wide forward gave, before it is believed


@dataclass(frozen=True)
class Spans:
    """What the clean tokens of a forward see: token i of row b the slots up to `cached[b] + i`, its own.

    Attributes:
        is_real_slot: [A, at least all slots], False for padding; None where the batch has none.
    """

    cached: list[int]
    num_clean: int
    is_real_slot: torch.Tensor | None
    has_window: bool


_spans: ContextVar[Spans | None] = ContextVar("spans", default=None)


def attend_token_by_token(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
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

    def compare(self, alone: torch.Tensor, wide: torch.Tensor) -> None:
        if self.num_equal is not None:
            self.num_equal = self.num_equal + 1 if torch.equal(alone, wide) else None

    @property
    def is_believed(self) -> bool:
        return (self.num_equal or 0) >= NUM_BELIEVED


def rounding_of(model: Any) -> Rounding:
    """Tries each shape of linear layer on random tokens the first time; on a CPU in half precision only: elsewhere
    hardly any shape is independent, and token by token they would cost more than plain decoding does."""
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
    alone = [nn.functional.linear(tokens[i : i + 1], layer.weight, layer.bias) for i in range(num_tokens)]
    return not torch.equal(nn.functional.linear(tokens, layer.weight, layer.bias), torch.cat(alone))


@contextmanager
def products_token_by_token(model: nn.Module, rounding: Rounding) -> Iterator[None]:
    """While this is open, the linear layers that need it compute each clean token of a forward by itself."""

    def correct(layer: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        spans = _spans.get()
        for i in range(0 if spans is None else spans.num_clean):  # all rows together, as plain decoding multiplies them
            output[:, i : i + 1] = nn.functional.linear(args[0][:, i : i + 1], layer.weight, layer.bias)
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
