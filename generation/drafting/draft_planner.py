"""How much to draft next: the plan with the most expected tokens a second.

A rows, K tokens drafted at a time, B branches, N tokens of a draft.
"""

import time
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, zip_longest
from math import log
from operator import mul

import torch
from torch import distributed

from ..kept_with_model import kept_with
from .draft_step import PLAIN, Plan
from .options_tidar import TiDAROptions
from .step_runner import StepRunner

PRIOR_CHANCE = 0.6  # that a drafted token stands, where the checkpoint has no record of it
RECORD_WEIGHT = 3.0  # drafts that the checkpoint's record counts for: the fourth draft outweighs a wrong one
USUAL_WEIGHT = 9.0  # drafts that other texts count for: chances of 0.65 that differ by 0.15 from text to text
FORGETTING = 0.99  # weight of a draft, or of a step's time, one step later: the last hundred decide
RETRY = 128  # plain forwards before a draft is tried again, which costs one to three of them


@dataclass
class Acceptance:
    """How often drafted tokens have stood, lately.

    Attributes:
        reached, stood: for each slot after the first, drafts that were right before it, and those in which it stood.
        num_plain: forwards since a draft was last verified.
        brought: tokens of each plan's steps, and those that the plan had promised. A draft that is left after a missed
            branch is worth less than a whole one, by how much depends on the model.
    """

    reached: list[float]
    stood: list[float]
    num_plain: int = RETRY
    brought: dict[Plan, tuple[float, float]] = field(default_factory=dict)

    def see(self, drafts: list[tuple[int, int]]) -> None:
        """Takes in each row's draft: how many tokens counted, and how many of them stood."""
        if max((length for length, _ in drafts), default=1) == 1:
            self.num_plain += 1
            return
        self.num_plain = 0
        for counts in (self.reached, self.stood):
            counts[:] = [FORGETTING * count for count in counts]
        for length, count in drafts:
            for slot in range(min(count, length - 1)):
                self.reached[slot] += 1
                self.stood[slot] += count > slot + 1

    def see_tokens(self, plan: Plan, num_tokens: float, promised: float) -> None:
        old = self.brought.get(plan, (0.0, 0.0))
        self.brought[plan] = FORGETTING * old[0] + num_tokens, FORGETTING * old[1] + promised

    def share_brought(self, plan: Plan) -> float:
        """What a plan brings of its promise, as much of it as `USUAL_WEIGHT` tokens do not outweigh. A lucky text says
        nothing for its plan, so at most 1."""
        brought, promised = self.brought.get(plan, (0.0, 0.0))
        return min(1, (brought + USUAL_WEIGHT) / (promised + USUAL_WEIGHT))

    def chance(self, slot: int, prior: float, weight: float) -> float:
        """That a slot stands after those before it: the posterior's mean, its prior worth `weight` drafts."""
        return (self.stood[slot] + weight * prior) / (self.reached[slot] + weight)


@dataclass
class Line:
    """Seconds of a step by the number of its query tokens: a line through the steps seen, by least squares.

    Attributes:
        sums: of weights, queries, seconds, squared queries, and queries times seconds.
    """

    sums: list[float] = field(default_factory=lambda: [0.0] * 5)

    def see(self, num_queries: int, seconds: float) -> None:
        """Takes in a step. At most twice the expected time counts, since other programs may have interrupted it."""
        if self.sums[0]:
            seconds = min(seconds, 2 * self.at(num_queries))
        new = 1, num_queries, seconds, num_queries**2, num_queries * seconds
        self.sums = [FORGETTING * old + one for old, one in zip(self.sums, new, strict=True)]

    def at(self, num_queries: int) -> float:
        """The expected seconds. More queries never take less, and the line begins at 0 or above."""
        weight, *sums = self.sums
        queries, seconds, squares, products = (one / weight for one in sums)
        slope = (products - queries * seconds) / max(squares - queries**2, 1e-9)
        return seconds + min(max(slope, 0.0), seconds / queries) * (num_queries - queries)


