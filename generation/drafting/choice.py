"""How the next token is chosen: greedily, or by sampling. Both verify a draft and write the next one.

A unfinished rows, K the most tokens drafted at a time, N of them in the draft at hand, V vocabulary.
"""

from typing import Any

import torch

from ..acceptance import accept_by_equality, accept_by_rejection, draft_confidence, residual_probs, sample
from ..processed_scores import ProcessedScores
from .draft_step import Decided, Draft, StepState
from .mask_predictions import SlotPredictions


def decided_run(draft_ids: torch.Tensor, num_accepted: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
    """What a forward decides, [A, N]: draft tokens 2..a, then the model's own next token; the rest is undecided.

    Draft token 1 was decided by the forward before.
    """
    place = torch.arange(draft_ids.shape[1], device=draft_ids.device)
    shifted_ids = torch.cat([draft_ids[:, 1:], next_ids[:, None]], dim=1)
    return torch.where(place == num_accepted[:, None] - 1, next_ids[:, None], shifted_ids)


def last_decided(ids: torch.Tensor, num_decided: torch.Tensor) -> torch.Tensor:
    return ids.gather(1, num_decided[:, None] - 1)  # [A, 1]


def best_ids(scores: torch.Tensor) -> torch.Tensor:
    """argmax of [..., V], the first of equals. (In bfloat16, `argmax` takes a CPU twice as long as `max`.)"""
    return scores.max(dim=-1).indices


class Choice:
    """What greedy decoding and sampling share: where processors look for their prefixes.

    Processors that read prefixes are called on the host, so a step with them waits once more for the device, and is
    not captured.

    Args:
        keeps_scores: whether a caller wants what each token was chosen by.

    Attributes:
        is_pure: whether verifying and drafting are functions of tensors alone.
    """

    def __init__(self, scores: ProcessedScores, keeps_scores: bool = False):
        self.scores = scores
        self.keeps_scores = keeps_scores
        self.is_pure = False

    def first(self, target_logits: torch.Tensor) -> Decided:
        """Decides the first token from the prefill's logits [A, 1, V]."""
        raise NotImplementedError

    def verify(self, state: StepState, target_logits: torch.Tensor) -> Decided:
        """Decides 1 to N tokens by the logits after each token of the draft, [A, N, V]."""
        raise NotImplementedError

    def draft(self, decided: Decided, slots: SlotPredictions) -> Draft:
        """Writes the next draft: the last decided token, then what the masks predict."""
        raise NotImplementedError

    def keep_rows(self, places: list[int]) -> None:
        """Takes every other row out of the decode."""

    def target_scores(self, draft_ids: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
        """Processed scores after each token of a draft, [A, N, V]."""
        if self.scores.depend_on_prefix:
            self.scores.transcript.write_undecided(draft_ids[:, 1:])
        return self.scores(target_logits)

    def decided(self, ids: torch.Tensor, num: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor) -> Decided:
        return Decided(ids, num, (logits, scores) if self.keeps_scores else None)

    def prefix_starts(self, decided: Decided) -> list[int] | None:
        """The ids before the first slot of each row's next draft, -1 for a row that ends here; None where no processor
        reads prefixes. What is decided is written where processors look for it."""
        if not self.scores.depend_on_prefix:
            return None
        transcript = self.scores.transcript
        transcript.write_undecided(decided.ids)
        counts, ids = decided.num_accepted.tolist(), decided.ids.tolist()
        ends = [transcript.ends_within(a, ids[a][:count]) for a, count in enumerate(counts)]
        starts = transcript.starts(ahead=counts)
        return [-1 if is_last else start for start, is_last in zip(starts, ends, strict=True)]

    def slot_scores(
        self, slots: SlotPredictions, slot: int, width: int, previous: torch.Tensor, starts: list[int] | None
    ) -> torch.Tensor:
        """Processed scores [A, width, V] of slots from `slot` on, after the tokens `previous` [A, 1] before them."""
        logits = slots.chain.logits_behind(slot, previous) if slots.chain else slots.logits[:, slot : slot + width]
        if starts is None:
            return self.scores(logits)
        return self.scores(logits, [start if start < 0 else start + slot for start in starts])

    def write_slot(self, ids: torch.Tensor, slot: int, starts: list[int] | None) -> None:
        """Puts drafted ids [A, 1] where processors look for the prefix of the next slot."""
        if starts is None:
            return
        transcript = self.scores.transcript
        lengths = transcript.starts()
        ahead = [max(start - length, 0) for start, length in zip(starts, lengths, strict=True)]
        transcript.write_undecided(ids, offset=slot, ahead=ahead)

    def width_of_slots(self, slots: SlotPredictions) -> int:
        """How many slots are scored at once: one, where a slot hangs on the token before it."""
        return 1 if slots.chain or self.scores.depend_on_prefix else max(slots.logits.shape[1], 1)


class Greedy(Choice):
    """The most likely token; ids are compared, never probabilities.

    Args:
        wants_confidence: whether the drafter's probabilities are asked for, to choose branches by.
    """

    def __init__(self, scores: ProcessedScores, wants_confidence: bool = False, keeps_scores: bool = False):
        super().__init__(scores, keeps_scores)
        self.wants_confidence = wants_confidence
        self.is_pure = not scores.processors and not keeps_scores

    def first(self, target_logits: torch.Tensor) -> Decided:
        scores = self.scores(target_logits)
        ids = best_ids(scores)
        return self.decided(ids, torch.ones_like(ids[:, 0]), target_logits, scores)

    def verify(self, state: StepState, target_logits: torch.Tensor) -> Decided:
        draft_ids = state.draft_ids
        scores = self.target_scores(draft_ids, target_logits)
        target_ids = best_ids(scores)
        if draft_ids.shape[1] == 1:  # nothing was drafted
            return self.decided(target_ids, torch.ones_like(state.num_drafted), target_logits, scores)
        num_accepted = accept_by_equality(draft_ids, target_ids, state.num_drafted)
        ids = decided_run(draft_ids, num_accepted, last_decided(target_ids, num_accepted)[:, 0])
        return self.decided(ids, num_accepted, target_logits, scores)

    def draft(self, decided: Decided, slots: SlotPredictions) -> Draft:
        """Writes the next draft: the last decided token, then the masks' predictions."""
        ids = last_decided(decided.ids, decided.num_accepted)
        found = None
        if slots.chain and not self.scores.processors:
            found = slots.chain.likeliest_behind(ids, self.scores.excluded_id)
        drafted, confidence = found or self._slot_by_slot(decided, slots, ids)
        probs = confidence.new_empty(*confidence.shape, 0)
        return Draft(torch.cat([ids, drafted], dim=1), confidence, 1 + slots.num_masks, probs)

    def _slot_by_slot(
        self, decided: Decided, slots: SlotPredictions, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_slots, width = slots.logits.shape[1], self.width_of_slots(slots)
        starts = self.prefix_starts(decided) if num_slots else None
        drafted, confidences = [ids], [slots.logits.new_zeros(len(ids), 0, dtype=torch.float32)]
        for slot in range(0, num_slots, width):
            scores = self.slot_scores(slots, slot, width, drafted[-1], starts)
            drafted.append(best_ids(scores))
            self.write_slot(drafted[-1], slot, starts)
            if self.wants_confidence:
                confidences.append(draft_confidence(drafted[-1], scores))
        confidence = torch.cat(confidences, dim=1)
        if not self.wants_confidence:
            confidence = slots.logits.new_zeros(len(ids), num_slots, dtype=torch.float32)
        return torch.cat(drafted[1:], dim=1) if num_slots else ids[:, :0], confidence


class TieSafeGreedy(Greedy):
    """Greedy decoding that asks again where the two best tokens of a position that counts are nearly tied: a forward
    of that one token, as plain decoding runs it, decides. Where such forwards have always given the wide forward's
    bits, they are asked no more.

    Args:
        network: reads single tokens again.
        tie_margin: the difference of the two best processed scores under which they are tied.
    """

    def __init__(
        self,
        scores: ProcessedScores,
        network: Any,
        tie_margin: float,
        wants_confidence: bool = False,
        keeps_scores: bool = False,
    ):
        super().__init__(scores, wants_confidence, keeps_scores)
        self.network = network
        self.tie_margin = tie_margin
        self.is_pure = False

    def verify(self, state: StepState, target_logits: torch.Tensor) -> Decided:
        kept, self.keeps_scores = self.keeps_scores, True
        try:
            decided = self._verify_again(state, target_logits)
        finally:
            self.keeps_scores = kept
        return decided if kept else decided._replace(chosen_by=None)

    def _verify_again(self, state: StepState, target_logits: torch.Tensor) -> Decided:
        decided = super().verify(state, target_logits)
        assert decided.chosen_by is not None
        first, second = decided.chosen_by[1].float().topk(2).values.unbind(-1)
        is_open = first - second < self.tie_margin  # [A, N]
        rounding = self.network.rounding
        place = torch.arange(state.draft_ids.shape[1], device=state.draft_ids.device)
        while not rounding.is_believed and (counts := is_open & (place < decided.num_accepted[:, None])).any():
            ties = counts & (counts.long().cumsum(dim=1) == 1)  # the first of each row: later ones hang on it
            for row, i in ties.nonzero().tolist():
                alone = self.network.read_alone(state, row, i)[0, 0]
                rounding.compare(alone, target_logits[row, i])
                target_logits[row, i] = alone
            is_open &= ~ties
            decided = super().verify(state, target_logits)
        return decided


class Sampled(Choice):
    """A draw from the processed distribution: speculative sampling with the autoregressive side as the target and
    the masks as the drafter (arXiv 2211.17192). Every processor and warper acts on both sides.

    Args:
        seeds: one for each row, so that a row's draws do not depend on the batch it is in; None draws from the
            device's global generator.
        draft_length: K. A forward draws the same number whatever a row's draft is worth, for the same reason.
    """

    def __init__(self, scores: ProcessedScores, seeds: list[int] | None, draft_length: int, keeps_scores: bool = False):
        super().__init__(scores, keeps_scores)
        self.draft_length = draft_length
        self.generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]

    def keep_rows(self, places: list[int]) -> None:
        if self.generators is not None:
            self.generators = [self.generators[place] for place in places]

    def _uniforms(self, like: torch.Tensor, num: int) -> torch.Tensor:
        """[A, num] draws from [0, 1)."""
        if self.generators is None:
            return torch.rand(len(like), num, device=like.device)
        return torch.stack([torch.rand(num, generator=g) for g in self.generators]).to(like.device)

    def first(self, target_logits: torch.Tensor) -> Decided:
        scores = self.scores(target_logits)
        ids = sample(scores.float().softmax(dim=-1), self._uniforms(target_logits, 1))
        return self.decided(ids, torch.ones_like(ids[:, 0]), target_logits, scores)

    def verify(self, state: StepState, target_logits: torch.Tensor) -> Decided:
        draft_ids, num_drafted = state.draft_ids, state.num_drafted
        scores = self.target_scores(draft_ids, target_logits)
        target_probs = scores.float().softmax(dim=-1)
        uniforms = self._uniforms(target_logits, self.draft_length)[:, : draft_ids.shape[1]]
        num_accepted = accept_by_rejection(draft_ids, target_probs, state.draft_probs, uniforms[:, 1:], num_drafted)
        residual = residual_probs(target_probs, state.draft_probs, num_accepted, num_drafted)
        ids = decided_run(draft_ids, num_accepted, sample(residual, uniforms[:, 0]))
        return self.decided(ids, num_accepted, target_logits, scores)

    def draft(self, decided: Decided, slots: SlotPredictions) -> Draft:
        """Draws the next draft: the last decided token, then one draw from each slot's distribution."""
        num_slots, width = slots.logits.shape[1], self.width_of_slots(slots)
        uniforms = self._uniforms(slots.logits, self.draft_length - 1)[:, :num_slots]
        starts = self.prefix_starts(decided) if num_slots else None
        ids = [last_decided(decided.ids, decided.num_accepted)]
        probs = [slots.logits[:, :0].float()]
        for slot in range(0, num_slots, width):
            probs.append(self.slot_scores(slots, slot, width, ids[-1], starts).float().softmax(dim=-1))
            ids.append(sample(probs[-1], uniforms[:, slot : slot + width]))
            self.write_slot(ids[-1], slot, starts)
        draft_ids, draft_probs = torch.cat(ids, dim=1), torch.cat(probs, dim=1)
        confidence = draft_probs.gather(2, draft_ids[:, 1:, None]).squeeze(2)
        return Draft(draft_ids, confidence, 1 + slots.num_masks, draft_probs)
