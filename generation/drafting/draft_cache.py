"""The rows of a batch and their keys and values, at slots of their own per row: rejecting a draft costs nothing.

B sequences, A of them unfinished, P prompt tokens, H key heads, C slots, Q queries, D channels a head.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from ..execution.stateful_layers import KeptState, joined, of_type
from .draft_step import StepState

# Of layers without either, since 5.23.
DummyLayer = getattr(cache_utils, "DummyLayer", LinearAttentionLayer)
LAYERS_WITH_STATE = LinearAttentionLayer, LinearAttentionAndFullAttentionLayer  # without and with keys and values
FEWEST_SLOTS = 256  # of a cache that never grows

States = list[tuple[Any, ...]]  # of each layer: the state that it keeps or None, and its keys and values, if any


class DraftCacheLayer(CacheLayerMixin):
    """One layer's keys and values, [B, H, C, D], written in place at the slots the cache points to."""

    def __init__(self, cache: "DraftCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.keys.shape[2] and not self.cache.max_length and key_states.shape[2] == self.cache.num_slots:
            self.keys, self.values = key_states, value_states  # a prompt's
            return key_states, value_states
        self.reserve(self.cache.num_slots)
        num_queries = key_states.shape[2]  # fewer than announced, where the masks are done already
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            if (first := self.cache.first_slot) is not None:
                kept[:, :, first : first + num_queries] = new
            else:
                rows, slots = self.cache.write_index(new.device)
                kept[rows, :, slots[:, :num_queries]] = new.transpose(1, 2)
        return self.keys[:, :, : self.cache.num_slots], self.values[:, :, : self.cache.num_slots]

    def reserve(self, num_slots: int) -> None:
        """Makes room; grows by half, so that copies stay rare. Unused slots are finite zeros."""
        capacity = self.keys.shape[2]
        if (missing := num_slots - capacity) > 0:
            more = (0, 0, 0, max(missing, capacity // 2))
            self.keys, self.values = nn.functional.pad(self.keys, more), nn.functional.pad(self.values, more)

    def get_seq_length(self) -> int:
        return self.cache.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.max_length + query_length, 0

    def get_max_length(self) -> int:
        return -1


class DraftCache(Cache):
    """A cache whose rows have lengths of their own.

    A forward of Q queries writes slots `lengths[b] .. lengths[b] + Q - 1` of row b. Accepted tokens add to its length.

    Attributes:
        lengths: [B] slots in use when the forward under way began, on the model's device.
        min_length, max_length: the shortest and the longest row's length, on the host.
        is_step: whether every forward has one shape, as over a static cache.
        num_slots: slots visible in the forward under way: `max_length` + Q.
        kept_states: of layers that keep one, by their numbers.
        first_slot: where all rows write then: a slice takes half as long as an index. None where rows differ.
    """

    def __init__(self, batch_size: int, num_layers: int, device: torch.device):
        super().__init__(layers=[DraftCacheLayer(self) for _ in range(num_layers)])
        self.device = device
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.is_step = False
        self.max_length = self.min_length = 0
        self.num_slots = 0
        self.first_slot: int | None = None
        self.kept_states: dict[int, KeptState] = {}

    def take_over(self, cache: DynamicCache) -> None:
        """Begins with a copy of another cache's keys and values; unseen zeros stand for what a window has dropped."""
        length = int(cache.get_seq_length())
        self.know_lengths([length])
        for number, (layer, past) in enumerate(zip(self.layers, cache.layers, strict=True)):
            if isinstance(past, LinearAttentionLayer):
                self.kept_states[number] = KeptState(of_type(past, LinearAttentionLayer))
            if getattr(past, "keys", None) is None:
                continue
            layer.lazy_initialization(past.keys, past.values)
            dropped = (0, 0, max(0, length - past.keys.shape[2]), 0)
            layer.keys, layer.values = (nn.functional.pad(x[:, :, :length], dropped) for x in (past.keys, past.values))

    def row(self, place: int, length: int) -> States:
        """A copy of one row, [H, length, D]."""
        kept = {number: kept.of_rows([place]) for number, kept in self.kept_states.items()}
        states: States = []
        for number, layer in enumerate(self.layers):
            of_text = (layer.keys, layer.values) if layer.is_initialized else ()
            states.append((kept.get(number), *(x[place, :, :length].clone() for x in of_text)))
        return states

    def view_of_row(self, place: int, length: int) -> "DraftCache":
        """One row with `length` slots in use as a cache of its own, over the same memory."""
        view = DraftCache(1, len(self.layers), self.device)
        view.know_lengths([length])
        for mine, layer in zip(view.layers, self.layers, strict=True):
            mine.lazy_initialization(layer.keys, layer.values)
            mine.keys, mine.values = layer.keys[place : place + 1], layer.values[place : place + 1]
        return view

    def begin_forward(self, lengths: Tensor, num_queries: int) -> None:
        """Points each row's next `num_queries` writes at the slots after its first `lengths` [B]."""
        self.lengths = lengths
        self._index: tuple[Tensor, Tensor] | None = None
        self._num_queries = num_queries
        self.num_slots = self.max_length + num_queries
        self.first_slot = self.max_length if self.max_length == self.min_length else None

    def write_index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows [B, 1] and slots [B, Q] that the forward under way writes."""
        if self._index is None:
            slots = self.lengths[:, None] + torch.arange(self._num_queries, device=self.device)
            self._index = torch.arange(len(self.lengths), device=self.device)[:, None], slots
        rows, slots = self._index
        return rows.to(device), slots.to(device)

    def spread(self, of_unfinished: Tensor) -> Tensor:
        """The rows [A, ...] that a forward runs on, [B, ...] over a static cache."""
        return of_unfinished

    def gather(self, of_rows: Tensor) -> Tensor:
        """The unfinished rows of a forward's results."""
        return of_rows

    def know_lengths(self, row_lengths: list[int]) -> None:
        """Tells the host the slots in use."""
        self.min_length, self.max_length = min(row_lengths), max(row_lengths)

    def keep_rows(self, rows: list[int], row_lengths: list[int]) -> None:
        """Drops every row but these, whose lengths are `row_lengths`."""
        self.know_lengths(row_lengths)
        index = torch.tensor(rows, device=self.device)
        for layer in self.layers:
            if layer.is_initialized:
                of_layer = index.to(layer.keys.device)
                layer.keys, layer.values = layer.keys[of_layer], layer.values[of_layer]
        self.kept_states = {number: kept.of_rows(rows) for number, kept in self.kept_states.items()}


def stack_rows(rows: list[States], lengths: list[int]) -> DynamicCache:
    """Rows as one stock cache, cut to `lengths` and zero after them."""
    cache = DynamicCache()
    for of_rows in zip(*rows, strict=True):
        kept, *halves = zip(*of_rows, strict=True)
        layer = DynamicLayer() if halves else DummyLayer()
        if kept[0] is not None:
            states = [one.after(length) for one, length in zip(kept, lengths, strict=True)]
            layer = of_type(joined(states, [*range(len(states))]), LAYERS_WITH_STATE[bool(halves)])
        if halves:
            missing = [(0, 0, 0, max(lengths) - length) for length in lengths]
            cut = ([x[:, :n] for x, n in zip(half, lengths, strict=True)] for half in halves)
            layer.update(*(torch.stack(list(map(nn.functional.pad, half, missing))) for half in cut))
        cache.layers.append(layer)
    return cache


def num_slots_for(text_length: int, num_queries: int) -> int:
    """Slots of a text and its last step's queries: a power of two, so that texts share shapes."""
    return max(FEWEST_SLOTS, 1 << (text_length + num_queries - 1).bit_length())


class StaticDraftCache(DraftCache):
    """A cache of C slots a row, finished or not. Prefill sees those in use, a step all.

    Attributes:
        places: [B] each row's place among the unfinished ones; 0 for a finished row, which nobody reads.
        unfinished: [A] the rows still being written.
    """

    def __init__(self, batch_size: int, num_layers: int, device: torch.device, capacity: int):
        super().__init__(batch_size, num_layers, device)
        self.capacity = capacity
        self.unfinished = self.places = torch.arange(batch_size, device=device)

    def begin_forward(self, lengths: Tensor, num_queries: int) -> None:
        super().begin_forward(lengths, num_queries)
        if self.is_step:
            self.num_slots, self.first_slot = self.capacity, None

    def reserve_all(self, kept: States | None = None) -> None:
        """Gives every layer its C slots.

        Args:
            kept: the slots [B, H, C, D] of an earlier decode, used again. If empty, the new ones are put here.
        """
        for number, layer in enumerate(self.layers):
            halves = layer.keys, layer.values
            if kept and number < len(kept):
                slots = kept[number]
            else:
                slots = tuple(old.new_zeros(*old.shape[:2], self.capacity, old.shape[3]) for old in halves)
                for new in slots:
                    torch._dynamo.mark_static_address(new)
                if kept is not None:
                    kept.append(slots)
            for new, old in zip(slots, halves, strict=True):
                new[:, :, : self.max_length] = old[:, :, : self.max_length]
            layer.keys, layer.values = slots
        self.is_step = True

    def spread(self, of_unfinished: Tensor) -> Tensor:
        return of_unfinished if self.is_whole else of_unfinished[self.places]

    def gather(self, of_rows: Tensor) -> Tensor:
        return of_rows if self.is_whole else of_rows[self.unfinished]

    @property
    def is_whole(self) -> bool:
        """Whether no row is finished."""
        return len(self.unfinished) == len(self.places)

    def keep_rows(self, rows: list[int], row_lengths: list[int]) -> None:
        self.know_lengths(row_lengths)
        self.unfinished = self.unfinished[rows]
        self.places = torch.zeros_like(self.places)
        self.places[self.unfinished] = torch.arange(len(rows), device=self.device)

    def row(self, place: int, length: int) -> States:
        return super().row(int(self.unfinished[place]), length)


class EndedRow(NamedTuple):
    """What the cache has of an ended row of `length` tokens, and its next token's position, [1]."""

    states: States
    next_position: Tensor
    length: int


class DraftRows:
    """
    Args:
        is_real_slot: [B, P], False for padding; None where there is none.
        keeps_ended: whether ended rows are kept, for a cache that will be returned.

    Attributes:
        rows, lengths: the unfinished rows' numbers in the batch, and their slots in use, on the host.
    """

    def __init__(self, cache: DraftCache, num_rows: int, is_real_slot: Tensor | None, keeps_ended: bool = False):
        self.cache = cache
        self.batch_size = num_rows
        self.rows = list(range(num_rows))
        self.lengths = [cache.max_length] * num_rows
        self.is_real_slot = is_real_slot
        self.is_real_in_prompt = is_real_slot
        self.ended: dict[int, EndedRow] | None = {} if keeps_ended else None

    def padding(self) -> Tensor | None:
        """[A, C] of the forward under way, False for padding; None where there is none."""
        if self.is_real_slot is None:
            return None
        num_new = self.cache.num_slots - self.is_real_slot.shape[1]
        return nn.functional.pad(self.is_real_slot, (0, num_new), value=True) if num_new else self.is_real_slot

    def advance(self, counts: list[int]) -> None:
        """Adds to the slots in use."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.cache.know_lengths(self.lengths)

    def keep(self, state: StepState, places: list[int]) -> StepState:
        """Takes every other row out of the decode; returns the state of the rest."""
        if len(places) == len(self.rows):
            return state
        self.set_aside(state, set(range(len(self.rows))) - set(places))
        self.rows = [self.rows[place] for place in places]
        self.lengths = [self.lengths[place] for place in places]
        if self.is_real_slot is not None and not self.cache.is_step:
            self.is_real_slot = self.is_real_slot[places]
        self.cache.keep_rows(places, self.lengths)
        return state.of_rows(places)

    def alone(self, place: int, length: int) -> "DraftRows":
        """One row by itself, over the same memory."""
        is_real = None if self.is_real_slot is None else self.is_real_slot[place : place + 1]
        found = DraftRows(self.cache.view_of_row(place, length), 1, is_real)
        found.rows = [self.rows[place]]
        return found

    def set_aside(self, state: StepState, places: Iterable[int]) -> None:
        """Keeps what these rows leave, where the cache will be returned."""
        if self.ended is None:
            return
        for place in places:
            states = self.cache.row(place, self.lengths[place])
            self.ended[self.rows[place]] = EndedRow(states, state.next_positions[place], self.lengths[place])

    def lacking_last(self, text_lengths: list[int]) -> list[int]:
        """The ended rows whose last token is not cached, though a longer row's cache would hold it."""
        assert self.ended is not None
        longest = max(text_lengths)
        return [row for row, n in enumerate(text_lengths) if n < longest and self.ended[row].length < n]

    def of_ended(self, rows: list[int]) -> tuple["DraftRows", Tensor]:
        """Ended rows as rows of their own, and the positions [n, 1] of their next tokens."""
        assert self.ended is not None
        ended = [self.ended[row] for row in rows]
        lengths = [one.length for one in ended]
        cache = DraftCache(len(rows), len(self.cache.layers), self.cache.device)
        cache.take_over(stack_rows([one.states for one in ended], lengths))
        cache.know_lengths(lengths)
        found = DraftRows(cache, len(rows), None if self.is_real_in_prompt is None else self.is_real_in_prompt[rows])
        found.rows, found.lengths = rows, lengths
        return found, torch.stack([one.next_position for one in ended])