@dataclass
class StepTimes:
    """What steps take, by the real steps of one model, device, dtype and number of rows.

    Attributes:
        is_static: whether each plan's first step compiles or is captured.
        plain, drafting: seconds of steps without and with masks.
        num_seen: steps of each plan.
    """

    is_static: bool = False
    plain: Line = field(default_factory=Line)
    drafting: Line = field(default_factory=Line)
    num_seen: dict[Plan, int] = field(default_factory=dict)

    def see(self, plan: Plan, num_tokens: int, seconds: float) -> None:
        """Takes in a step. Not the first of each line, which may allocate. What wider drafts take is at first guessed
        from the narrowest and from plain steps: with one of these the line of drafting steps begins."""
        self.num_seen[plan] = self.num_seen.get(plan, 0) + 1
        line = self.line_of(plan)
        if self.num_seen[plan] > 1 or (line.sums[0] and not self.is_static):
            if plan != PLAIN and self.plain.sums[0] and not line.sums[0]:
                line.see(1, self.plain.at(1))
            line.see(num_queries(plan, num_tokens), seconds)

    def of(self, plan: Plan, num_tokens: int) -> float:
        return self.line_of(plan).at(num_queries(plan, num_tokens))

    def line_of(self, plan: Plan) -> Line:
        return self.plain if plan == PLAIN else self.drafting


@dataclass
class DraftPlanner:
    """Chooses plans by what steps take and by how often drafted tokens stand.

    Attributes:
        plans: from the fewest queries to the most.
        prior: for each slot after the first, the chance that it stands, by the checkpoint's record.
        usual: acceptance in all texts, kept with the model; the prior of a text's own.
        num_rows: rows of the batch. Steps are timed while none has ended.
        began: when the step under way did. It takes all that is done between two calls of `saw`.
        shared_on: the device for messages of ranks that run one model together. Rank 0 chooses for all.
    """

    times: StepTimes
    plans: list[Plan]
    prior: list[float]
    usual: Acceptance
    is_static: bool = False
    num_rows: int = 1
    shared_on: torch.device | None = None

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.own = Acceptance([0.0] * len(self.prior), [0.0] * len(self.prior))

    def choose(self) -> Plan:
        """The plan of the next step."""
        plan = self.unseen() or self.best()
        if self.shared_on is not None:
            choices = [PLAIN, *self.plans]
            number = torch.tensor(choices.index(plan), device=self.shared_on)
            distributed.broadcast(number, src=0)
            plan = choices[int(number)]
        return plan

    def unseen(self) -> Plan | None:
        """A plan that has to be timed before others can be compared: none and the narrowest, twice each."""
        narrow = (PLAIN, self.plans[0])
        return next((plan for plan in narrow if self.times.num_seen.get(plan, 0) < 2), None)

    def best(self) -> Plan:
        """The plan with the most tokens a second, if it beats plain decoding.

        A text's first drafts say what it is like, so they may promise less: at 0.75 of plain decoding's tokens three of
        them cost a text of 64 tokens at most 3%. Batches differ less from each other than texts do, by the root of
        their rows.
        """
        chances = self.chances()
        best = max(self.plans, key=lambda plan: self.tokens_per_second(plan, chances))
        gain = self.tokens_per_second(best, chances) * self.times.of(PLAIN, 1)
        is_first = self.own.reached[0] < RECORD_WEIGHT
        if gain > 1 - 0.25 * is_first / self.num_rows**0.5:
            return best
        return self.plans[0] if self.usual.num_plain >= RETRY else PLAIN

    def chances(self) -> list[float]:
        """For each slot after the first, the chance that it stands after those before it. How a slot differs from its
        record is expected of the next one too."""
        found, exponent = [], 1.0
        for slot, prior in enumerate(self.prior):
            record = min(max(prior, 0.01), 0.99)
            usual = self.usual.chance(slot, record**exponent, RECORD_WEIGHT)
            chance = self.own.chance(slot, usual, USUAL_WEIGHT)
            exponent = log(min(max(chance, 0.01), 0.99)) / log(record)
            found.append(chance)
        return found

    def tokens_per_second(self, plan: Plan, chances: list[float]) -> float:
        tokens, seconds = self.expected(plan, chances)
        return self.usual.share_brought(plan) * tokens / seconds

    def expected(self, plan: Plan, chances: list[float]) -> tuple[float, float]:
        """Tokens and seconds of a step that verifies a whole draft, or of the next one where no branch came true: it
        reads what the block below still predicts, or only drafts."""
        length = plan.draft_length
        reaches = [1.0]  # the chance that token 1, 2, ... stands
        for chance in chances[: length - 1]:
            reaches.append(reaches[-1] * chance)
        stops = [here - further for here, further in pairwise([*reaches, 0.0])]
        branches = sorted(range(length), key=lambda stop: -stops[stop])[: plan.num_branches]
        both = self.times.of(plan, length)
        tokens, seconds, num_steps = sum(reaches), both, 1.0
        for stop in set(range(length)) - set(branches):
            below = max((branch for branch in branches if branch < stop), default=None)
            num_left = 0 if below is None else length - 1 - (stop - below)
            tokens += stops[stop] * sum(reaches[: num_left + 1])
            is_alone = not num_left and not self.is_static
            seconds += stops[stop] * (self.times.of(plan, 1) if is_alone else both)
            num_steps += stops[stop]
        return tokens / num_steps, seconds / num_steps

    def num_copied(self, plan: Plan, drafts: list[list[float]]) -> int:
        """How many tokens of copies are read: as many as bring the slowest row the most tokens a second. The batch ends
        with that row, and a row fewer makes its steps little faster.

        Args:
            drafts: for each row, the chances of its copy's tokens, each after those before it, or of its draft's.
        """
        if self.is_static or self.shared_on is not None or self.unseen():
            return max(plan.draft_length - 1, 0)
        reaches = zip_longest(*(accumulate(chances, mul, initial=1.0) for chances in drafts), fillvalue=0.0)
        of_rows = zip(*(accumulate(row) for row in zip(*reaches, strict=True)), strict=True)
        rates = [min(tokens) / self.times.of(plan, length) for length, tokens in enumerate(of_rows, start=1)]
        return rates.index(max(rates))

    def saw(self, plan: Plan, num_drafted: list[int], num_tokens: int, counts: list[int]) -> None:
        """Takes in a step that read N tokens: how many of each row's draft counted, 0 of a copy, and how many of
        those stood."""
        now = time.perf_counter()
        if len(counts) == self.num_rows:
            self.times.see(plan, num_tokens, now - self.began)
        self.began = now
        drafts = [(min(length, num_tokens), n) for length, n in zip(num_drafted, counts, strict=True) if length]
        if drafts and plan != PLAIN and self.unseen() is None:
            num_new = sum(count for _, count in drafts) / len(drafts)
            self.usual.see_tokens(plan, num_new, self.expected(plan, self.chances())[0])
        self.usual.see(drafts)
        self.own.see(drafts)


