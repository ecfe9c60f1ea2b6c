"""How much to draft next: what a step takes on this machine against what drafts have been worth.

A rows, K tokens drafted at a time, B branches.
"""

import time
from dataclasses import dataclass, field
from itertools import pairwise

from ..kept_with_model import kept_with
from .draft_step import PLAIN, Plan, StepState
from .options_tidar import TiDAROptions
from .step_runner import StepRunner
from .step_times import CREDIT_OF_A_TEXT, HELD_UP, MOST_CREDIT, NEWEST_OF_SHAPE, PLAIN_SHAPE, Shape, StepTimes

# Drafting must promise so much more than plain decoding, which is certain: promises lag behind texts. Steps that all
# have one shape keep them better.
MARGIN, STATIC_MARGIN = 1.2, 1.05
ALIKE = 0.95  # of plans that promise nearly the most, the one of the fewest queries: its promise hangs less on drafts
RETRY_FORWARDS = 48  # of one kind, plain or drafting, before the other is tried: a try costs about half a forward
MOST_FAILURES = 3  # drafting that goes on not paying is tried half as often each time, so many times
# Loss budget of one text, in plain forwards: 2% of `max_new_tokens` (at most 2) up front, plus 1% of the tokens written
# so far.
AT_ONCE, MOST_AT_ONCE, WITH_EACH_TOKEN = 0.02, 2.0, 0.01
# A text of its own begins with a try where drafts of the usual worth promise so much of plain decoding's rate.
FIRST_TRY, STATIC_FIRST_TRY = 0.9, 0.8
# Texts differ more in what drafts are worth than one text does in itself: each begins with the usual chance of
# acceptance, which soon counts for nothing beside its own.
PRIOR_CHANCE, PRIOR_WEIGHT = 0.6, 2.0  # the latter in forwards
FORGETTING = 0.97  # what a forward seen is worth one forward later


