"""Attention under the structured mask, without copies for query groups and without a mask over a prompt.

A sequences, Q queries, S slots, H heads, G heads per key head, D channels.
"""

from collections.abc import Callable, Iterator
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
from .compiled_layers import swapped
from .packed_linear import PackedLinear

TILE, FEW_TILES = 64, 96
LEFT_TO_SDPA = ("position_bias", "cache", "softcap")  # arguments that only transformers' sdpa handles


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of a drafting model, [A, Q, H, D] -> [A, Q, H, D], chosen by the form of the mask.

    A mask with fewer rows than queries is from `mask_over_prompt`. A floating-point mask is from `masks_of_step`. Any
    other mask is the structured mask, or transformers' own.
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
    """transformers' sdpa [A, Q, H, D], with the G heads of a key head reshaped to G times as many queries.

    With a mask, transformers repeats keys and values G times, which takes a third of attention's time at 2048 slots
    (`benchmarks/attention_forms.py`).
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
    """A short form of the structured mask, for a prompt without cache or padding and one block of masks: only the
    mask rows [1, 1, K, Q], which see all. Token rows are causal."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(1, 1, num_masks, num_queries)


def attend_in_step(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """`attend_grouped` under a mask of `masks_of_step` for groups. A GPU's attention kernel runs each tile of queries
    on one multiprocessor. With few tiles, two products with a float32 softmax between them are faster: with up to 96
    tiles of 64 queries on an H200 (`benchmarks/gpu_attention.py`)."""
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
    """[n, Q, D] times [n, D, S] in float32, or in float64 for float64 inputs."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(left, right, out_dtype=torch.float32)
    dtype = torch.promote_types(left.dtype, torch.float32)
    return torch.bmm(left.to(dtype), right.to(dtype))


def attend_over_prompt(
    module: Any, query: Tensor, key: Tensor, value: Tensor, num_masks: int, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa for the tokens, as in plain decoding, and for the masks after them. Neither call has an
    attention mask, so sdpa can use its fast kernel."""
    kwargs.pop("is_causal", None)
    num_tokens = query.shape[2] - num_masks
    tokens = (states[:, :, :num_tokens] for states in (query, key, value))
    of_tokens, _ = sdpa_attention_forward(module, *tokens, None, is_causal=True, **kwargs)
    of_masks, _ = sdpa_attention_forward(module, query[:, :, num_tokens:], key, value, None, is_causal=False, **kwargs)
    return torch.cat([of_tokens, of_masks], dim=1), None


NUM_BELIEVED = 8


@dataclass(frozen=True)
class Spans:
    """The slots that clean tokens see: token i of row b sees the slots up to its own, `cached[b] + i`.

    Attributes:
        is_real_slot: [A, at least all slots], False for padding; None for a batch without padding.
    """

    cached: list[int]
    num_clean: int
    is_real_slot: Tensor | None
    has_window: bool


_spans: ContextVar[Spans | None] = ContextVar("spans", default=None)


def attend_token_by_token(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa for each clean token, and `attend_grouped` for all masks: [A, Q, H, D]. Without spans this is
    the forward of a prompt, or of another thread."""
    spans = _spans.get()
    if spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    if spans.has_window and "sliding_window" not in kwargs:
        raise ValueError(
            f"{type(module).__name__} does not pass its window width to its attention function, so `exact` cannot "
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
        states = torch.cat([states, attend_grouped(module, masks, key, value, mask, **kwargs)[0]], dim=1)
    return states, None


@dataclass
class Rounding:
    """The rounding of one model on one device in one dtype, measured once. After `NUM_BELIEVED` tokens whose single
    forward equals the wide one bit for bit, the wide forward is trusted.

    Attributes:
        dependent: shapes of linear layers whose result for a token depends on the other tokens; and whether it is the
            stock layer's, for a token alone and for many.
        num_equal: tokens whose single forward gave the wide forward's bits; None after a difference.
    """

    dependent: dict[torch.Size, bool] = field(default_factory=dict)
    num_equal: int | None = 0

    def compare(self, alone: Tensor, wide: Tensor) -> None:
        if self.num_equal is not None:
            self.num_equal = self.num_equal + 1 if torch.equal(alone, wide) else None

    @property
    def is_believed(self) -> bool:
        return (self.num_equal or 0) >= NUM_BELIEVED


def rounding_of(model: Any, is_packed: bool = False) -> Rounding:
    """Tests each shape of linear layer on random tokens once, in the form that the model has now. Only on a CPU in half
    precision: elsewhere most shapes depend on width, and products token by token cost more than plain decoding."""
    key = model.dtype, model.device, attention_of(model.config), is_packed
    roundings = kept_with(model).roundings
    if key not in roundings:
        roundings[key] = Rounding()
        if model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16):
            layers = {layer.weight.shape: layer for layer in linear_layers(model)}
            found = {shape: rounds_as_stock(layer) for shape, layer in layers.items()}
            roundings[key].dependent = {shape: is_stock for shape, is_stock in found.items() if is_stock is not None}
    return roundings[key]


def linear_layers(model: nn.Module) -> list[nn.Linear | PackedLinear]:
    """The linear layers that clean tokens pass through, without an adapter's layers, which see only masks."""
    named = model.named_modules()
    return [module for name, module in named if isinstance(module, nn.Linear | PackedLinear) and ".lora_" not in name]


@torch.no_grad()
def rounds_as_stock(layer: nn.Linear | PackedLinear) -> bool | None:
    """Whether a layer's results for one token, and for many, are the stock layer's. None: all four are the same."""
    num_tokens = 64 if layer.weight.numel() < 2**22 else 16
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(num_tokens, layer.in_features, generator=generator).to(layer.weight.dtype)
    alone, together = (
        torch.cat([stock_product(layer, token) for token in tokens.split(1)]),
        stock_product(layer, tokens),
    )
    mine = torch.cat([layer.forward(token) for token in tokens.split(1)])
    is_stock = torch.equal(mine, alone) and torch.equal(layer.forward(tokens), together)
    return None if is_stock and torch.equal(alone, together) else is_stock


def stock_product(layer: nn.Linear | PackedLinear, x: Tensor) -> Tensor:
    """[..., D] -> [..., E], as `nn.Linear` multiplies, which takes ten times as long for a slice [B, 1, D]."""
    of_rows = functional.linear(x.flatten(0, -2), layer.weight, layer.bias)
    return of_rows.unflatten(0, x.shape[:-1])


@contextmanager
def products_token_by_token(model: nn.Module, rounding: Rounding) -> Iterator[None]:
    """Makes linear layers that depend on width compute each clean token separately, inside the context."""
    known = [(layer, rounding.dependent.get(layer.weight.shape)) for layer in linear_layers(model)]
    dependent = [(layer, is_stock) for layer, is_stock in known if is_stock is not None]
    with swapped([(layer.__dict__, *token_by_token(layer, is_stock)) for layer, is_stock in dependent]):
        yield


def token_by_token(layer: nn.Linear | PackedLinear, is_stock: bool) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The name of a layer's product [B, Q, D] -> [B, Q, E], and one that reads prompts, and token i of all rows, with
    the stock layer's rounding. `is_stock`: `rounds_as_stock`. A gated layer calls `both` of its packed base, and reads
    the reduced columns of masks alone."""
    is_packed, reducer = isinstance(layer, PackedLinear), getattr(layer, "reducer", None)
    name = "both" if is_packed else "forward"
    product = getattr(layer, name)
    num_reduced = 0 if reducer is None else reducer.shape[1]

    def of_clean(x: Tensor) -> Tensor:
        if is_packed and is_stock:
            return product(x)
        return functional.pad(stock_product(layer, x), (0, num_reduced))

    def separate(x: Tensor) -> Tensor:
        spans = _spans.get()
        if spans is None:
            return of_clean(x)
        clean, masks = x[:, : spans.num_clean], x[:, spans.num_clean :]
        tokens = [of_clean(token) for token in clean.split(1, dim=1)]
        return torch.cat([*tokens, product(masks)] if masks.shape[1] else tokens, dim=1)

    return name, separate


@contextmanager
def clean_tokens_alone(spans: Spans) -> Iterator[None]:
    """Makes one forward of this thread compute its clean tokens one by one."""
    token = _spans.set(spans)
    try:
        yield
    finally:
        _spans.reset(token)
