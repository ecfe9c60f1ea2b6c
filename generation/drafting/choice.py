"""How the next token is chosen: greedily, or by sampling. Both verify a draft and write the next one.

A unfinished rows, K the most tokens drafted at a time, N of them in the draft at hand, V vocabulary.
"""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..acceptance import accept_block, accept_by_equality, draft_confidence, sample
from ..processed_scores import ProcessedScores, refuse_none_allowed
from .draft_step import Decided, Draft, StepState
from .mask_predictions import SlotPredictions


def decided_run(draft_ids: Tensor, num_accepted: Tensor, next_ids: Tensor) -> Tensor:
    """What a forward decides, [A, N]: draft tokens 2..a, then the model's own next token, then anything."""
    place = torch.arange(draft_ids.shape[1], device=draft_ids.device)
    shifted_ids = torch.cat([draft_ids[:, 1:], next_ids[:, None]], dim=1)
    return torch.where(place == num_accepted[:, None] - 1, next_ids[:, None], shifted_ids)


def last_decided(ids: Tensor, num_decided: Tensor) -> Tensor:
    return ids.gather(1, num_decided[:, None] - 1)  # [A, 1]


def best_ids(scores: Tensor) -> Tensor:
    """argmax of [..., V], the first of equals. (In bfloat16, `argmax` takes a CPU twice as long as `max`.)"""
    return scores.max(dim=-1).indices


class Choice:
    """What greedy decoding and sampling share.

    Attributes:
        is_pure: whether verifying and drafting are functions of tensors alone, so that a step can be captured.
        trust: what the model's own logits count for; the masks' count for the rest.
    """

    def __init__(self, scores: ProcessedScores, trust: float = 1.0):
        self.scores = scores
        self.trust = trust
        self.is_pure = False

    def keep_rows(self, places: list[int]) -> None:
        """Takes every other row out of the decode."""

    def target_scores(self, draft_ids: Tensor, target_logits: Tensor) -> Tensor:
        """Processed scores after each token of a draft, [A, N, V]."""
        if self.scores.depend_on_prefix:
            self.scores.transcript.write_undecided(draft_ids[:, 1:])
        return self.scores(target_logits)

    def join(self, decided: Decided, num_drafted: Tensor) -> tuple[list[int], list[int]]:
        """Adds to the text. Returns the numbers of tokens, and `num_drafted`, on the host."""
        return self.scores.transcript.extend(decided.ids, decided.num_accepted, num_drafted, decided.chosen_by)

    def slot_by_slot(self, decided: Decided, slots: SlotPredictions, pick: Callable[[Tensor, int], Tensor]) -> Tensor:
        """The next draft, [A, 1 + slots]: the last decided token, then what `pick(scores [A, n, V], slot)` takes for n
        slots. n is 1 where a slot depends on the token before it."""
        ids, num_slots = [last_decided(decided.ids, decided.num_accepted)], slots.logits.shape[1]
        transcript, reads_prefix = self.scores.transcript, self.scores.depend_on_prefix
        if reads_prefix:
            transcript.write_undecided(decided.ids)
        ahead = decided.num_accepted.tolist() if reads_prefix else None
        width = 1 if slots.chain or reads_prefix else max(num_slots, 1)
        for slot in range(0, num_slots, width):
            logits = slots.chain.logits_after(slot, ids[-1]) if slots.chain else slots.logits[:, slot : slot + width]
            starts = transcript.starts(slot, ahead)
            ids.append(pick(self.scores(logits, starts), slot))
            if reads_prefix:
                transcript.write_undecided(ids[-1], starts)
        return torch.cat(ids, dim=1)

    def first(self, target_logits: Tensor) -> Decided:
        """Decides the first token by the prefill's logits [A, 1, V]."""
        scores = self.scores(target_logits)
        ids = self.pick(scores)  # type: ignore[attr-defined]
        return Decided(ids, torch.ones_like(ids[:, 0]), (target_logits, scores))


