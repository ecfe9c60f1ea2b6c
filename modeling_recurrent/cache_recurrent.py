"""Keys and values of a recurrent-depth model, preallocated and written in place.

B rows, T tokens of a call, S columns (token slots of a row), H key-value heads, D head width, N stored recurrences.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import Cache


@dataclass
class Window:
    """The tokens of one call: their positions, what they attend to, and where their keys and values are stored.

    `columns` are the cache columns of the T tokens: a slice if they are the same for every row, else a pair of index
    tensors (cache rows, columns), each [B, T] or broadcasting to it. One window serves the prelude, any number of core
    steps and the coda of the same tokens. Their inputs and outputs are on the window's device.
    """

    rotary: torch.Tensor  # [2, B, T, 1, 1, D], cosines and signed sines
    attention_mask: Any  # what the attention implementation takes: a tensor, a BlockMask or None
    attention_function: Callable
    cache: "RecurrentCache | None" = None
    columns: slice | tuple[torch.Tensor, torch.Tensor] | None = None
    kv_length: int = 0  # columns 0..kv_length-1 are read
    packing: "Packing | None" = None  # if the call's rows are single tokens of any cache rows
    attentions: dict[int, torch.Tensor] | None = None  # if requested, each layer's weights at its last recurrence
    elsewhere: "dict[torch.device, Window] | None" = None  # copies for layers on other devices

    @property
    def device(self) -> torch.device:
        """The decoder's device; layers may be on others."""
        return self.rotary.device

    def on(self, device: torch.device) -> "Window":
        """This window for a layer on `device`, copied there once."""
        if device == self.rotary.device:
            return self
        if self.elsewhere is None:
            self.elsewhere = {}
        if device not in self.elsewhere:
            mask, columns, packing = self.attention_mask, self.columns, self.packing
            self.elsewhere[device] = replace(
                self,
                rotary=self.rotary.to(device),
                attention_mask=None if mask is None else mask.to(device),
                columns=columns if not isinstance(columns, tuple) else (columns[0].to(device), columns[1].to(device)),
                packing=None if packing is None else packing.on(device),
                elsewhere=None,
            )
        return self.elsewhere[device]

    def at(self, recurrences: list[int]) -> "Window":
        """This packed window for one `core_step`, with token n at recurrence recurrences[n]."""
        assert self.packing is not None and self.cache is not None
        packing = self.packing.at(recurrences, self.cache.stored_recurrences, self.cache.device)
        return replace(self, packing=packing, elsewhere=None)


@dataclass
class Run:
    """Neighbouring tokens of a packed window in one cache row.

    If their planes rise in even steps, they read a view of the cache, else a gathered copy.
    """

    tokens: slice
    row: int
    planes: slice | torch.Tensor | None = None  # of core layers


@dataclass
class Packing:
    """The cache places of a packed window's N tokens, in runs of one cache row."""

    runs: list[Run]
    planes: torch.Tensor | None = None  # [N] of core layers; None for calls of the prelude or the coda alone

    @classmethod
    def of(cls, rows: list[int]) -> "Packing":
        """The packing of tokens in these cache rows."""
        ends = [n for n in range(1, len(rows)) if rows[n] != rows[n - 1]]
        bounds = itertools.pairwise([0, *ends, len(rows)])
        return cls([Run(slice(start, end), rows[start]) for start, end in bounds])

    def at(self, recurrences: list[int], num_planes: int, device: torch.device) -> "Packing":
        """The same tokens at these recurrences."""
        planes = [(recurrence - 1) % num_planes for recurrence in recurrences]
        on_device = torch.tensor(planes, device=device)
        runs = []
        for run in self.runs:
            own = planes[run.tokens]
            step = own[1] - own[0] if len(own) > 1 else 1
            is_even = step > 0 and own == list(range(own[0], own[0] + step * len(own), step))
            runs.append(replace(run, planes=slice(own[0], own[-1] + 1, step) if is_even else on_device[run.tokens]))
        return Packing(runs, on_device)

    def on(self, device: torch.device) -> "Packing":
        """The same for a layer on `device`."""
        planes = (run.planes.to(device) if isinstance(run.planes, torch.Tensor) else run.planes for run in self.runs)
        runs = [replace(run, planes=own) for run, own in zip(self.runs, planes, strict=True)]
        return Packing(runs, None if self.planes is None else self.planes.to(device))