@dataclass
class DraftPlanner:
    """Chooses the plan that promises the most tokens a second, from costs and from the running acceptance of one call's
    texts.

    Attributes:
        is_static: a forward that only drafts has the shape of one that verifies too.
        reached, stood: [K] how many drafts were right up to token i, and how many of them at the next token too; what
            is long ago counts less.
        num_plain: forwards since a draft was last verified.
        num_drafting: forwards since the last plain one.
        num_failed: tries of drafting, one after the other, that did not pay.
        num_rows: of the batch, at the start.
        max_new_tokens: of a row.
        spent, progress: time of the forwards so far, in plain ones, and the tokens they gave the slowest unfinished
            row, which plain decoding would have given it in as many: a batch is done when its last row is.
        has_draft: whether the last forward drafted.
        late: tokens beyond the first that a forward was given by a block that came too early.
    """

    costs: StepTimes
    plans: list[Plan]
    is_static: bool = False
    reached: list[float] = field(default_factory=list)
    stood: list[float] = field(default_factory=list)
    num_plain: int = 0
    num_drafting: int = 0
    num_failed: int = 0
    num_rows: int = 1
    max_new_tokens: int = 512
    spent: float = 0.0
    progress: int = 0
    has_draft: bool = False
    late: float = 0.0
    began: float = 0.0

    def __post_init__(self) -> None:
        longest = max(plan.draft_length for plan in self.plans)
        self.reached, self.stood = [0.0] * longest, [0.0] * longest
        begins_with_try = self.num_rows == 1 and bool(self.costs.seconds)
        if begins_with_try and self.promise() > (STATIC_FIRST_TRY if self.is_static else FIRST_TRY):
            self.num_plain = RETRY_FORWARDS

    def chance(self, i: int) -> float:
        """That draft token i + 1 stands, where the first i do."""
        return (self.stood[i] + PRIOR_CHANCE * PRIOR_WEIGHT) / (self.reached[i] + PRIOR_WEIGHT)

    def tokens_per_second(self, plan: Plan) -> float:
        """Of a forward that verifies, and of the forward that drafts behind it where no branch came true."""
        seconds = self.costs.seconds
        if plan == PLAIN:
            return 1 / seconds[PLAIN_SHAPE]
        length, num_branches = plan.draft_length, plan.num_branches
        reaches = [1.0]
        for i in range(1, length):
            reaches.append(reaches[-1] * self.chance(i))
        stops = [here - further for here, further in pairwise([*reaches, 0.0])]
        is_missed = 1 - sum(sorted(stops, reverse=True)[:num_branches])
        num_tokens = sum(reaches) + is_missed * (1 + (self.late if num_branches else 0))
        both = seconds[length, num_branches, length if num_branches else 0]
        only_drafts = both if self.is_static else seconds[1, 1, length]
        return num_tokens / (both + is_missed * only_drafts)

    def promise(self) -> float:
        """The highest rate that a plan promises, to plain decoding's."""
        return max(map(self.tokens_per_second, self.plans)) / self.tokens_per_second(PLAIN)

    def forwards_of(self, shape: Shape) -> float:
        """What a forward of a known shape takes, in plain ones."""
        return self.costs.seconds[shape] / self.costs.seconds[PLAIN_SHAPE]

    def forwards_taken(self, shape: Shape, seconds: float) -> float:
        """What a forward has taken, in plain ones: a plain one is one; any other what is known of its shape, or what
        it really took, where that is more and not much more."""
        if shape == PLAIN_SHAPE:
            return 1.0
        costs = self.costs
        slowness = costs.slowness if costs.plain_slowness is None else costs.plain_slowness
        taken = seconds / (costs.seconds[PLAIN_SHAPE] * slowness)
        if shape not in costs.seconds:
            return taken
        return min(max(self.forwards_of(shape), taken), HELD_UP * self.forwards_of(shape))

    @property
    def allowance(self) -> float:
        """Plain forwards the text may be behind plain decoding by now. Short texts could seldom afford a try of their
        own; what drafts have saved those before them pays for it."""
        of_its_own = min(AT_ONCE * self.max_new_tokens, MOST_AT_ONCE) + WITH_EACH_TOKEN * self.progress
        return of_its_own + min(self.costs.credit, CREDIT_OF_A_TEXT)

    def end(self) -> None:
        """Adds what drafts have saved this text, or cost it, to what the next may lose."""
        self.costs.credit = min(max(self.costs.credit + self.progress - self.spent, 0.0), MOST_CREDIT)

    def is_affordable(self, plan: Plan) -> bool:
        """Whether the text may lose the forward that verifies, and the one that drafts before it if there is no draft,
        but for a token each."""
        length, num_branches = plan.draft_length, plan.num_branches
        both = self.forwards_of((length, num_branches, length if num_branches else 0))
        before = 1.0 if self.has_draft else both if self.is_static else self.forwards_of((1, 1, length))
        return self.spent - self.progress + both + before - 2 <= self.allowance

    def choose(self) -> Plan:
        """The plan of the next step, whose time runs from here on."""
        self.began = time.perf_counter()
        return self.best_plan()

    def saw(self, plan: Plan, num_drafted: list[int], num_tokens: int, counts: list[int], progress: int) -> None:
        """Takes in what a step did.

        Args:
            num_drafted, counts: how many tokens of each row's draft counted, and how many stood.
            num_tokens: N that were read.
            progress: tokens that the row has which has the fewest.
        """
        # A draft cut short is of a block that came too early, and worth less.
        lengths = [num_tokens if num == num_tokens else 1 for num in num_drafted]
        num_blocks = plan.num_blocks(num_tokens)
        shape = num_tokens, num_blocks, plan.draft_length if num_blocks else 0
        self.see(list(zip(lengths, counts, strict=True)), shape, time.perf_counter() - self.began, progress)

    def best_plan(self) -> Plan:
        """The plan that promises the most. The first of all is plain: what others cost is told by it."""
        if self.costs.plain_slowness is None:
            return PLAIN
        rates = {plan: self.tokens_per_second(plan) for plan in self.plans if self.is_affordable(plan)}
        if not rates or self.num_drafting >= RETRY_FORWARDS:
            return PLAIN
        highest = max(rates.values())
        alike = [plan for plan, rate in rates.items() if rate >= ALIKE * highest]
        best = min(alike, key=lambda plan: plan.draft_length * (1 + plan.num_branches))
        margin = STATIC_MARGIN if self.is_static else MARGIN
        if rates[best] > margin * self.tokens_per_second(PLAIN):
            self.num_failed = 0
            return best
        return PLAIN if self.num_plain < RETRY_FORWARDS << self.num_failed else best

    def see(self, accepted: list[tuple[int, int]], shape: Shape, seconds: float, progress: int | None = None) -> None:
        """Takes in what a forward did: for each row the length of the draft it read, 1 where no block stood right
        behind its text, and how much of it stood; what it cost with all that is done around it; and the progress now,
        by default with what it gave the row it gave least."""
        self.costs.see(shape, seconds)
        self.spent += self.forwards_taken(shape, seconds)
        self.progress = self.progress + min(count for _, count in accepted) if progress is None else progress
        self.has_draft = shape[1] > 0
        drafts = [(length, count) for length, count in accepted if length > 1]
        if shape[1] and (lates := [count - 1 for length, count in accepted if length == 1]):
            self.late += NEWEST_OF_SHAPE * (sum(lates) / len(lates) - self.late)
        self.num_drafting = 0 if shape == PLAIN_SHAPE else self.num_drafting + 1
        if not drafts:
            self.num_plain += 1
            return
        if self.num_plain >= RETRY_FORWARDS << self.num_failed:  # a try: it has failed until drafts are seen to pay
            self.num_failed = min(self.num_failed + 1, MOST_FAILURES)
        self.num_plain = 0
        for counts in (self.reached, self.stood):
            counts[:] = [FORGETTING * count for count in counts]
        for length, count in drafts:
            for i in range(1, min(count + 1, length)):
                self.reached[i] += 1 / len(drafts)
                self.stood[i] += (i < count) / len(drafts)


