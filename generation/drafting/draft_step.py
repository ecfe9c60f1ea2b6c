"""One step of a decode, a pure function of tensors: a draft is verified, and the next one is written.

Only the cache of keys and values is written besides. A step that is compiled, captured or timed is this same function.

A rows, N tokens of the draft at hand, K of the next one, M blocks of masks, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from ..acceptance import likely_lengths
from .draft_inputs import draft_inputs
from .mask_predictions import SlotPredictions


class Plan(NamedTuple):
    """A way to go on: drafts of K tokens after each of B numbers of accepted tokens.

    B = 0 verifies in one forward and drafts in the next. K = 0 is plain decoding: one token a forward.
    """

    draft_length: int
    num_branches: int

    def num_blocks(self, num_read: int) -> int:
        """M of a step that reads so many tokens."""
        if num_read > 1:
            return min(self.num_branches, num_read)
        return int(self.draft_length > 0)


PLAIN = Plan(0, 0)


class StepState(NamedTuple):
    """All that a step reads and writes besides the cache.

    Attributes:
        draft_ids: [A, N], the first is decided.
        confidence: [A, N - 1] the drafter's probability of each token after the first; zeros where nobody asks.
        num_drafted: [A] how many of a row's N count, 1 to N; the rest only fills it up.
        next_positions: [A, 1] of the first.
        cached_lengths: [A] slots in use in the cache.
        draft_probs: [A, N - 1, V] what tokens 2..N were drawn from; [A, N - 1, 0] for greedy decoding.
    """

    draft_ids: torch.Tensor
    confidence: torch.Tensor
    num_drafted: torch.Tensor
    next_positions: torch.Tensor
    cached_lengths: torch.Tensor
    draft_probs: torch.Tensor

    def of_rows(self, places: list[int]) -> "StepState":
        """The state of some of its rows."""
        return StepState(*(tensor[places] for tensor in self))

    def with_length(self, num_tokens: int) -> "StepState":
        """A draft of N = `num_tokens`: less of it is read, or what is missing is filled up and does not count."""
        missing = num_tokens - self.draft_ids.shape[1]
        if not missing:
            return self
        return self._replace(
            draft_ids=nn.functional.pad(self.draft_ids, (0, missing)),
            confidence=nn.functional.pad(self.confidence, (0, missing)),
            num_drafted=self.num_drafted.clamp(max=num_tokens),
            draft_probs=nn.functional.pad(self.draft_probs, (0, 0, 0, missing)),
        )

    def num_with_position(self, last_position: int | None) -> torch.Tensor:
        """How many tokens of the draft count and have a row in a learned position table, [A]."""
        if last_position is None:
            return self.num_drafted
        room = last_position + 1 - self.next_positions[:, 0]
        return torch.minimum(self.num_drafted, room.clamp(min=1).to(self.num_drafted.device))

    def after(self, decided: "Decided", draft: "Draft") -> "StepState":
        """The state after a step."""
        num_accepted = decided.num_accepted.to(self.next_positions.device)
        return StepState(
            draft.ids,
            draft.confidence,
            draft.num_drafted,
            self.next_positions + num_accepted[:, None],
            self.cached_lengths + num_accepted,
            draft.probs,
        )


class Decided(NamedTuple):
    """What a step decides: draft tokens 2..a, then the model's own next token.

    Attributes:
        ids: [A, N] decided tokens; anything after the first `num_accepted`.
        num_accepted: [A], 1 to N: as many tokens of the draft stand, and as many are decided.
        chosen_by: logits and processed scores [A, N, V], where a caller asked for them.
    """

    ids: torch.Tensor
    num_accepted: torch.Tensor
    chosen_by: tuple[torch.Tensor, torch.Tensor] | None = None


class Draft(NamedTuple):
    """A draft as `StepState` holds it."""

    ids: torch.Tensor  # [A, K]
    confidence: torch.Tensor  # [A, K - 1]
    num_drafted: torch.Tensor  # [A]
    probs: torch.Tensor  # [A, K - 1, V]


def step(network: Any, choice: Any, plan: Plan, state: StepState) -> tuple[StepState, Decided]:
    """Verifies a draft, accepts what stands of it and drafts what follows, all in one forward (arXiv 2511.08923,
    figure 3)."""
    num_tokens = state.draft_ids.shape[1]
    state = state._replace(num_drafted=state.num_with_position(network.masks.last_position))
    branch_lengths = branches(state, plan.num_blocks(num_tokens))
    target_logits, predictions = network(draft_inputs(state, branch_lengths, plan.draft_length, network.masks))
    decided = choice.verify(state, target_logits)
    slots: SlotPredictions = predictions.after(decided.num_accepted)
    return state.after(decided, choice.draft(decided, slots)), decided


def branches(state: StepState, num_blocks: int) -> torch.Tensor:
    """The numbers of accepted tokens that the next drafts are written for, [A, M]: each, or the likeliest."""
    num_rows, num_tokens = state.draft_ids.shape
    if num_blocks == num_tokens:
        return torch.arange(1, num_tokens + 1, device=state.next_positions.device).expand(num_rows, -1)
    return likely_lengths(state.confidence, state.num_drafted, num_blocks)
