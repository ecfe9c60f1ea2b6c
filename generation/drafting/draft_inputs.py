"""What a forward reads: clean tokens, then blocks of masks at the positions they predict. Pure functions of tensors.

A rows, N clean tokens, M blocks of K masks, Q = N + M*K queries.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .structured_mask import draft_positions


class Masks(NamedTuple):
    """What is known of every mask token.

    Attributes:
        embedding_id: the row of the embedding table that masks read.
        last_position: the last row of a learned position table; None where positions are rotary.
    """

    embedding_id: int
    last_position: int | None


class DraftInputs(NamedTuple):
    """
    Attributes:
        input_ids: [A, Q].
        position_ids: [A, Q].
        branch_lengths: [A, M] how many clean tokens each block sees.
        cached_lengths: [A] slots in use in the cache.
        num_clean: N.
        draft_length: K.
        num_read: clean tokens, from the last backwards, whose logits are read.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    branch_lengths: torch.Tensor
    cached_lengths: torch.Tensor
    num_clean: int
    draft_length: int
    num_read: int

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "DraftInputs":
        """The same with another tensor for each."""
        return DraftInputs(*(function(x) if isinstance(x, torch.Tensor) else x for x in self))

    @property
    def num_blocks(self) -> int:
        return self.branch_lengths.shape[1]

    @property
    def num_masks(self) -> int:
        return self.num_blocks * self.draft_length


def with_masks(
    clean_ids: torch.Tensor,
    clean_positions: torch.Tensor,
    branch_lengths: torch.Tensor,
    cached_lengths: torch.Tensor,
    draft_length: int,
    num_read: int,
    masks: Masks,
) -> DraftInputs:
    """Clean tokens [A, N], and after them a block of K masks for each of `branch_lengths` [A, M].

    A mask may stand after the last row of a learned position table. It is given that row, and is never read.
    """
    device, draft_length = cached_lengths.device, max(draft_length, 1)
    clean_ids, branch_lengths = clean_ids.to(device), branch_lengths.to(device)
    num_rows, num_clean = clean_ids.shape
    num_masks = branch_lengths.shape[1] * draft_length
    input_ids, position_ids = clean_ids, clean_positions
    if num_masks:
        input_ids = torch.cat([clean_ids, clean_ids.new_full((num_rows, num_masks), masks.embedding_id)], dim=1)
        of_masks = draft_positions(num_clean, draft_length, branch_lengths)[:, num_clean:]
        position_ids = torch.cat([clean_positions, clean_positions[:, -1:] + 1 - num_clean + of_masks], dim=1)
    if masks.last_position is not None:
        position_ids = position_ids.clamp(max=masks.last_position)
    return DraftInputs(input_ids, position_ids, branch_lengths, cached_lengths, num_clean, draft_length, num_read)


def draft_inputs(state: Any, branch_lengths: torch.Tensor, draft_length: int, masks: Masks) -> DraftInputs:
    """Of a decode step: the draft at hand [A, N], and a block of K masks after each of its first `branch_lengths`
    [A, M] tokens."""
    num_clean = state.draft_ids.shape[1]
    positions = state.next_positions + torch.arange(num_clean, device=state.next_positions.device)
    return with_masks(state.draft_ids, positions, branch_lengths, state.cached_lengths, draft_length, num_clean, masks)
