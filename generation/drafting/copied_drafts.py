"""Drafts copied from the text, where it repeats itself: edited code, quotes, JSON over a given schema.

A unfinished rows, N tokens of a draft, K the most.
"""

from itertools import accumulate
from operator import mul

import torch
from torch import Tensor, nn

from ..transcript import Transcript
from .draft_planner import RECORD_WEIGHT, Acceptance, DraftPlanner, OnePlan, slot_chances
from .draft_step import Plan, StepState
from .options_tidar import TiDAROptions

LONGEST = 16  # repeated tokens that are told apart: after more, a text goes on repeating as surely
MOST_PLACES = 32  # earlier places, from the latest on, that are compared for the longest repetition
COPY_WEIGHT = 2.0  # tokens that the first guess of a copy's chance counts for


class Repeats:
    """Where one text has said its last tokens before, and how surely it goes on as it did there.

    Attributes:
        ids: the text.
        places: for each two tokens, where the text goes on after them.
        source: the place after the longest repetition; None where the last two tokens are new.
        length: how many of the last tokens repeat, at most `LONGEST`.
        seen, stood: by `length`, tokens that came after so many repeated ones, and those that repeated too.
    """

    def __init__(self, prompt_ids: list[int]):
        self.ids: list[int] = []
        self.places: dict[tuple[int, ...], list[int]] = {}
        self.source: int | None = None
        self.length = 0
        self.seen, self.stood = ([0.0] * (LONGEST + 1) for _ in range(2))
        self.num_given = len(prompt_ids)
        for token in prompt_ids:
            self.add(token)

    def extend(self, new_ids: list[int]) -> None:
        """Takes in what is new of all tokens after the prompt."""
        for token in new_ids[len(self.ids) - self.num_given :]:
            self.add(token)

    def add(self, token: int) -> None:
        """Takes in the text's next token."""
        stands = self.source is not None and self.ids[self.source] == token
        if self.source is not None:
            self.seen[self.length] += 1
            self.stood[self.length] += stands
        self.ids.append(token)
        places = self.places.setdefault(tuple(self.ids[-2:]), [])
        if self.source is not None and stands:
            self.source, self.length = self.source + 1, min(self.length + 1, LONGEST)
        else:
            longest = max(((self.repeated(place), place) for place in places[-MOST_PLACES:]), default=(0, None))
            self.length, self.source = longest
        if len(self.ids) > 1:
            places.append(len(self.ids))

    def repeated(self, place: int) -> int:
        """How many of the tokens before a place are the last ones."""
        length = 0
        while length < min(LONGEST, place) and self.ids[place - 1 - length] == self.ids[-1 - length]:
            length += 1
        return length

    def copy(self, most: int, excluded_id: int | None) -> list[int]:
        """Up to `most` tokens that followed; the copy of a place near the end reads on in itself."""
        if self.source is None:
            return []
        period = len(self.ids) - self.source
        ids = [self.ids[self.source + i % period] for i in range(most)]
        return ids[: ids.index(excluded_id)] if excluded_id in ids else ids

    def chances(self, num: int) -> list[float]:
        """That each of so many copied tokens stands after those before it: a repetition of n tokens goes on, at first
        guess, with n of n + 2."""
        lengths = [min(self.length + i, LONGEST) for i in range(num)]
        guesses = [COPY_WEIGHT * n / (n + 2) for n in lengths]
        return [
            (self.stood[n] + guess) / (self.seen[n] + COPY_WEIGHT) for n, guess in zip(lengths, guesses, strict=True)
        ]


