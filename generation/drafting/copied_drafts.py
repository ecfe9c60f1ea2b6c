"""Drafts copied from the text, where it repeats itself: edited code, quotes, JSON over a given schema."""

from itertools import accumulate
from operator import mul

import torch
from torch import Tensor, nn

from ..transcript import Transcript
from .draft_planner import DraftPlanner, OnePlan, slot_chances
from .draft_step import Plan, StepState
from .options_tidar import TiDAROptions

LONGEST = 8

Copy = list[tuple[int, float]]


class Repeats:
    """Where a text has said its last tokens before, and how surely it goes on as it did there. At most `LONGEST`
    repeated tokens are told apart. A `Copy` has ids, and the chance of each after those before it.

    Attributes:
        places: where the text went on, the last time, after each 2 to `LONGEST` tokens.
        length, source: how many of the last tokens repeat (0: fewer than two), and where the text went on then.
        counts: by length, repetitions that went on for one token more, of how many. A first guess, n of n + 2, counts
            for two.
    """

    def __init__(self, prompt_ids: list[int]):
        self.ids: list[int] = []
        self.places: dict[tuple[int, ...], int] = {}
        self.length = self.source = 0
        self.counts = [(2 * n / (n + 2), 2) for n in range(LONGEST + 1)]
        for token in prompt_ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Takes in the next token."""
        if self.length:
            stood, seen = self.counts[self.length]
            self.counts[self.length] = stood + (self.ids[self.source] == token), seen + 1
        self.ids.append(token)
        runs = [tuple(self.ids[-n:]) for n in range(min(LONGEST, len(self.ids)), 1, -1)]
        longest = next((run for run in runs if run in self.places), ())
        self.length, self.source = len(longest), self.places.get(longest, 0)
        self.places |= dict.fromkeys(runs, len(self.ids))

    def copy(self, num_tokens: int, excluded_id: int | None) -> Copy:
        """What followed. A copy that reaches the end of the text reads on in itself."""
        found: Copy = []
        for i in range(num_tokens if self.length else 0):
            token = self.ids[self.source + i % (len(self.ids) - self.source)]
            if token == excluded_id:
                break
            stood, seen = self.counts[min(self.length + i, LONGEST)]
            found.append((token, stood / seen))
        return found


class CopiedDrafts:
    """Puts a copy in the place of each draft of which fewer tokens are expected.

    A row goes by its text and the checkpoint's record, never by what was drawn for its draft: its text does not depend
    on its batch, and sampling stays exact.

    Args:
        is_real: [B, P or more] false for padding, or None.
    """

    def __init__(self, transcript: Transcript, is_real: Tensor | None, options: TiDAROptions):
        self.new_ids, self.options = transcript.new_ids, options
        prompts = transcript.ids[:, : transcript.prompt_length]
        is_real = torch.ones_like(prompts).bool() if is_real is None else is_real[:, : prompts.shape[1]]
        rows = zip(prompts, is_real, strict=True) if options.draft_copies else ()
        self.texts = [Repeats(ids[real].tolist()) for ids, real in rows]
        self.record = slot_chances(options)

    def offer(
        self, state: StepState, rows: list[int], drafted: list[int], plan: Plan, planner: DraftPlanner | OnePlan
    ) -> tuple[StepState, list[int], list[int]]:
        """The state with copies; how many tokens of each draft count; and of `drafted`, by masks, 0 where a copy
        stands."""
        if not self.texts:
            return state, drafted, drafted
        found = [self.copy(row) for row in rows]
        both = [([chance for _, chance in copy], self.record[: n - 1]) for copy, n in zip(found, drafted, strict=True)]
        longest = planner.num_copied(plan, [max(masks, copy, key=expected) for copy, masks in both])
        gains = [expected(copy[:longest]) - expected(masks) for copy, masks in both]
        copies = {i: found[i][:longest] for i, gain in enumerate(gains) if gain > 0}
        if not copies:
            return state, drafted, drafted
        lengths = [1 + len(copies[place]) if place in copies else length for place, length in enumerate(drafted)]
        return with_copies(state, copies), lengths, [0 if i in copies else n for i, n in enumerate(drafted)]

    def copy(self, row: int) -> Copy:
        """What a row's text went on with, where it said its last tokens before."""
        text = self.texts[row]
        for token in self.new_ids[row]:
            text.add(token)
        self.new_ids[row].clear()
        return text.copy(self.options.draft_length - 1, self.options.excluded_id)


def expected(chances: list[float]) -> float:
    """How many tokens stand of those that have these chances, each after those before it."""
    return sum(accumulate(chances, mul))


def with_copies(state: StepState, copies: dict[int, Copy]) -> StepState:
    """The state with copies in the rows at some places. What they are drawn from is one-hot."""
    places, lengths = list(copies), [1 + len(copy) for copy in copies.values()]
    state = state.with_length(max(*lengths, state.draft_ids.shape[1]))
    num_slots, device = state.draft_ids.shape[1] - 1, state.draft_ids.device
    padded = [[*copy, *[(0, 0.0)] * (num_slots - len(copy))] for copy in copies.values()]
    of_copies = torch.tensor(padded, dtype=torch.double, device=device)  # [copied rows, N - 1, 2]
    ids, chances = of_copies[..., 0].long(), of_copies[..., 1].float()
    draft_ids, confidence, num_drafted, draft_probs = (tensor.clone() for tensor in state[:4])
    draft_ids[places, 1:], confidence[places] = ids, chances
    num_drafted[places] = torch.tensor(lengths, device=device)
    if vocab_size := draft_probs.shape[2]:
        draft_probs[places] = nn.functional.one_hot(ids, vocab_size).to(draft_probs.dtype)
    return StepState(draft_ids, confidence, num_drafted, draft_probs, *state[4:])