class RecurrentCache(Cache):
    """One tensor [N, B, H, S, D] per layer for keys, and one for values; N is 1 for prelude and coda layers.

    Core layers keep the latest `stored_recurrences` recurrences of every token, recurrence i in plane (i-1) mod N:

    * `RecurrentCache.every_recurrence`: N = `num_recurrences`. A token at recurrence i reads the past at recurrence i,
      as in training. It takes (prelude + coda + N * core layers) * 2 * H * D values, 2.79 MB for Huginn-0125 in bf16
      at 32 recurrences.
    * `RecurrentCache.latest_only`: N = 1. A token reads the past as last written. It takes
      (prelude + coda + core layers) * 2 * H * D values, 169 kB for Huginn-0125 in bf16.

    `depth` is the number of recurrences that every token has run (None in an empty cache): with N > 1, no more can be
    read. Lengths are host integers, one per row, so reading one never waits for the device. Rolling back sets a
    shorter length: the columns beyond it are masked until the next call overwrites them. If a call needs more columns,
    the capacity at least doubles. A layer's tensors are on the device of its model's layer.
    """

    is_compileable = False

    def __init__(
        self,
        config: Any,
        batch_size: int,
        max_length: int,
        stored_recurrences: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        super().__init__(layers=[])
        if stored_recurrences < 1:
            raise ValueError(
                f"`stored_recurrences` must be at least 1, but is {stored_recurrences}: the core reads the keys and "
                f"values of at least its latest recurrence."
            )
        around = [1] * config.n_layers_in_prelude, [1] * config.n_layers_in_coda
        self.planes = around[0] + [stored_recurrences] * config.n_layers_in_recurrent_block + around[1]
        self.stored_recurrences = stored_recurrences
        self.capacity = max(1, max_length)
        shape = (batch_size, config.num_key_value_heads, self.capacity, config.head_dim)
        self.keys = [torch.zeros(planes, *shape, dtype=dtype, device=device) for planes in self.planes]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.device = self.keys[0].device  # the decoder's: layers may be on others
        self.lengths = [0] * batch_size
        self.depth: int | None = None

    @classmethod
    def every_recurrence(cls, config, batch_size, max_length, num_recurrences, dtype, device) -> "RecurrentCache":
        """A cache that stores all `num_recurrences` recurrences."""
        return cls(config, batch_size, max_length, num_recurrences, dtype, device)

    @classmethod
    def latest_only(cls, config, batch_size, max_length, dtype, device) -> "RecurrentCache":
        """A cache that stores only the latest recurrence."""
        return cls(config, batch_size, max_length, 1, dtype, device)

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self.keys[0].dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one row, over all layers."""
        return sum(2 * k.shape[0] * k.shape[2] * k.shape[4] * k.element_size() for k in self.keys)

    def write_and_read(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, recurrence: int, window: Window
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, H, T, D] keys and values, and return those the window may read, [B, H, kv_length, D].

        `recurrence` counts from 1, and is 1 for prelude and coda layers.
        """
        follow(self, layer, keys.device)
        plane = (recurrence - 1) % self.planes[layer]
        stored_keys, stored_values = self.keys[layer][plane], self.values[layer][plane]  # [B, H, S, D]
        if isinstance(window.columns, slice):
            stored_keys[:, :, window.columns] = keys
            stored_values[:, :, window.columns] = values
        else:
            assert window.columns is not None
            rows, columns = window.columns
            stored_keys[rows, :, columns] = keys.transpose(1, 2)
            stored_values[rows, :, columns] = values.transpose(1, 2)
        return stored_keys[:, :, : window.kv_length], stored_values[:, :, : window.kv_length]

    def write_packed(self, keys: torch.Tensor, values: torch.Tensor, layer: int, window: Window) -> None:
        """Store [N, H, 1, D] keys and values of a packed window's tokens, each at its own recurrence."""
        assert window.packing is not None and isinstance(window.columns, tuple)
        follow(self, layer, keys.device)
        rows, columns = (index[:, 0] for index in window.columns)
        planes = window.packing.planes if self.planes[layer] > 1 else 0
        self.keys[layer][planes, rows, :, columns] = keys[:, :, 0]
        self.values[layer][planes, rows, :, columns] = values[:, :, 0]

    def read_run(self, layer: int, run: Run, kv_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that the n tokens of a packed window's run may read, [n, H, kv_length, D]."""
        stored = self.keys[layer][:, run.row, :, :kv_length], self.values[layer][:, run.row, :, :kv_length]
        if self.planes[layer] > 1:
            return stored[0][run.planes], stored[1][run.planes]
        num_tokens = run.tokens.stop - run.tokens.start
        return stored[0].expand(num_tokens, -1, -1, -1), stored[1].expand(num_tokens, -1, -1, -1)

    def reserve(self, length: int) -> None:
        """Make room for `length` columns per row, at least doubling a smaller capacity."""
        if length <= self.capacity:
            return
        grown = max(length, 2 * self.capacity)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_zeros(*old.shape[:3], grown, old.shape[4])
                tensors[layer][:, :, :, : self.capacity] = old
        self.capacity = grown

    def roll_back(self, row: int, length: int) -> None:
        """Forget the columns of `row` from `length` on."""
        assert 0 <= length <= self.lengths[row], (row, length, self.lengths[row])
        self.lengths[row] = length

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows, in ascending order. Rows already in their place are not copied."""
        for place, row in enumerate(rows):
            if place != row:
                assert row > place, "rows are kept in ascending order"
                for tensor in (*self.keys, *self.values):
                    tensor[:, place] = tensor[:, row]
        self.keys = [tensor[:, : len(rows)] for tensor in self.keys]
        self.values = [tensor[:, : len(rows)] for tensor in self.values]
        self.lengths = [self.lengths[row] for row in rows]

    def note_depth(self, num_recurrences: int) -> None:
        """Record that tokens of `num_recurrences` recurrences were written."""
        self.depth = num_recurrences if self.depth is None else min(self.depth, num_recurrences)

    def row(self, row: int) -> list[torch.Tensor]:
        """A copy of one row: the keys, then the values, of each layer, [N, H, S, D]."""
        return [tensor[:, row].clone() for tensor in (*self.keys, *self.values)]

    def gather(self, columns: Sequence[Sequence[int]]) -> None:
        """Keep these columns of each row, moved to the left. Their number becomes its length."""
        for row, kept in enumerate(columns):
            if list(kept) != list(range(len(kept))):
                for tensor in (*self.keys, *self.values):
                    tensor[:, row, :, : len(kept)] = tensor[:, row][:, :, list(kept)]
        self.lengths = [len(kept) for kept in columns]

    def scatter(self, rows: Sequence[list[torch.Tensor]], columns: Sequence[Sequence[int]], length: int) -> None:
        """The inverse of `gather`: move the left columns of `rows` (see `row`) to these of `length` columns."""
        num_layers = len(self.planes)
        for layer, old in enumerate(self.keys):
            shape = (old.shape[0], len(rows), old.shape[2], length, old.shape[4])
            self.keys[layer], self.values[layer] = old.new_zeros(shape), old.new_zeros(shape)
        for place, (tensors, where) in enumerate(zip(rows, columns, strict=True)):
            for layer in range(num_layers):
                self.keys[layer][:, place, :, list(where)] = tensors[layer][:, :, : len(where)]
                self.values[layer][:, place, :, list(where)] = tensors[num_layers + layer][:, :, : len(where)]
        self.capacity = length
        self.lengths = [length] * len(rows)

    # What transformers' generate needs of a cache. All rows have one length there.

    def __len__(self) -> int:
        return len(self.planes)

    def __repr__(self) -> str:
        return f"RecurrentCache(planes={self.planes}, lengths={self.lengths}, capacity={self.capacity})"

    @property
    def is_initialized(self) -> bool:
        """Always: the tensors exist from the start."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops old columns."""
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        """No layer has a linear state, so `generate` of transformers 5.24 passes only new tokens to a forward."""
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        """Every layer stores its tokens."""
        return [False] * len(self)

    @property
    def is_croppable(self) -> bool:
        """Always: `crop` works."""
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in use, the same for every layer: the longest row."""
        return max(self.lengths, default=0)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The column of the next token."""
        return self.get_seq_length()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the capacity grows."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns the next `query_length` tokens read, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` columns of every row (negative, as in transformers)."""
        if tokens_to_remove > 0 or -tokens_to_remove > min(self.lengths):
            raise ValueError(
                f"`tokens_to_remove` must be between {-min(self.lengths)} (the shortest row, negative as in "
                f"transformers' own caches) and 0, but is {tokens_to_remove}."
            )
        self.lengths = [length + tokens_to_remove for length in self.lengths]

    def reset(self) -> None:
        """Forget all tokens, but keep the memory."""
        self.lengths = [0] * self.batch_size
        self.depth = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace row i by row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at `indices`, in that order."""
        self.keys = [tensor.index_select(1, indices.to(tensor.device)) for tensor in self.keys]
        self.values = [tensor.index_select(1, indices.to(tensor.device)) for tensor in self.values]
        self.lengths = [self.lengths[row] for row in indices.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))


def follow(cache: RecurrentCache, layer: int, device: torch.device) -> None:
    """Move a layer's tensors to the layer's device, at its first call."""
    if cache.keys[layer].device != device:
        cache.keys[layer], cache.values[layer] = cache.keys[layer].to(device), cache.values[layer].to(device)
