"""What the masks of a forward predict, and which of them predict what follows the accepted tokens.

A rows, M blocks of K masks, D channels, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..stock_model import lm_head_logits
from .draft_head import DraftChain, DraftHead


class SlotPredictions(NamedTuple):
    """What a draft is written from: slot i is the token i + 1 places after the last decided one.

    Attributes:
        num_masks: [A] how many slots count, 0 to K - 1.
        logits: [A, K - 1, V]; [A, 0, V] without masks.
        chain: the same slots as the draft head reads them; None without a head or masks.
    """

    num_masks: Tensor
    logits: Tensor
    chain: DraftChain | None


@dataclass
class MaskPredictions:
    """
    Attributes:
        branch_lengths: [A, M] how many clean tokens each block saw.
        states: [A, M*K, D] last hidden states of the masks.
        logits: [A, M*(K - 1), V] of masks 2..K of each block, where they were read with the clean tokens'.
        device: where ids are chosen.
    """

    model: Any
    head: DraftHead | None
    draft_length: int
    branch_lengths: Tensor
    states: Tensor
    logits: Tensor | None
    device: torch.device

    @property
    def num_blocks(self) -> int:
        return self.branch_lengths.shape[1]

    def after(self, num_accepted: Tensor) -> SlotPredictions:
        """The predictions of what follows `num_accepted` [A] tokens of a draft and the model's own next one."""
        first, num_masks = self.first_mask(num_accepted)
        logits = self.logits_from(first)
        return SlotPredictions(num_masks, logits, self._chain(first, logits))

    def first_mask(self, num_accepted: Tensor) -> tuple[Tensor, Tensor]:
        """The first of a row's M * K masks that predicts what follows `num_accepted` [A] tokens, and how many do, 0 to
        K - 1.

        A block that saw just as many has K - 1 such masks. Of blocks that saw fewer, the one with the most is late by
        d = 1, 2, ...: its last K - 1 - d masks still stand at the right positions, but did not see the last d tokens.
        """
        if not self.num_blocks:
            return torch.zeros_like(num_accepted), torch.zeros_like(num_accepted)
        late = num_accepted[:, None].to(self.branch_lengths.device) - self.branch_lengths  # [A, M]
        late, block = late.masked_fill(late < 0, self.draft_length).min(dim=1)
        first = block * self.draft_length + 1 + late
        return first.to(num_accepted.device), (self.draft_length - 1 - late).clamp(min=0).to(num_accepted.device)

    def logits_from(self, first: Tensor) -> Tensor:
        """Logits [A, K - 1, V] of the masks from `first` [A] on, anything after the end of their block. A block's first
        mask is never read: the model's own next token takes its place."""
        if not self.num_blocks or self.draft_length == 1:
            vocab_size = self.model.config.get_text_config().vocab_size
            return self.states.new_zeros(len(first), 0, vocab_size).to(self.device)
        rows, slots = self._slots(first)
        if self.logits is not None:
            places = slots - slots // self.draft_length - 1
            return self.logits[rows, places.clamp(max=self.logits.shape[1] - 1)].to(self.device)
        slots = slots.clamp(max=self.states.shape[1] - 1)
        return lm_head_logits(self.model, self.states[rows, slots]).to(self.device)

    def _chain(self, first: Tensor, logits: Tensor) -> DraftChain | None:
        if self.head is None or not logits.shape[1]:
            return None
        rows, slots = self._slots(first)
        states = self.states[rows, slots.clamp(max=self.states.shape[1] - 1)]
        return DraftChain(self.model, self.head, logits, states)

    def _slots(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [A, 1] and masks [A, K - 1] from `first` on."""
        device = self.states.device
        slots = first.to(device)[:, None] + torch.arange(self.draft_length - 1, device=device)
        return torch.arange(len(first), device=device)[:, None], slots
