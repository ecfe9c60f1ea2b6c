"""One step of a decode, a pure function of tensors: a draft is verified, and the next one is written.

Only the cache of keys and values is written besides. A step that is compiled, captured or timed is this same function.

A rows, N clean tokens (the draft at hand), M blocks of K masks, Q = N + M*K queries, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..acceptance import likely_lengths
from .structured_mask import draft_positions


class Plan(NamedTuple):
    """Drafts of K tokens after each of B numbers of accepted tokens.

    B = 0 verifies in one forward and drafts in the next. K = 0 decodes plainly.
    """

    draft_length: int
    num_branches: int

    def num_blocks(self, num_read: int) -> int:
        """M of a step that reads so many tokens."""
        if num_read > 1:
            return min(self.num_branches, num_read)
        return int(self.draft_length > 0)


PLAIN = Plan(0, 0)


class Draft(NamedTuple):
    """
    Attributes:
        ids: [A, N], the first is decided.
        confidence: [A, N - 1] the drafter's probability of each token after the first.
        num_drafted: [A] how many of a row's N count, 1 to N.
        probs: [A, N - 1, V] what tokens 2..N were drawn from; [A, N - 1, 0] for greedy decoding.
    """

    ids: Tensor
    confidence: Tensor
    num_drafted: Tensor
    probs: Tensor


class StepState(NamedTuple):
    """All that a step reads and writes besides the cache: the fields of a `Draft`, and where it stands.

    Attributes:
        next_positions: [A, 1] of the first token.
        cached_lengths: [A] slots in use in the cache.
    """

    draft_ids: Tensor
    confidence: Tensor
    num_drafted: Tensor
    draft_probs: Tensor
    next_positions: Tensor
    cached_lengths: Tensor

    def of_rows(self, places: list[int]) -> "StepState":
        return StepState(*(tensor[places] for tensor in self))

    def with_length(self, num_tokens: int) -> "StepState":
        """A draft of N = `num_tokens`, cut or filled up."""
        missing = num_tokens - self.draft_ids.shape[1]
        if not missing:
            return self
        return self._replace(
            draft_ids=nn.functional.pad(self.draft_ids, (0, missing)),
            confidence=nn.functional.pad(self.confidence, (0, missing)),
            num_drafted=self.num_drafted.clamp(max=num_tokens),
            draft_probs=nn.functional.pad(self.draft_probs, (0, 0, 0, missing)),
        )

    def num_with_position(self, last_position: int | None) -> Tensor:
        """How many tokens of the draft count and have a position, [A]."""
        if last_position is None:
            return self.num_drafted
        room = last_position + 1 - self.next_positions[:, 0]
        return torch.minimum(self.num_drafted, room.clamp(min=1).to(self.num_drafted.device))

    def after(self, decided: "Decided", draft: Draft) -> "StepState":
        num_accepted = decided.num_accepted.to(self.next_positions.device)
        return StepState(*draft, self.next_positions + num_accepted[:, None], self.cached_lengths + num_accepted)


class Decided(NamedTuple):
    """What a step decides: draft tokens 2..a, then the model's own next token.

    Attributes:
        ids: [A, N], of which the first `num_accepted` [A], 1 to N, count: so many of the draft stand.
        chosen_by: logits and processed scores [A, N, V].
    """

    ids: Tensor
    num_accepted: Tensor
    chosen_by: tuple[Tensor, Tensor] | None = None


class Masks(NamedTuple):
    """
    Attributes:
        embedding_id: the row of the embedding table that masks read.
        is_causal: whether a mask sees only the masks before it in its block.
        last_position: the last row of a learned position table; None where positions are rotary.
    """

    embedding_id: int
    is_causal: bool
    last_position: int | None


class DraftInputs(NamedTuple):
    """
    Attributes:
        input_ids, position_ids: [A, Q].
        branch_lengths: [A, M] how many clean tokens each block sees.
        cached_lengths: [A] slots in use in the cache.
        num_clean, draft_length: N and K.
        num_read: clean tokens, from the last backwards, whose logits are read.
    """

    input_ids: Tensor
    position_ids: Tensor
    branch_lengths: Tensor
    cached_lengths: Tensor
    num_clean: int
    draft_length: int
    num_read: int

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "DraftInputs":
        """The same, each tensor mapped."""
        return DraftInputs(*(function(x) if isinstance(x, Tensor) else x for x in self))

    @property
    def num_blocks(self) -> int:
        return self.branch_lengths.shape[1]

    @property
    def num_masks(self) -> int:
        return self.num_blocks * self.draft_length


def with_masks(
    clean_ids: Tensor,
    clean_positions: Tensor,
    branch_lengths: Tensor,
    cached_lengths: Tensor,
    draft_length: int,
    num_read: int,
    masks: Masks,
) -> DraftInputs:
    """Clean tokens [A, N], and after them a block of K masks for each of `branch_lengths` [A, M].

    A mask after the last row of a learned position table is given that row, and is never read.
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


def draft_inputs(state: StepState, branch_lengths: Tensor, draft_length: int, masks: Masks) -> DraftInputs:
    """Of a decode step: the draft at hand, and a block of K masks after each of its first `branch_lengths` [A, M]
    tokens."""
    num_clean = state.draft_ids.shape[1]
    positions = state.next_positions + torch.arange(num_clean, device=state.next_positions.device)
    return with_masks(state.draft_ids, positions, branch_lengths, state.cached_lengths, draft_length, num_clean, masks)


def step(network: Any, choice: Any, plan: Plan, state: StepState) -> tuple[StepState, Decided]:
    """Verifies a draft, accepts what stands and drafts what follows in one forward (arXiv 2511.08923, figure 3)."""
    num_tokens = state.draft_ids.shape[1]
    state = state._replace(num_drafted=state.num_with_position(network.masks.last_position))
    branch_lengths = branches(state, plan.num_blocks(num_tokens))
    target_logits, predictions = network(draft_inputs(state, branch_lengths, plan.draft_length, network.masks))
    if choice.trust < 1:
        last_position = network.masks.last_position
        num_placed = None if last_position is None else last_position - state.next_positions[:, 0]
        target_logits = predictions.blended(target_logits, choice.trust, num_placed)
    decided = choice.verify(state, target_logits)
    return state.after(decided, choice.draft(decided, predictions.after(decided.num_accepted))), decided


def branches(state: StepState, num_blocks: int) -> Tensor:
    """The numbers of accepted tokens that are drafted after, [A, M]: each, or the likeliest."""
    num_rows, num_tokens = state.draft_ids.shape
    if num_blocks == num_tokens:
        return torch.arange(1, num_tokens + 1, device=state.next_positions.device).expand(num_rows, -1)
    return likely_lengths(state.confidence, state.num_drafted, num_blocks)
