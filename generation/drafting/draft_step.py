"""One step of a decode: a draft is read and verified, and behind what stands of it the next one is written.

A unfinished rows, N tokens of the draft at hand, K of a whole one.
"""

import torch
from torch import nn

from ..acceptance import likely_lengths
from .choice import Greedy, Sampled
from .draft_forward import DraftForward


class DraftStep:
    """The steps of one decode, and what lies between two of them.

    Args:
        target_logits: behind the last prompt token, [A, 1, V].
        keeps_logits: whether a caller wants what each token was decided by.

    Attributes:
        is_recorded: whether a step is one CUDA graph, from draft to draft. Where forwards are recorded, steps are too
            if tokens are chosen by the model's logits alone; else what is done around the forward is called.
        decided_ids, num_decided: [A, N] ids, of which so many [A] are decided by the last step.
        num_masks: [A] how many masks predict what follows them.
        first_mask: [A] the first of those; where steps are not recorded.
        chosen_by: logits and processed scores [A, N, V] of the last step; where steps are not recorded.
    """

    def __init__(
        self, forward: DraftForward, choice: Greedy | Sampled, target_logits: torch.Tensor, keeps_logits: bool
    ):
        self.forward = forward
        self.choice = choice
        self.is_recorded = (
            forward.graphs is not None and type(choice) is Greedy and not choice.scores.processors and not keeps_logits
        )
        self.decided_ids, self.num_decided = choice.first(target_logits)
        self.first_mask, self.num_masks = forward.drafts_behind(self.num_decided)
        self.chosen_by: tuple[torch.Tensor, torch.Tensor] | None = target_logits, choice.target_scores
        self.written: tuple[torch.Tensor, torch.Tensor] | None = None  # what a recorded step has written

    def keep_rows(self, places: list[int]) -> None:
        """Takes every other row out of the steps to come."""
        self.forward.keep_rows(places)
        self.choice.keep_rows(places)
        for name in ("decided_ids", "num_decided", "first_mask", "num_masks"):
            setattr(self, name, getattr(self, name)[places])
        if self.written is not None:
            ids, confidence = self.written
            self.written = ids[places], confidence[places]

    def draft(self, has_draft: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The draft that the next step reads.

        Returns:
            ids [A, K], [A, 1] unless `has_draft`, the first of them decided; and the masks' confidence in the others,
            where it is wanted.
        """
        if self.written is None:
            return self._write(self.decided_ids, self.num_decided, self.first_mask, has_draft)
        missing = (self.forward.draft_length if has_draft else 1) - self.written[0].shape[1]
        ids, confidence = self.written
        if missing:  # another kind of step than the last: less of the draft is read, or there is none
            return nn.functional.pad(ids, (0, missing)), nn.functional.pad(confidence, (0, missing))
        return ids, confidence

    def run(self, draft_ids: torch.Tensor, confidence: torch.Tensor, num_blocks: int) -> None:
        """Verifies a draft [A, N], and drafts behind each of the `num_blocks` likeliest numbers of accepted tokens."""
        given = draft_ids, confidence, self.num_masks
        if not self.is_recorded:
            self.decided_ids, self.num_decided, self.first_mask, self.num_masks = self._read(*given, num_blocks)
            return
        forward = self.forward
        forward.check_positions(forward.next_positions)
        forward.note_call(draft_ids.shape[1] + num_blocks * forward.draft_length)
        self.decided_ids, self.num_decided, self.num_masks, *written = self._by_graph(*given, num_blocks)
        self.written, self.chosen_by = tuple(written), None
        forward.num_forwards += 1

    def rehearse(self, num_clean: int, num_blocks: int, mask_length: int) -> None:
        """Runs a step of so many tokens and masks, and waits for it. Nothing of it is kept: its time is asked."""
        if not self.is_recorded:
            self.forward.rehearse(num_clean, num_blocks, mask_length)
            return
        draft_ids = torch.zeros_like(self.num_masks)[:, None].expand(-1, num_clean)
        self._by_graph(draft_ids, draft_ids[:, 1:].float(), self.num_masks, num_blocks)
        if draft_ids.device.type != "cpu":
            torch.accelerator.synchronize(draft_ids.device)

    def _by_graph(
        self, draft_ids: torch.Tensor, confidence: torch.Tensor, num_masks: torch.Tensor, num_blocks: int
    ) -> tuple[torch.Tensor, ...]:
        """What a step makes of a draft: `decided_ids`, `num_decided` and `num_masks`, and the next draft."""

        def step(ids: torch.Tensor, confidence: torch.Tensor, num_masks: torch.Tensor) -> tuple[torch.Tensor, ...]:
            decided_ids, num_decided, first_mask, num_masks = self._read(ids, confidence, num_masks, num_blocks)
            written = self._write(decided_ids, num_decided, first_mask, has_draft=num_blocks > 0)
            return decided_ids, num_decided, num_masks, *written

        assert isinstance(self.choice, Greedy)
        about = self.choice.wants_confidence, self.choice.scores.excluded_id, self.forward.draft_head is not None
        return self.forward.by_graph(step, (draft_ids, confidence, num_masks), (num_blocks, *about))

    def _write(
        self, decided_ids: torch.Tensor, num_decided: torch.Tensor, first_mask: torch.Tensor, has_draft: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The draft behind what is decided, by the masks from `first_mask` on."""
        draft_logits = self.forward.draft_logits(first_mask, has_draft)
        chain = self.forward.draft_chain(first_mask, draft_logits)
        return self.choice.draft(decided_ids, num_decided, draft_logits, chain), self.choice.confidence

    def _read(
        self, draft_ids: torch.Tensor, confidence: torch.Tensor, num_masks: torch.Tensor, num_blocks: int
    ) -> tuple[torch.Tensor, ...]:
        """What is decided by verifying a draft of which as many tokens count as masks predicted, and how many tokens
        that is; the first mask behind it, and how many there are."""
        num_clean = draft_ids.shape[1]
        num_drafted = self.forward.num_with_position(1 + num_masks.clamp(max=num_clean - 1))
        branch_lengths = None
        if num_blocks < num_clean:
            branch_lengths = likely_lengths(confidence, num_drafted, num_blocks)
        target_logits = self.forward.verify_and_draft(draft_ids, branch_lengths)
        decided_ids, num_decided = self.choice.verify(draft_ids, target_logits, num_drafted)
        self.chosen_by = target_logits, self.choice.target_scores
        return decided_ids, num_decided, *self.forward.drafts_behind(num_decided)