class Greedy(Choice):
    """The most likely token; ids are compared, never probabilities."""

    def __init__(self, scores: ProcessedScores, trust: float = 1.0):
        super().__init__(scores, trust)
        self.is_pure = not scores.processors and scores.transcript.token_scores is None

    def pick(self, scores: Tensor) -> Tensor:
        return best_ids(scores)

    def verify(self, state: StepState, target_logits: Tensor) -> Decided:
        """Decides 1 to N tokens by the logits after each token of the draft, [A, N, V]."""
        scores = self.target_scores(state.draft_ids, target_logits)
        return Decided(*self.run_of(state, scores), (target_logits, scores))

    def run_of(self, state: StepState, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The ids [A, N] that processed scores [A, N, V] decide, and how many they are [A]."""
        draft_ids, target_ids = state.draft_ids, best_ids(scores)
        num_accepted = accept_by_equality(draft_ids, target_ids, state.num_drafted)
        return decided_run(draft_ids, num_accepted, last_decided(target_ids, num_accepted)[:, 0]), num_accepted

    def draft(self, decided: Decided, slots: SlotPredictions) -> Draft:
        """Writes the next draft: the last decided token, then what the masks predict."""
        confidence = slots.logits.new_zeros(slots.logits.shape[:2], dtype=torch.float32)

        def pick(scores: Tensor, slot: int) -> Tensor:
            best = best_ids(self.favoured(scores, slot))
            confidence[:, slot : slot + best.shape[1]] = draft_confidence(best, scores)
            return best

        ids = self.slot_by_slot(decided, slots, pick)
        return Draft(ids, confidence, 1 + slots.num_masks, confidence.new_empty(*confidence.shape, 0))

    def favoured(self, scores: Tensor, slot: int) -> Tensor:
        """What slots from `slot` on go by."""
        return scores


class InOrder(Greedy):
    """Asks processors as plain decoding does: once a token, in order, for all rows. A token joins the text before the
    next is decided. Rows advance together, as far as all drafts stand and none ends.

    Args:
        seeds: one a row, to sample: the highest score plus Gumbel noise is a sample. Each place of a text has its own
            noise, for drafts too: a row's text depends on neither its batch nor its drafts. None is greedy.
    """

    def __init__(self, scores: ProcessedScores, seeds: list[int] | None, trust: float = 1.0):
        super().__init__(scores.of_drafts(), trust)
        self.in_order, self.seeds, self.is_pure = scores, seeds, False

    def keep_rows(self, places: list[int]) -> None:
        self.seeds = self.seeds and [self.seeds[place] for place in places]

    def first(self, target_logits: Tensor) -> Decided:
        return self._decide(target_logits, target_logits.new_empty(len(target_logits), 0))

    def verify(self, state: StepState, target_logits: Tensor) -> Decided:
        num_drafted = int(state.num_drafted.min())
        return self._decide(target_logits[:, :num_drafted], state.draft_ids[:, 1:num_drafted])

    def _decide(self, target_logits: Tensor, draft_ids: Tensor) -> Decided:
        """By logits [A, n, V], while draft ids [A, n - 1] stand."""
        transcript, decided = self.in_order.transcript, []
        one = torch.ones(len(draft_ids), dtype=torch.long, device=draft_ids.device)
        for logits, *drafted in zip_longest(target_logits.split(1, dim=1), draft_ids.split(1, dim=1)):
            scores = self.in_order(logits)
            if self.seeds is not None:
                refuse_none_allowed(scores, self.in_order)
            decided.append(best_ids(self.favoured(scores, 0)))
            transcript.extend(decided[-1], one, one, (logits, scores))
            has_ended = any(transcript.is_ended[row] for row in transcript.active)
            if has_ended or drafted[0] is None or not torch.equal(decided[-1], drafted[0]):
                break
        return Decided(torch.cat(decided, dim=1), one * len(decided))

    def join(self, decided: Decided, num_drafted: Tensor) -> tuple[list[int], list[int]]:
        return decided.num_accepted.tolist(), num_drafted.tolist()

    def favoured(self, scores: Tensor, slot: int) -> Tensor:
        if self.seeds is None:
            return scores
        transcript = self.in_order.transcript
        waits = torch.empty(scores.shape)
        for a, (seed, start) in enumerate(zip(self.seeds, transcript.starts(slot), strict=True)):
            for i, one in enumerate(waits[a]):
                place = start + i - transcript.prompt_length
                one.exponential_(generator=torch.Generator().manual_seed(hash((seed, place)) % 2**63))
        return scores.float() - waits.clamp(min=1e-30).log().to(scores.device)


class TieSafeGreedy(Greedy):
    """Greedy decoding in which a forward of one token, as plain decoding runs it, decides near-ties. Where such
    forwards have always given the wide forward's bits, they are no longer asked."""

    def __init__(self, scores: ProcessedScores, network: Any, tie_margin: float):
        super().__init__(scores)
        self.network = network
        self.tie_margin = tie_margin
        self.is_pure = False

    def verify(self, state: StepState, target_logits: Tensor) -> Decided:
        scores = self.target_scores(state.draft_ids, target_logits)
        ids, num_accepted = self.run_of(state, scores)
        first, second = scores.float().topk(2).values.unbind(-1)
        is_open = first - second < self.tie_margin  # [A, N]
        rounding = self.network.form.rounding
        place = torch.arange(state.draft_ids.shape[1], device=state.draft_ids.device)
        while not rounding.is_believed and (counts := is_open & (place < num_accepted[:, None])).any():
            ties = counts & (counts.long().cumsum(dim=1) == 1)  # the first of each row: later ones depend on it
            for row, i in ties.nonzero().tolist():
                alone = self.network.read_alone(state, row, i)[0, 0]
                rounding.compare(alone, target_logits[row, i])
                target_logits[row, i] = alone
            is_open &= ~ties
            scores = self.target_scores(state.draft_ids, target_logits)
            ids, num_accepted = self.run_of(state, scores)
        return Decided(ids, num_accepted, (target_logits, scores))


class Sampled(Choice):
    """Speculative sampling (arXiv 2211.17192), a draft at a time: the autoregressive side is the target, the masks are
    the drafter. Every processor and warper acts on both.

    Args:
        seeds: one for each row, so that a row's draws do not depend on its batch; None draws from the device's global
            generator.
        draft_length: K. For the same reason, a forward always draws as many numbers as for a whole draft.
    """

    def __init__(self, scores: ProcessedScores, seeds: list[int] | None, draft_length: int):
        super().__init__(scores)
        self.draft_length = draft_length
        self.generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]

    def keep_rows(self, places: list[int]) -> None:
        if self.generators is not None:
            self.generators = [self.generators[place] for place in places]

    def _uniforms(self, like: Tensor, num: int) -> Tensor:
        """[A, num] draws from [0, 1)."""
        if self.generators is None:
            return torch.rand(len(like), num, device=like.device)
        return torch.stack([torch.rand(num, generator=g) for g in self.generators]).to(like.device)

    def pick(self, scores: Tensor) -> Tensor:
        refuse_none_allowed(scores, self.scores)
        return sample(scores.float().softmax(dim=-1), self._uniforms(scores, 1))

    def verify(self, state: StepState, target_logits: Tensor) -> Decided:
        draft_ids, num_drafted = state.draft_ids, state.num_drafted
        scores = self.target_scores(draft_ids, target_logits)
        target_probs = scores.float().softmax(dim=-1)
        uniforms = self._uniforms(target_logits, self.draft_length)[:, : draft_ids.shape[1]]
        if self.scores.depend_on_prefix:  # a draft ends where no token may follow
            goes_on = scores.isfinite().any(dim=-1)[:, :-1].long().cumprod(dim=1)
            num_drafted = num_drafted.minimum(1 + goes_on.sum(dim=1))
        num_accepted, left = accept_block(draft_ids, target_probs, state.draft_probs, uniforms[:, 1:], num_drafted)
        if self.scores.depend_on_prefix:
            refuse_none_allowed(left, self.scores)
        ids = decided_run(draft_ids, num_accepted, sample(left, uniforms[:, 0]))
        return Decided(ids, num_accepted, (target_logits, scores))

    def draft(self, decided: Decided, slots: SlotPredictions) -> Draft:
        uniforms = self._uniforms(slots.logits, self.draft_length - 1)
        probs = [slots.logits[:, :0].float()]

        def pick(scores: Tensor, slot: int) -> Tensor:
            probs.append(scores.float().softmax(dim=-1))
            return sample(probs[-1], uniforms[:, slot : slot + scores.shape[1]])

        ids, draft_probs = self.slot_by_slot(decided, slots, pick), torch.cat(probs, dim=1)
        confidence = draft_probs.gather(2, ids[:, 1:, None]).squeeze(2)
        return Draft(ids, confidence, 1 + slots.num_masks, draft_probs)
