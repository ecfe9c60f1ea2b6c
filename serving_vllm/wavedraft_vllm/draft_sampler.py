"""Verifies a step's drafts by vLLM's own rejection sampler, and writes the next ones.

R requests of a step, K drafted tokens, S = 2K - 1 extra tokens, n rows of logits. No value is waited for.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from .draft_head import draft_chain


class Verification(RejectionSampler):
    """vLLM's own, which forgets `logprob_token_ids`: here their log-probabilities come back as without drafts."""

    def __call__(self, logits: Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        self.wanted = self.sampler.get_logprobs_dims(input_batch.idx_mapping_np)  # likeliest tokens, chosen ones
        self.slots, self.num_rows_done = input_batch.expanded_idx_mapping, 0
        return super().__call__(logits, input_batch, *args, **kwargs)

    def _get_logprobs_tensors(
        self, sampled: Tensor, num_sampled: Tensor, logits: Tensor, first: Tensor, first_np: Any, num_likeliest: int
    ) -> Any:
        """Called for some rows after the others. The first column is what was sampled."""
        slots = self.slots[self.num_rows_done : self.num_rows_done + len(logits)]
        self.num_rows_done += len(logits)
        about = sampled, num_sampled, logits, first, first_np
        if self.wanted is None or not self.wanted[1]:
            return super()._get_logprobs_tensors(*about, num_likeliest)
        found = super()._get_logprobs_tensors(*about, 0)
        return compute_topk_scores(
            logits,
            self.wanted[0],
            found.logprob_token_ids[:, 0],
            found.cu_num_generated_tokens,
            self.sampler.logprob_token_ids_state,
            slots,
            self.wanted[1],
            self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )


class DraftSampler:
    """Stands in for vLLM's sampler, whose other attributes are read through it.

    Args:
        sampler: vLLM's own.
        state: the `DraftModelState`.
    """

    def __init__(self, sampler: Any, state: Any):
        self.sampler, self.state = sampler, state
        options = SimpleNamespace(
            num_speculative_tokens=state.settings.num_extra,
            rejection_sample_method="standard",
            draft_sample_method="greedy",
            enable_adaptive_verification=False,
            synthetic_acceptance_rates=None,
        )
        self.verify = Verification(sampler, options, state.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["sampler"], name)

    def __call__(self, logits: Tensor, input_batch: Any) -> Any:
        state = self.state
        slots = input_batch.idx_mapping[: input_batch.num_reqs]
        if not input_batch.num_draft_tokens:
            state.num_drafts[slots] = 0
            state.draft_tokens[slots] = state.only_masks.to(state.draft_tokens.dtype)
            return self.sampler(logits, input_batch)
        states = state.model.sampled_states  # of the rows of `logits`
        first = input_batch.cu_num_logits[:-1]
        num_extra = input_batch.cu_num_logits[1:] - first - 1  # [R] 0 of a request that still reads its prompt
        num_drafts = torch.minimum(state.num_drafts[slots], num_extra)
        per_row = torch.repeat_interleave(num_drafts, num_extra + 1, output_size=len(logits))
        output = self.verify(logits, input_batch, None, input_batch.expanded_local_pos > per_row)

        num_sampled = output.num_sampled[: len(slots)]
        last = (num_sampled.long() - 1).clamp(min=0)
        decided = output.sampled_token_ids.gather(1, last[:, None])[:, 0].long()
        first_mask = first + num_drafts + 1
        num_masks = (num_extra - num_drafts) * (num_sampled == num_drafts + 1)  # that speak of what follows
        self._write_drafts(logits, states, slots, first_mask, num_masks, decided)
        return output

    def _write_drafts(
        self, logits: Tensor, states: Tensor, slots: Tensor, first_mask: Tensor, num_masks: Tensor, decided: Tensor
    ) -> None:
        """The next draft after the token `decided` [R], and masks right after it.

        Args:
            first_mask: [R] the row of each request's first mask. Its own prediction is never read: what the network
                decided stands there.
            num_masks: [R] from there on; 0 of requests whose drafts did not all stand, which get masks only.
        """
        state, num_slots = self.state, self.state.settings.longest_draft
        places = first_mask.long()[:, None] + torch.arange(1, num_slots + 1, device=logits.device)
        ids, confidences = draft_chain(
            state.model, state.head, states, logits, places.clamp(max=len(logits) - 1), decided
        )
        is_read = torch.arange(1, num_slots + 1, device=logits.device) < num_masks[:, None]
        is_kept = (confidences.cumprod(dim=1) > state.settings.keep) & is_read
        num_kept = is_kept.sum(dim=1, dtype=torch.int32)
        # the drafts, masks right after them, and fillers
        place = torch.arange(state.settings.num_extra, device=logits.device) - num_kept[:, None]  # [R, S]
        extra = state.only_masks[place.clamp(min=0)]
        extra[:, :num_slots] = torch.where(is_kept, ids, extra[:, :num_slots])
        state.num_drafts[slots] = num_kept
        state.draft_tokens[slots] = extra.to(state.draft_tokens.dtype)
