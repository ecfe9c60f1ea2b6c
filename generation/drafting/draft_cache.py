"""Keys and values at slots of their own per row, so that rejecting a draft costs nothing.

B sequences, A of them unfinished, H key heads, C slots, Q queries, D channels a head.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

FEWEST_SLOTS = 256  # of a cache that never grows


class DraftCacheLayer(CacheLayerMixin):
    """One layer's keys and values, [B, H, C, D], written in place at the slots the cache points to."""

    def __init__(self, cache: "DraftCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.keys.shape[2] and not self.cache.max_length and key_states.shape[2] == self.cache.num_slots:
            self.keys, self.values = key_states, value_states  # a prompt's, kept as they come
            return key_states, value_states
        self.reserve(self.cache.num_slots)
        num_queries = key_states.shape[2]  # fewer than announced, where the masks are done already
        if (first := self.cache.first_slot) is not None:
            self.keys[:, :, first : first + num_queries] = key_states
            self.values[:, :, first : first + num_queries] = value_states
        else:
            rows, slots = self.cache.write_index(key_states.device)
            self.keys[rows, :, slots[:, :num_queries]] = key_states.transpose(1, 2)
            self.values[rows, :, slots[:, :num_queries]] = value_states.transpose(1, 2)
        return self.keys[:, :, : self.cache.num_slots], self.values[:, :, : self.cache.num_slots]

    def reserve(self, num_slots: int) -> None:
        """Makes room for `num_slots`, growing by half so that the copies stay rare. Unused slots are zero: an
        invisible key may be anything finite."""
        capacity = self.keys.shape[2]
        if num_slots > capacity:
            capacity = max(num_slots, capacity + capacity // 2)
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : old.shape[2]] = old
                setattr(self, name, new)

    def get_seq_length(self) -> int:
        return self.cache.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.max_length + query_length, 0

    def get_max_length(self) -> int:
        return -1


class DraftCache(Cache):
    """A cache whose rows have lengths of their own.

    A forward of Q queries writes slots `lengths[b] .. lengths[b] + Q - 1` of row b. Accepting `a` tokens adds `a` to
    the row's length. The keys of rejected tokens and of masks stand after it, and the next forward overwrites them.

    Attributes:
        lengths: [B] slots in use when the forward under way began, on the model's device.
        min_length, max_length: the shortest and the longest row's length, known to the host without a sync.
        is_step: whether every forward has one shape, as over a static cache.
        num_slots: slots visible in the forward under way: `max_length` + Q.
        first_slot: where every row writes in the forward under way, if that is one slot: a slice is then written, in
            half the time an index takes. None where rows differ.
    """

    def __init__(self, batch_size: int, num_layers: int, device: torch.device):
        super().__init__(layers=[DraftCacheLayer(self) for _ in range(num_layers)])
        self.device = device
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.is_step = False
        self.max_length = self.min_length = 0
        self.num_slots = 0
        self.first_slot: int | None = None

    def take_over(self, cache: DynamicCache) -> None:
        """Begins with the keys and values of a conversation's earlier turns (copied: the original is untouched)."""
        length = int(cache.get_seq_length())
        self.know_lengths([length])
        for layer, past in zip(self.layers, cache.layers, strict=False):
            layer.lazy_initialization(past.keys, past.values)
            layer.keys, layer.values = past.keys[:, :, :length].clone(), past.values[:, :, :length].clone()

    def row(self, place: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One row's keys and values of each layer, [H, length, D], as tensors of their own."""
        return [
            (layer.keys[place, :, :length].clone(), layer.values[place, :, :length].clone()) for layer in self.layers
        ]

    def view_of_row(self, place: int, length: int) -> "DraftCache":
        """The first `length` slots of one row as a cache of its own, over the same memory."""
        view = DraftCache(1, len(self.layers), self.device)
        view.know_lengths([length])
        for mine, layer in zip(view.layers, self.layers, strict=True):
            mine.lazy_initialization(layer.keys, layer.values)
            mine.keys, mine.values = layer.keys[place : place + 1], layer.values[place : place + 1]
        return view

    def begin_forward(self, lengths: torch.Tensor, num_queries: int) -> None:
        """Points each row's next `num_queries` writes at the slots after its first `lengths` [B]."""
        self.lengths = lengths
        self._index: tuple[torch.Tensor, torch.Tensor] | None = None
        self._num_queries = num_queries
        self.num_slots = self.max_length + num_queries
        self.first_slot = self.max_length if self.max_length == self.min_length else None

    def write_index(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [B, 1] and slots [B, Q] that the forward under way writes."""
        if self._index is None:
            slots = self.lengths[:, None] + torch.arange(self._num_queries, device=self.device)
            self._index = torch.arange(len(self.lengths), device=self.device)[:, None], slots
        rows, slots = self._index
        return rows.to(device), slots.to(device)

    def spread(self, of_unfinished: torch.Tensor) -> torch.Tensor:
        """What a forward runs on, from what is known of each unfinished row: here the same rows."""
        return of_unfinished

    def gather(self, of_rows: torch.Tensor) -> torch.Tensor:
        """What the unfinished rows get of a forward's results."""
        return of_rows

    def know_lengths(self, row_lengths: list[int]) -> None:
        """Tells the host's side how many slots of each row are in use."""
        self.min_length, self.max_length = min(row_lengths), max(row_lengths)

    def keep_rows(self, rows: list[int], row_lengths: list[int]) -> None:
        """Drops every row but these, whose lengths are `row_lengths`."""
        self.know_lengths(row_lengths)
        index = torch.tensor(rows, device=self.device)
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys = layer.keys[index.to(layer.keys.device)]
                layer.values = layer.values[index.to(layer.values.device)]


def stack_rows(rows: list[list[tuple[torch.Tensor, torch.Tensor]]], lengths: list[int]) -> DynamicCache:
    """Rows of `DraftCache.row` as one stock cache, cut to `lengths` and zero after them: column for column what
    `generate` returns."""
    cache = DynamicCache()
    for index, layer in enumerate(zip(*rows, strict=True)):
        keys, values = (
            torch.stack(
                [nn.functional.pad(x[:, :n], (0, 0, 0, max(lengths) - n)) for x, n in zip(half, lengths, strict=True)]
            )
            for half in zip(*layer, strict=True)
        )
        cache.update(keys, values, index)
    return cache


def num_slots_for(text_length: int, num_queries: int) -> int:
    """Slots that a text of this length and the queries of its last step need, rounded up to a power of two: texts of
    about one length share a shape."""
    return max(FEWEST_SLOTS, 1 << (text_length + num_queries - 1).bit_length())


class StaticDraftCache(DraftCache):
    """A cache that never grows, so that every decode step has one shape.

    It has C slots for every row, finished or not. Prefill sees what is cached, a step all C slots.

    Attributes:
        places: [B] of each row among the unfinished ones; 0 for a finished row, whose step nobody reads.
        unfinished: [A] the rows still being written.
    """

    def __init__(self, batch_size: int, num_layers: int, device: torch.device, capacity: int):
        super().__init__(batch_size, num_layers, device)
        self.capacity = capacity
        self.unfinished = self.places = torch.arange(batch_size, device=device)

    def begin_forward(self, lengths: torch.Tensor, num_queries: int) -> None:
        super().begin_forward(lengths, num_queries)
        if self.is_step:
            self.num_slots, self.first_slot = self.capacity, None

    def reserve_all(self, kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None) -> None:
        """Gives every layer its C slots, no more and no less: from here on a step has one shape, and one place in
        memory.

        Args:
            kept: the slots [B, H, C, D] of an earlier decode, which this one writes too; its own are put here where
                there are none.
        """
        for number, layer in enumerate(self.layers):
            if kept and number < len(kept):
                slots = kept[number]
            else:
                slots = tuple(
                    old.new_zeros(*old.shape[:2], self.capacity, old.shape[3]) for old in (layer.keys, layer.values)
                )
                for new in slots:
                    torch._dynamo.mark_static_address(new)
                if kept is not None:
                    kept.append(slots)
            for new, old in zip(slots, (layer.keys, layer.values), strict=True):
                new[:, :, : self.max_length] = old[:, :, : self.max_length]
            layer.keys, layer.values = slots
        self.is_step = True

    def spread(self, of_unfinished: torch.Tensor) -> torch.Tensor:
        return of_unfinished if self.is_whole else of_unfinished[self.places]

    def gather(self, of_rows: torch.Tensor) -> torch.Tensor:
        return of_rows if self.is_whole else of_rows[self.unfinished]

    @property
    def is_whole(self) -> bool:
        """Whether every row is still being written."""
        return len(self.unfinished) == len(self.places)

    def keep_rows(self, rows: list[int], row_lengths: list[int]) -> None:
        self.know_lengths(row_lengths)
        self.unfinished = self.unfinished[rows]
        self.places = torch.zeros_like(self.places)
        self.places[self.unfinished] = torch.arange(len(rows), device=self.device)

    def row(self, place: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return super().row(int(self.unfinished[place]), length)