@dataclass
class OnePlan:
    """One plan for every step."""

    plan: Plan

    def choose(self) -> Plan:
        return self.plan

    def num_copied(self, plan: Plan, drafts: list[list[float]]) -> int:
        return max(plan.draft_length - 1, 0)

    def saw(self, plan: Plan, num_drafted: list[int], num_tokens: int, counts: list[int]) -> None:
        """Nothing is learnt."""


def num_queries(plan: Plan, num_tokens: int) -> int:
    """Q of a step of this plan that reads N = `num_tokens`."""
    return num_tokens + plan.num_blocks(num_tokens) * plan.draft_length


def plans_up_to(draft_length: int, is_wide: bool, is_static: bool) -> list[Plan]:
    """Drafts of K, K/2 .. 2 tokens after one or two numbers of accepted tokens; after each, where width is cheap. Over
    a static cache drafts of K or K/2 alone, since each shape is compiled."""
    lengths = [draft_length >> i for i in range(2 if is_static else 8)]
    lengths = [length for length in lengths if length > 1]
    plans = {Plan(n, b) for n in lengths for b in (1, *([] if is_static and not is_wide else [2]), *([n] * is_wide))}
    return sorted(plans, key=lambda plan: (num_queries(plan, plan.draft_length), plan))


def slot_chances(options: TiDAROptions) -> list[float]:
    """For each slot after the first, its chance to stand after those before it, by the checkpoint's record."""
    num_slots = options.draft_length - 1
    record = [*(options.draft_acceptance or ())][:num_slots]
    return record + [PRIOR_CHANCE] * (num_slots - len(record))


def planner_of(run: StepRunner, num_rows: int, options: TiDAROptions) -> DraftPlanner | OnePlan:
    """The planner of one call for a batch of `num_rows`."""
    network, form, device = run.network, run.network.form, run.network.rows.cache.device
    if options.num_branches != "auto":
        return OnePlan(Plan(options.draft_length, int(options.num_branches)))
    plans = plans_up_to(options.draft_length, device.type != "cpu", options.is_static)
    if not plans or options.is_untaught:
        return OnePlan(PLAIN)
    num_ranks = getattr(network.model, "tp_size", None) or 1
    if num_ranks > 1 and num_ranks < distributed.get_world_size():
        return OnePlan(plans[-1])  # several models: the ranks of one cannot be told from the others'
    known = kept_with(network.model).step_times
    how = network.model.dtype, device, form.implementation, form.is_token_by_token, form.is_packed
    key = *how, options.is_static, form.compiled is not None, network.head is not None, num_rows
    prior = slot_chances(options)
    num_slots = len(prior)
    usual = known.setdefault(num_slots, Acceptance([0.0] * num_slots, [0.0] * num_slots))
    times = known.setdefault(key, StepTimes(options.is_static))
    return DraftPlanner(times, plans, prior, usual, options.is_static, num_rows, device if num_ranks > 1 else None)
