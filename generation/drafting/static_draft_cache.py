"""A cache that never grows, so that every decode step has one shape.

B rows of the batch, A of them unfinished, H key heads, C slots, Q queries, D channels a head.
"""

import torch

from .draft_cache import DraftCache

FEWEST_SLOTS = 256


def num_slots_for(text_length: int, num_queries: int) -> int:
    """Slots that a text of this length and the queries of its last step need, rounded up to a power of two: texts of
    about one length share a shape."""
    return max(FEWEST_SLOTS, 1 << (text_length + num_queries - 1).bit_length())


class StaticDraftCache(DraftCache):
    """A cache of C slots for every row, finished or not. Prefill sees what is cached, a step all C slots.

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