class CopiedDrafts:
    """Puts a copy in the place of each draft of which fewer tokens are expected.

    A row goes by what its own text has shown, never by what was drawn for the draft at hand. So its text does not
    depend on its batch, and rejection sampling stays exact.

    Args:
        is_real: [B, P or more] false for padding, or None.
        options: of the decode; without `draft_copies` nothing is copied.
    """

    def __init__(self, transcript: Transcript, is_real: Tensor | None, options: TiDAROptions):
        self.transcript, self.options, self.slot_chances = transcript, options, slot_chances(options)
        self.texts: list[Repeats] = []
        if options.draft_copies:
            prompt_ids = transcript.ids[:, : transcript.prompt_length]
            rows = [ids if is_real is None else ids[is_real[row, : len(ids)]] for row, ids in enumerate(prompt_ids)]
            self.texts = [Repeats(ids.tolist()) for ids in rows]
        num_slots = len(self.slot_chances)
        self.of_masks = [Acceptance([0.0] * num_slots, [0.0] * num_slots) for _ in self.texts]

    def offer(
        self, state: StepState, drafted: list[int], plan: Plan, planner: DraftPlanner | OnePlan
    ) -> tuple[StepState, list[int], list[int]]:
        """The state with copies.

        Args:
            drafted: tokens of each row's draft that count.

        Returns:
            also, for each row, how many tokens count now, and how many of them the masks have drafted: 0 of a copy.
        """
        copies = {}
        for place, row in enumerate(self.transcript.active if self.texts else ()):
            self.texts[row].extend(self.transcript.new_ids[row])
            if found := self.copy(row, drafted[place], plan, planner):
                copies[place] = found
        if not copies:
            return state, drafted, drafted
        lengths = [1 + len(copies[place]) if place in copies else length for place, length in enumerate(drafted)]
        of_masks = [0 if place in copies else length for place, length in enumerate(drafted)]
        return with_copies(state, copies), lengths, of_masks

    def copy(self, row: int, num_drafted: int, plan: Plan, planner: DraftPlanner | OnePlan) -> list[tuple[int, float]]:
        """A row's copied ids with their chances, if more of them are expected to stand than of the masks' draft."""
        ids = self.texts[row].copy(self.options.draft_length - 1, self.options.excluded_id)
        chances = self.texts[row].chances(len(ids))
        chances = chances[: planner.num_copied(plan, chances)]
        slots = range(num_drafted - 1)
        of_masks = [self.of_masks[row].chance(slot, self.slot_chances[slot], RECORD_WEIGHT) for slot in slots]
        return list(zip(ids, chances, strict=False)) if expected(chances) > expected(of_masks) else []

    def saw(self, of_masks: list[int], num_tokens: int, counts: list[int]) -> None:
        """Takes in a step that read N tokens: how many of each row the masks had drafted, and how many stood."""
        for row, drafted, count in zip(self.transcript.active, of_masks, counts, strict=True):
            if self.texts and (length := min(drafted, num_tokens)) > 1:
                self.of_masks[row].see([(length, count)])


def expected(chances: list[float]) -> float:
    """How many tokens stand, each with its chance after those before it."""
    return sum(accumulate(chances, mul))


def with_copies(state: StepState, copies: dict[int, list[tuple[int, float]]]) -> StepState:
    """The state with copied ids and their chances in the rows at some places. A copied token is certain to be drafted:
    its distribution is one-hot."""
    longest = max(map(len, copies.values()))
    state = state.with_length(max(1 + longest, state.draft_ids.shape[1]))
    num_slots, device, places = state.draft_ids.shape[1] - 1, state.draft_ids.device, list(copies)
    padded = [[*copy, *[(0, 0.0)] * (num_slots - len(copy))] for copy in copies.values()]
    ids = torch.tensor([[token for token, _ in copy] for copy in padded], device=device)
    draft_ids, confidence, num_drafted, draft_probs = (tensor.clone() for tensor in state[:4])
    draft_ids[places, 1:] = ids
    confidence[places] = torch.tensor([[chance for _, chance in copy] for copy in padded], device=device)
    num_drafted[places] = torch.tensor([1 + len(copy) for copy in copies.values()], device=device)
    if vocab_size := draft_probs.shape[2]:
        draft_probs[places] = nn.functional.one_hot(ids, vocab_size).to(draft_probs.dtype)
    return StepState(draft_ids, confidence, num_drafted, draft_probs, *state[4:])
