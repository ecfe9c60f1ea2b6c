"""The rows of a batch: which are still written, their keys and values, and what rows leave that have ended.

B sequences, A of them unfinished, H key heads, D channels a head.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .draft_cache import DraftCache, stack_rows
from .draft_step import StepState


@dataclass
class EndedRow:
    """Keys and values of a row that has left the forward, of each layer [H, length, D], and where its next token
    stands, [1]."""

    states: list[tuple[torch.Tensor, torch.Tensor]]
    next_position: torch.Tensor

    @property
    def length(self) -> int:
        return self.states[0][0].shape[1]


class DraftRows:
    """
    Args:
        cache: of all rows.
        is_real_slot: [B, P], False for padding; None where there is none.
        keeps_ended: whether the cache will be returned, so that what ended rows leave is kept.

    Attributes:
        rows: the unfinished rows, by their number in the batch.
        lengths: slots of the cache in use, for each of them, on the host.
    """

    def __init__(self, cache: DraftCache, num_rows: int, is_real_slot: torch.Tensor | None, keeps_ended: bool = False):
        self.cache = cache
        self.batch_size = num_rows
        self.rows = list(range(num_rows))
        self.lengths = [cache.max_length] * num_rows
        self.is_real_slot = is_real_slot
        self.is_real_in_prompt = is_real_slot
        self.ended: dict[int, EndedRow] | None = {} if keeps_ended else None

    def padding(self) -> torch.Tensor | None:
        """[A, slots] of the forward under way, False for padding; None where there is none."""
        if self.is_real_slot is None:
            return None
        num_new = self.cache.num_slots - self.is_real_slot.shape[1]
        return nn.functional.pad(self.is_real_slot, (0, num_new), value=True) if num_new else self.is_real_slot

    def advance(self, counts: list[int]) -> None:
        """Counts so many more slots of each unfinished row as used."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.cache.know_lengths(self.lengths)

    def keep(self, state: StepState, places: list[int]) -> StepState:
        """Takes every other row out of the decode; returns the state of those that stay."""
        if len(places) == len(self.rows):
            return state
        self._set_aside(state, set(range(len(self.rows))) - set(places))
        self.rows = [self.rows[place] for place in places]
        self.lengths = [self.lengths[place] for place in places]
        if self.is_real_slot is not None and not self.cache.is_step:
            self.is_real_slot = self.is_real_slot[places]
        self.cache.keep_rows(places, self.lengths)
        return state.of_rows(places)

    def alone(self, place: int, length: int) -> "DraftRows":
        """One row by itself, as it was when it had so many slots, over the same memory."""
        is_real = None if self.is_real_slot is None else self.is_real_slot[place : place + 1]
        return DraftRows(self.cache.view_of_row(place, length), 1, is_real)

    def end_all(self, state: StepState) -> None:
        """Sets aside what the rows still unfinished leave."""
        self._set_aside(state, range(len(self.rows)))

    def _set_aside(self, state: StepState, places: Iterable[int]) -> None:
        if self.ended is None:
            return
        for place in places:
            states = self.cache.row(place, self.lengths[place])
            self.ended[self.rows[place]] = EndedRow(states, state.next_positions[place])

    def lacking_last(self, text_lengths: list[int]) -> list[int]:
        """The ended rows whose last token nobody has read, though a longer row's cache would hold it."""
        assert self.ended is not None
        longest = max(text_lengths)
        return [row for row, n in enumerate(text_lengths) if n < longest and self.ended[row].length < n]

    def of_ended(self, rows: list[int]) -> tuple["DraftRows", torch.Tensor]:
        """Some ended rows as rows of their own, and the positions [n, 1] of their next tokens."""
        assert self.ended is not None
        ended = [self.ended[row] for row in rows]
        lengths = [one.length for one in ended]
        cache = DraftCache(len(rows), len(self.cache.layers), self.cache.device)
        cache.take_over(stack_rows([one.states for one in ended], lengths))
        cache.know_lengths(lengths)
        found = DraftRows(cache, len(rows), None if self.is_real_in_prompt is None else self.is_real_in_prompt[rows])
        found.lengths = lengths
        return found, torch.stack([one.next_position for one in ended])
