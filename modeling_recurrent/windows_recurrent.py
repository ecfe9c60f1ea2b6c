"""Windows: which tokens a call of a recurrent-depth model works on, and how these attend.

B rows, T tokens, H heads, D head width, S columns of the cache.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..generation.recurrent.wavefront import wavefront_step
from ..generation.stock_model import attend_by, attention_of, device_of
from .cache_recurrent import Packing, RecurrentCache, Window

# On a CPU a token rounds otherwise beside others than alone: products of one to three tokens sum in another order than
# of more; attention of a number of queries that is no multiple of 4, or of keys that is none of 16, in another than of
# others, and of more than 192 keys until there are 384. A wavefront filled up to such multiples gives each row the bits
# it has alone, in float32. (Measured on products of 24 to 5280 channels and up to 2048 tokens, by one and two threads.)
FILL, FILL_KEYS, MANY_KEYS, FILL_MANY_KEYS = 4, 16, 192, 512


def filled(width: int) -> int:
    return -(-width // FILL) * FILL


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: Window, recurrence: int
) -> torch.Tensor:
    """[B, H, T, D] queries over their own and the cached keys and values ([B, key-value heads, T, D]) to [B, T, H * D].

    `module` has the `config`, the `layer_idx` (counted through prelude, core and coda) and the `scaling`.
    """
    function, mask = window.attention_function, window.attention_mask
    options = {"scaling": module.scaling, "dropout": 0.0}
    packing = window.packing
    if packing is not None:
        assert window.cache is not None
        window.cache.write_packed(key, value, module.layer_idx, window)
        read = [window.cache.read_run(module.layer_idx, run, window.kv_length) for run in packing.runs]
        if mask is None or isinstance(mask, torch.Tensor):  # run by run, so that what is read is not copied
            masks = [mask if mask is None else mask[run.tokens] for run in packing.runs]
            runs = zip(packing.runs, read, masks, strict=True)
            mixed = [function(module, query[run.tokens], *seen, own, **options)[0] for run, seen, own in runs]
            return torch.cat(mixed).flatten(2)
        key, value = (torch.cat(tensors) for tensors in zip(*read, strict=True))  # a BlockMask is of all tokens
    elif window.cache is not None:
        key, value = window.cache.write_and_read(key, value, module.layer_idx, recurrence, window)
    mixed, weights = function(module, query, key, value, mask, **options)
    if window.attentions is not None:
        window.attentions[module.layer_idx] = weights
    return mixed.flatten(2)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the implementation named "eager", which also returns its weights."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class RecurrentWindows(nn.Module):
    """Makes the windows that the three parts of a recurrent-depth model are called on."""

    config: Any

    def rotary_at(self, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the model's attention rotates queries and keys by at positions [B, T], for states of `dtype`."""
        raise NotImplementedError

    def core_steps(
        self, latent_states: torch.Tensor, input_embeds: torch.Tensor, window: Any, num_steps: int
    ) -> torch.Tensor:
        """s_n of s_0 and e, both [B, T, E], n being `num_steps`."""
        for recurrence in range(1, num_steps + 1):
            latent_states = self.core_step(latent_states, input_embeds, window, recurrence)  # type: ignore[operator]
        return latent_states

    def wavefront_step(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """`generation.recurrent.wavefront.wavefront_step`."""
        return wavefront_step(self, *args)

    def padded_width(self, width: int, device: torch.device) -> int:
        """The width a wavefront is computed at: the next power of two on an accelerator, where repeating shapes are
        worth more than the arithmetic; on the CPU, where arithmetic is what costs, `filled_width`."""
        return filled(width) if device.type == "cpu" else 1 << (width - 1).bit_length()

    def filled_width(self, width: int) -> int:
        """Tokens of a row to compute so that each comes out as it would beside others: see `FILL`."""
        return filled(width) if device_of(self).type == "cpu" else width

    def padded_window(
        self,
        input_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: RecurrentCache | None,
        keeps_attentions: bool = False,
    ) -> Window:
        """The next T columns of every row, [B, T, ...] giving the shape; padding is told by a 2D (or a 4D) mask.

        Attentions are kept by attention written out, whatever the implementation: no other holds the weights.
        """
        length = input_embeds.shape[1]
        start = cache.get_seq_length() if cache is not None else 0
        config, function = self.config, self._attention_function()
        attentions: dict[int, torch.Tensor] | None = None
        if keeps_attentions:
            config, function, attentions = copy.copy(config), eager_attention, {}
            attend_by(config, "eager")
        mask = create_causal_mask(config, input_embeds, attention_mask, cache, position_ids)
        if cache is not None:
            cache.reserve(start + length)
        rotary = self.rotary_at(position_ids, input_embeds.dtype)
        columns = slice(start, start + length)
        return Window(rotary, mask, function, cache, columns, start + length, attentions=attentions)

    def filled_window(self, starts: list[int], length: int, cache: RecurrentCache) -> Window:
        """`window_at` that reads so many columns that their number does not tell in the result: see `FILL`."""
        kv_length = max(starts) + length
        if cache.device.type == "cpu":
            multiple = FILL_KEYS if kv_length <= MANY_KEYS else FILL_MANY_KEYS
            kv_length = -(-kv_length // multiple) * multiple
        return self.window_at(starts, length, cache, kv_length)

    def window_at(self, starts: list[int], length: int, cache: RecurrentCache, kv_length: int | None = None) -> Window:
        """`length` tokens of each cache row from position starts[row] on; rows are unpadded: column is position.

        `kv_length` columns are read: those up to the last token, or more.
        """
        device = cache.device
        position_ids = torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
        kv_length = kv_length or max(starts) + length
        cache.reserve(kv_length)
        rotary = self.rotary_at(position_ids, cache.dtype)
        if min(starts) == max(starts):
            how = self._attention(position_ids, kv_length, cache.dtype, starts[0])
            return Window(rotary, *how, cache, slice(starts[0], starts[0] + length), kv_length)
        rows = torch.arange(len(starts), device=device)[:, None]
        how = self._attention(position_ids, kv_length, cache.dtype)
        return Window(rotary, *how, cache, (rows, position_ids), kv_length)

    def packed_window(self, rows: list[int], positions: list[int], cache: RecurrentCache) -> Window:
        """N single tokens, [N, 1] in every call: token n stands at positions[n] of cache row rows[n].

        For the prelude and the coda; `Window.at` gives that of a `core_step`.
        """
        device = cache.device
        index = torch.tensor([rows, positions], device=device)[:, :, None]  # [2, N, 1]
        kv_length = max(positions) + 1
        cache.reserve(kv_length)
        how: tuple[Any, Callable] = (None, self._attention_function())
        if min(positions) < max(positions):
            how = self._attention(index[1], kv_length, cache.dtype)
        rotary = self.rotary_at(index[1], cache.dtype)
        return Window(rotary, *how, cache, (index[0], index[1]), kv_length, Packing.of(rows))

    def _attention_function(self) -> Callable:
        return ALL_ATTENTION_FUNCTIONS.get_interface(attention_of(self.config), eager_attention)

    def _attention(
        self, position_ids: torch.Tensor, kv_length: int, dtype: torch.dtype, start: int | None = None
    ) -> tuple[Any, Callable]:
        """What lets tokens at [B, T] positions see the columns up to their own, and the function that attends.

        Args:
            start: where all rows begin there.
        """
        implementation = attention_of(self.config)  # a config takes its time to answer
        mask = self._mask(implementation, position_ids, kv_length, dtype, start)
        return mask, ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)

    def _mask(
        self, implementation: str, position_ids: torch.Tensor, kv_length: int, dtype: torch.dtype, start: int | None
    ) -> Any:
        num_rows, length = position_ids.shape
        if "flash" in implementation and start is None:
            raise ValueError(
                f"`attn_implementation` must be 'sdpa', 'eager' or 'flex_attention' to decode rows of different length "
                f"or depth in one call, but is {implementation!r}, which knows no masks. "
                f"Call `model.set_attn_implementation('sdpa')`, or give one row at a time."
            )
        if implementation in ("sdpa", "eager") and (start != 0 or kv_length > length):  # a wavefront's: by hand
            if length == 1 and start is not None:
                return None
            columns = torch.arange(kv_length, device=position_ids.device)
            is_hidden = columns > position_ids[: 1 if start is not None else None, None, :, None]
            mask = torch.zeros(is_hidden.shape, dtype=dtype, device=position_ids.device)
            return mask.masked_fill_(is_hidden, -torch.inf)
        is_seen = causal_mask_function if start is not None else lambda b, head, q, column: column <= position_ids[b, q]
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=num_rows,
            q_length=length,
            kv_length=kv_length,
            q_offset=start or 0,
            mask_function=is_seen,
            attention_mask=None,
            allow_is_causal_skip=start is not None,
            dtype=dtype,
            device=position_ids.device,
            config=self.config,
            use_vmap=False,
        )


def positions_of(attention_mask: torch.Tensor | None, embeds: torch.Tensor, cache: Cache | None) -> torch.Tensor:
    """Position of each of the next T tokens: columns from the left, padding not counted. [B, T] or [1, T]."""
    length = embeds.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    start = cache.get_seq_length() if cache is not None else 0
    return torch.arange(start, start + length, device=embeds.device)[None]


def check_positions(config: Any, position_ids: torch.Tensor, cache: Cache | None) -> None:
    """Raises where a position is beyond those the checkpoint was trained for."""
    past = cache.get_seq_length() if cache is not None else 0
    if past + position_ids.shape[1] > config.block_size and position_ids.max() >= config.block_size:
        raise ValueError(
            f"Positions must be below {config.block_size}, the length this checkpoint was trained for "
            f"(`config.block_size`), but reach {int(position_ids.max())}. Shorten the input."
        )