def plans_up_to(draft_length: int, is_wide: bool, is_static: bool = False) -> list[Plan]:
    """Drafts of K, K/2, K/4 .. 2 tokens, behind 0 to 2 numbers of accepted tokens, or all where width is cheap. Over a
    static cache K tokens behind 1 or 2 numbers, or all: every other shape would have to be compiled."""
    if is_static:
        return [Plan(draft_length, b) for b in (1, 2, *([draft_length] if is_wide and draft_length > 2 else []))]
    lengths = [length for length in (draft_length >> i for i in range(8)) if length > 1]
    plans = [Plan(length, branches) for length in lengths for branches in (0, 1, 2)]
    return plans + [Plan(length, length) for length in lengths if is_wide and length > 2]


def shapes_of(plans: list[Plan], is_static: bool = False) -> list[Shape]:
    """The forwards these plans run: clean tokens, blocks, masks of a block."""
    shapes = [PLAIN_SHAPE]
    for plan in plans:
        mask_length = plan.draft_length if plan.num_branches else 0
        shapes += [(plan.draft_length, plan.num_branches, mask_length)]
        shapes += [] if is_static else [(1, 1, plan.draft_length)]
    return list(dict.fromkeys(shapes))


@dataclass
class OnePlan:
    """The plan that a call was given, for every step."""

    plan: Plan

    def choose(self) -> Plan:
        return self.plan

    def saw(self, plan: Plan, num_drafted: list[int], num_tokens: int, counts: list[int], progress: int) -> None:
        """Nothing is learnt."""

    def end(self) -> None:
        """Nothing is kept."""


def planner_of(run: StepRunner, state: StepState, options: TiDAROptions, max_new_tokens: int) -> DraftPlanner | OnePlan:
    """The planner of one call. The times of steps are those of the model on one device, in one dtype and for so many
    rows; they are measured the first time, over the prompt that was just read.

    Args:
        state: after the prefill.
    """
    if options.num_branches != "auto":
        return OnePlan(Plan(options.draft_length, int(options.num_branches)))
    network, is_static = run.network, options.is_static
    model, form = network.model, network.form
    is_wide = network.rows.cache.device.type != "cpu"
    plans = plans_up_to(options.draft_length, is_wide, is_static)
    about = model.dtype, network.rows.cache.device, form.implementation, form.is_token_by_token, is_static
    key = *about, form.compiled is not None, form.is_packed, network.head is not None, len(state.draft_ids)
    known = kept_with(model).step_times
    if (times := known.get((*key, options.draft_length))) is None:
        shapes = shapes_of(plans, is_static)
        times = StepTimes.measured(shapes, lambda shape: run.seconds_of(shape, state))
        known[(*key, options.draft_length)] = times
    has_draft = state.draft_ids.shape[1] > 1  # after the prompt, as on accelerators
    num_rows = len(state.draft_ids)
    return DraftPlanner(times, plans, is_static, num_rows=num_rows, max_new_tokens=max_new_tokens, has_draft=has_draft)
