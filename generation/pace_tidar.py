"""How much to draft next: what a forward costs on this machine against what drafts have been worth.

A rows, K tokens drafted at a time, B branches.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .draft_forward import DraftForward

MEASURING_SECONDS = 1.0  # or three rounds, whichever takes longer
MARGIN = 1.03  # drafting must promise this much more than plain decoding, which is certain
RETRY_FORWARDS = 48  # of one kind, plain or drafting, before the other is tried: a try costs about half a forward
PRIOR_CHANCE, PRIOR_WEIGHT = 0.6, 4.0  # of acceptance, in forwards, where little was seen
# Weights of the last forward of a shape in what such a forward is taken to cost: what holds it up only ever adds time.
SLOWER, FASTER = 0.1, 0.5
FORGETTING = 0.99  # what a forward seen is worth one forward later


@dataclass(frozen=True)
class Plan:
    """A way to go on: drafts of K tokens behind each of B numbers of accepted tokens.

    B = 0 verifies in one forward and drafts in the next. K = 0 is plain decoding: one token a forward.
    """

    draft_length: int
    num_branches: int


PLAIN = Plan(0, 0)


@dataclass
class Costs:
    """Seconds of a forward of N clean tokens and M blocks of K masks, by (N, M, K)."""

    seconds: dict[tuple[int, int, int], float]

    @classmethod
    def measured(cls, shapes: list[tuple[int, int, int]], run: Callable[[int, int, int], None]) -> "Costs":
        """Runs all shapes in turn, again and again. The first round warms up; of the others the least time counts."""
        seconds = dict.fromkeys(shapes, float("inf"))
        start = time.perf_counter()
        num_rounds = 0
        while num_rounds < 3 or time.perf_counter() - start < MEASURING_SECONDS:
            for shape in shapes:
                begin = time.perf_counter()
                run(*shape)
                taken = time.perf_counter() - begin
                seconds[shape] = taken if num_rounds < 2 else min(seconds[shape], taken)
            num_rounds += 1
        return cls(seconds)


@dataclass
class Pace:
    """Chooses the plan that promises the most tokens a second, from costs and from the running acceptance.

    Attributes:
        reached, stood: [K] how many drafts were right up to token i, and how many of them at the next token too; what
            is long ago counts less.
        num_plain, num_drafting: forwards since the other kind was last run.
    """

    costs: Costs
    plans: list[Plan]
    reached: list[float] = field(default_factory=list)
    stood: list[float] = field(default_factory=list)
    num_plain: int = 0
    num_drafting: int = 0

    def __post_init__(self) -> None:
        longest = max(plan.draft_length for plan in self.plans)
        self.reached, self.stood = [0.0] * longest, [0.0] * longest

    def chance(self, i: int) -> float:
        """That draft token i + 1 stands, where the first i do."""
        return (self.stood[i] + PRIOR_CHANCE * PRIOR_WEIGHT) / (self.reached[i] + PRIOR_WEIGHT)

    def tokens_per_second(self, plan: Plan) -> float:
        """Of a forward that verifies, and of the forward that drafts behind it where no branch came true."""
        seconds = self.costs.seconds
        if plan == PLAIN:
            return 1 / seconds[1, 0, 0]
        length, num_branches = plan.draft_length, plan.num_branches
        reaches = [1.0]
        for i in range(1, length):
            reaches.append(reaches[-1] * self.chance(i))
        stops = [here - further for here, further in pairwise([*reaches, 0.0])]
        is_missed = 1 - sum(sorted(stops, reverse=True)[:num_branches])
        num_tokens = sum(reaches) + is_missed
        mask_length = length if num_branches else 0
        return num_tokens / (seconds[length, num_branches, mask_length] + is_missed * seconds[1, 1, length])

    def choose(self) -> Plan:
        """The plan of the next forward."""
        best = max(self.plans, key=self.tokens_per_second)
        if self.tokens_per_second(best) > MARGIN * self.tokens_per_second(PLAIN):
            return best if self.num_drafting < RETRY_FORWARDS else PLAIN
        return best if self.num_plain >= RETRY_FORWARDS else PLAIN

    def see(self, accepted: list[tuple[int, int]], shape: tuple[int, int, int], seconds: float) -> None:
        """Takes in what a forward did: for each row the length of the draft it read, and how much of it stood; and what
        it cost with all that is done around it."""
        known = self.costs.seconds
        if shape in known:
            known[shape] += (SLOWER if seconds > known[shape] else FASTER) * (seconds - known[shape])
        drafts = [(length, count) for length, count in accepted if length > 1]
        self.num_plain = 0 if drafts else self.num_plain + 1
        self.num_drafting = 0 if shape == (1, 0, 0) else self.num_drafting + 1
        if not drafts:
            return
        for counts in (self.reached, self.stood):
            counts[:] = [FORGETTING * count for count in counts]
        for length, count in drafts:
            for i in range(1, min(count + 1, length)):
                self.reached[i] += 1 / len(drafts)
                self.stood[i] += (i < count) / len(drafts)


def plans_up_to(draft_length: int, is_wide: bool) -> list[Plan]:
    """Drafts of K, K/2, K/4 .. 2 tokens, behind 0 to 2 numbers of accepted tokens, or all where width is cheap."""
    lengths = [length for length in (draft_length >> i for i in range(8)) if length > 1]
    plans = [Plan(length, branches) for length in lengths for branches in (0, 1, 2)]
    return plans + [Plan(length, length) for length in lengths if is_wide and length > 2]


def shapes_of(plans: list[Plan]) -> list[tuple[int, int, int]]:
    """The forwards these plans run: clean tokens, blocks, masks of a block."""
    shapes = [(1, 0, 0)]
    for plan in plans:
        mask_length = plan.draft_length if plan.num_branches else 0
        shapes += [(plan.draft_length, plan.num_branches, mask_length), (1, 1, plan.draft_length)]
    return list(dict.fromkeys(shapes))


_paces: WeakKeyDictionary[nn.Module, dict[Any, Pace]] = WeakKeyDictionary()


def pace_of(forward: DraftForward, draft_length: int) -> Pace:
    """The pace of one model on one device, in one dtype and for so many rows; measured the first time, over the prompt
    that `forward` has just read."""
    model = forward.model
    about = model.dtype, model.device, model.config._attn_implementation, forward.is_tie_safe
    key = *about, len(forward.rows), draft_length
    known = _paces.setdefault(model, {})
    if key not in known:
        plans = plans_up_to(draft_length, is_wide=model.device.type != "cpu")
        known[key] = Pace(Costs.measured(shapes_of(plans), forward.rehearse), plans)
    return known[key]
