"""How the next token is chosen: greedily, or by sampling. Both verify a draft and write the next one.

A unfinished rows, K the most tokens drafted at a time, N of them in the draft at hand, V vocabulary.
"""

import torch

from ..acceptance import accept_by_equality, accept_by_rejection, draft_confidence, residual_probs, sample
from ..transcript import Scores
from .draft_forward import DraftForward
from .draft_head import DraftChain


def decided_run(draft_ids: torch.Tensor, num_accepted: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
    """What a forward decides, [A, N]: draft tokens 2..a, then the model's own next token; the rest is undecided.

    Draft token 1 was decided by the forward before.
    """
    place = torch.arange(draft_ids.shape[1], device=draft_ids.device)
    shifted_ids = torch.cat([draft_ids[:, 1:], next_ids[:, None]], dim=1)
    return torch.where(place == num_accepted[:, None] - 1, next_ids[:, None], shifted_ids)


def last_decided(decided_ids: torch.Tensor, num_decided: torch.Tensor) -> torch.Tensor:
    return decided_ids.gather(1, num_decided[:, None] - 1)  # [A, 1]


def best_ids(scores: torch.Tensor) -> torch.Tensor:
    """argmax of [..., V], the first of equals. (In bfloat16, `argmax` takes a CPU twice as long as `max`.)"""
    return scores.max(dim=-1).indices


class Greedy:
    """The most likely token; ids are compared, never probabilities.

    Attributes:
        target_scores: [A, n, V] processed logits of the autoregressive side that the last decision was made from.
        confidence: [A, N - 1] probability the masks gave the draft tokens behind the first; where it is wanted.
    """

    def __init__(self, scores: Scores, wants_confidence: bool = False):
        self.scores = scores
        self.wants_confidence = wants_confidence

    def first(self, target_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decides the first token from the prefill's logits [A, 1, V]: ids [A, 1] and their number [A]."""
        self.target_scores = self.scores(target_logits)
        ids = best_ids(self.target_scores)
        return ids, torch.ones_like(ids[:, 0])

    def verify(
        self, draft_ids: torch.Tensor, target_logits: torch.Tensor, num_drafted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decides 1 to N tokens from a draft [A, N], of which the first `num_drafted` [A] count, and the logits behind
        each of its tokens [A, N, V]."""
        if self.scores.depend_on_prefix:
            self.scores.transcript.write_undecided(draft_ids[:, 1:])
        self.target_scores = self.scores(target_logits)
        target_ids = best_ids(self.target_scores)
        if draft_ids.shape[1] == 1:  # nothing was drafted
            return target_ids, torch.ones_like(num_drafted)
        num_accepted = accept_by_equality(draft_ids, target_ids, num_drafted)
        return decided_run(draft_ids, num_accepted, last_decided(target_ids, num_accepted)[:, 0]), num_accepted

    def draft(
        self,
        decided_ids: torch.Tensor,
        num_decided: torch.Tensor,
        draft_logits: torch.Tensor,
        chain: DraftChain | None = None,
    ) -> torch.Tensor:
        """Writes the next draft [A, N]: the last decided token, then the masks' predictions [A, N - 1, V], each mended
        for the token before it where there is a chain."""
        draft_ids = last_decided(decided_ids, num_decided)
        likeliest = None
        if chain and not self.scores.processors:
            likeliest = chain.likeliest_behind(draft_ids, self.scores.excluded_id)
        if likeliest is not None:
            ids, self.confidence = likeliest
            return torch.cat([draft_ids, ids], dim=1)
        confidences = [draft_logits.new_empty(len(draft_ids), 0, dtype=torch.float32)]
        num_slots = draft_logits.shape[1]
        step = 1 if chain or self.scores.depend_on_prefix else max(num_slots, 1)  # slots whose prefix is known
        for slot in range(0, num_slots, step):
            logits = chain.logits_behind(slot, draft_ids[:, -1:]) if chain else draft_logits[:, slot : slot + step]
            scores = self.scores(logits, offset=slot)
            ids = best_ids(scores)
            if self.scores.depend_on_prefix:
                self.scores.transcript.write_undecided(ids, offset=slot)
            if self.wants_confidence:
                confidences.append(draft_confidence(ids, scores))
            draft_ids = torch.cat([draft_ids, ids], dim=1)
        self.confidence = torch.cat(confidences, dim=1)
        return draft_ids

    def keep_rows(self, places: list[int]) -> None:
        pass


class TieSafeGreedy(Greedy):
    """Greedy decoding that asks again where the two best tokens of a position that counts are nearly tied: a forward
    of that one token, as plain decoding runs it, decides. Where such forwards have always given the wide forward's
    bits, they are asked no more.

    Args:
        forward: reads single tokens again.
        tie_margin: the difference of the two best processed scores under which they are tied.
    """

    def __init__(self, scores: Scores, forward: DraftForward, tie_margin: float, wants_confidence: bool = False):
        super().__init__(scores, wants_confidence)
        self.forward = forward
        self.tie_margin = tie_margin

    def verify(
        self, draft_ids: torch.Tensor, target_logits: torch.Tensor, num_drafted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        decided_ids, num_accepted = super().verify(draft_ids, target_logits, num_drafted)
        first, second = self.target_scores.float().topk(2).values.unbind(-1)
        is_open = first - second < self.tie_margin  # [A, N]
        rounding = self.forward.rounding
        place = torch.arange(draft_ids.shape[1], device=draft_ids.device)
        while not rounding.is_believed and (counts := is_open & (place < num_accepted[:, None])).any():
            ties = counts & (counts.long().cumsum(dim=1) == 1)  # the first of each row: later ones hang on it
            for row, i in ties.nonzero().tolist():
                alone = self.forward.read_alone(row, draft_ids[row, i].view(1, 1), i)[0, 0]
                rounding.compare(alone, target_logits[row, i])
                target_logits[row, i] = alone
            is_open &= ~ties
            decided_ids, num_accepted = super().verify(draft_ids, target_logits, num_drafted)
        return decided_ids, num_accepted


class Sampled:
    """A draw from the processed distribution: speculative sampling with the autoregressive side as the target and
    the masks as the drafter (arXiv 2211.17192). Every processor and warper acts on both sides.

    Args:
        seeds: one for each row, so that a row's draws do not depend on the batch it is in; None draws from the
            device's global generator.
        draft_length: K. A forward draws the same number whatever a row's draft is worth, for the same reason.

    Attributes:
        target_scores, confidence: as of `Greedy`.
    """

    def __init__(self, scores: Scores, seeds: list[int] | None, draft_length: int):
        self.scores = scores
        self.draft_length = draft_length
        self.generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]

    def _uniforms(self, like: torch.Tensor, num: int) -> torch.Tensor:
        """[A, num] draws from [0, 1)."""
        if self.generators is None:
            return torch.rand(len(like), num, device=like.device)
        return torch.stack([torch.rand(num, generator=g) for g in self.generators]).to(like.device)

    def first(self, target_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decides the first token from the prefill's logits [A, 1, V]: ids [A, 1] and their number [A]."""
        self.target_scores = self.scores(target_logits)
        ids = sample(self.target_scores.float().softmax(dim=-1), self._uniforms(target_logits, 1))
        return ids, torch.ones_like(ids[:, 0])

    def verify(
        self, draft_ids: torch.Tensor, target_logits: torch.Tensor, num_drafted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decides 1 to N tokens from a draft [A, N], of which the first `num_drafted` [A] count, and the logits behind
        each of its tokens [A, N, V]."""
        if self.scores.depend_on_prefix:
            self.scores.transcript.write_undecided(draft_ids[:, 1:])
        self.target_scores = self.scores(target_logits)
        target_probs = self.target_scores.float().softmax(dim=-1)
        uniforms = self._uniforms(target_logits, self.draft_length)[:, : draft_ids.shape[1]]
        num_accepted = accept_by_rejection(draft_ids, target_probs, self.draft_probs, uniforms[:, 1:], num_drafted)
        residual = residual_probs(target_probs, self.draft_probs, num_accepted, num_drafted)
        next_ids = sample(residual, uniforms[:, 0])
        return decided_run(draft_ids, num_accepted, next_ids), num_accepted

    def draft(
        self,
        decided_ids: torch.Tensor,
        num_decided: torch.Tensor,
        draft_logits: torch.Tensor,
        chain: DraftChain | None = None,
    ) -> torch.Tensor:
        """Draws the next draft [A, N]: the last decided token, then one draw from each mask's [A, N - 1, V], each
        mended for the token before it where there is a chain."""
        num_slots = draft_logits.shape[1]
        uniforms = self._uniforms(draft_logits, self.draft_length - 1)[:, :num_slots]
        draft_ids, probs = [last_decided(decided_ids, num_decided)], [draft_logits[:, :0].float()]
        step = 1 if chain or self.scores.depend_on_prefix else max(num_slots, 1)  # slots whose prefix is known
        for slot in range(0, num_slots, step):
            logits = chain.logits_behind(slot, draft_ids[-1]) if chain else draft_logits[:, slot : slot + step]
            probs.append(self.scores(logits, offset=slot).float().softmax(dim=-1))
            draft_ids.append(sample(probs[-1], uniforms[:, slot : slot + step]))
            if self.scores.depend_on_prefix:
                self.scores.transcript.write_undecided(draft_ids[-1], offset=slot)
        self.draft_probs = torch.cat(probs, dim=1)
        self.confidence = self.draft_probs.gather(2, torch.cat(draft_ids, dim=1)[:, 1:, None]).squeeze(2)
        return torch.cat(draft_ids, dim=1)

    def keep_rows(self, places: list[int]) -> None:
        if self.generators is not None:
            self.generators = [self.generators[place] for place in places]
