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

    def after(self, num_accepted: Tensor) -> SlotPredictions:
        """The predictions of what follows `num_accepted` [A] tokens of a draft and the model's own next one.

        A block's first mask is not read here: the model's own next token takes its place. What is read after the end
        of a block does not count.
        """
        if not self.branch_lengths.shape[1] or self.draft_length == 1:
            vocab_size = self.model.config.get_text_config().vocab_size
            nothing = self.states.new_zeros(len(num_accepted), 0, vocab_size).to(self.device)
            return SlotPredictions(torch.zeros_like(num_accepted), nothing, None)
        first, num_masks = self.first_mask(num_accepted.to(self.branch_lengths.device))
        device = self.states.device
        rows = torch.arange(len(first), device=device)[:, None]  # [A, 1]
        slots = first.to(device)[:, None] + torch.arange(self.draft_length - 1, device=device)  # [A, K - 1]
        states = self.states[rows, slots.clamp(max=self.states.shape[1] - 1)]
        if self.logits is None:
            logits = lm_head_logits(self.model, states)
        else:
            places = slots - slots // self.draft_length - 1
            logits = self.logits[rows, places.clamp(max=self.logits.shape[1] - 1)]
        logits = logits.to(self.device)
        chain = None if self.head is None else DraftChain(self.model, self.head, logits, states)
        return SlotPredictions(num_masks.to(num_accepted.device), logits, chain)

    def blended(self, target_logits: Tensor, trust: float, num_placed: Tensor | None) -> Tensor:
        """What decides the token after each token of a draft, [A, N, V]: `trust` parts of the model's own logits, the
        rest those of the first mask of the block that saw just as many tokens (arXiv 2511.08923). There are N blocks.

        Args:
            num_placed: [A] how many first masks have a position of their own, of a table that ends; None: all. After
                them the model's own logits decide alone.
        """
        dtype = torch.promote_types(target_logits.dtype, torch.float32)
        own = lm_head_logits(self.model, self.states[:, :: self.draft_length].contiguous())
        own, target_logits = own.to(target_logits.device, dtype), target_logits.to(dtype)
        blend = trust * target_logits + (1 - trust) * own
        if num_placed is None:
            return blend
        place = torch.arange(own.shape[1], device=own.device)
        return torch.where((place < num_placed.to(own.device)[:, None])[..., None], blend, target_logits)

    def first_mask(self, num_accepted: Tensor) -> tuple[Tensor, Tensor]:
        """The first of a row's M * K masks that predicts what follows `num_accepted` [A] tokens, and how many do, 0 to
        K - 1.

        A block that saw just as many has K - 1 such masks. Of blocks that saw fewer, the one with the most is late by
        d = 1, 2, ...: its last K - 1 - d masks still stand at the right positions, but did not see the last d tokens.
        """
        late = num_accepted[:, None] - self.branch_lengths  # [A, M]
        late, block = late.masked_fill(late < 0, self.draft_length).min(dim=1)
        return block * self.draft_length + 1 + late, (self.draft_length - 1 - late).clamp(min=0)
