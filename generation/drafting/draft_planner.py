"""How much to draft next: the plan with the most expected tokens a second.

A rows, K tokens drafted at a time, B branches, N tokens of a draft, M blocks of masks.
"""

import time
from dataclasses import dataclass
from itertools import pairwise
from math import log

from ..kept_with_model import kept_with
from .draft_step import PLAIN, Plan, StepState
from .options_tidar import TiDAROptions
from .step_runner import StepRunner

Shape = tuple[int, int, int]  # N, M and K of a step
PLAIN_SHAPE: Shape = (1, 0, 0)
PRIOR_CHANCE = 0.6  # that a drafted token stands, where the checkpoint has no record of it
RECORD_WEIGHT = 3.0  # drafts that the checkpoint's record counts for: the fourth draft outweighs a wrong one
USUAL_WEIGHT = 24.0  # drafts that other texts count for beside a text's own: as many as a short text has
FORGETTING = 0.99  # weight of a draft one draft later: the last hundred decide
RETRY = 128  # plain forwards before a draft is tried again, which costs one to three of them


@dataclass
class Acceptance:
    """How often drafted tokens have stood, lately.

    Attributes:
        reached, stood: for each slot after the first, drafts that were right before it, and those in which it stood.
        num_plain: forwards since a draft was last verified.
    """

    reached: list[float]
    stood: list[float]
    num_plain: int = RETRY

    def see(self, drafts: list[tuple[int, int]]) -> None:
        """Takes in each row's draft: how many tokens counted, and how many of them stood."""
        if max(length for length, _ in drafts) == 1:
            self.num_plain += 1
            return
        self.num_plain = 0
        for counts in (self.reached, self.stood):
            counts[:] = [FORGETTING * count for count in counts]
        for length, count in drafts:
            for slot in range(min(count, length - 1)):
                self.reached[slot] += 1 / len(drafts)
                self.stood[slot] += (count > slot + 1) / len(drafts)

    def chance(self, slot: int, prior: float, weight: float) -> float:
        """That a slot stands after those before it: the posterior's mean, its prior worth `weight` drafts."""
        return (self.stood[slot] + weight * prior) / (self.reached[slot] + weight)


@dataclass
class DraftPlanner:
    """Chooses plans by what steps take and by how often drafted tokens stand.

    Attributes:
        times: seconds of a step, by its shape, kept with the model.
        prior: for each slot after the first, the chance that it stands, by the checkpoint's record.
        usual: acceptance in all texts, kept with the model; the prior of a text's own.
    """

    times: dict[Shape, float]
    plans: list[Plan]
    prior: list[float]
    usual: Acceptance
    is_static: bool = False
    began: float = 0.0

    def __post_init__(self) -> None:
        self.own = Acceptance([0.0] * len(self.prior), [0.0] * len(self.prior))

    def choose(self) -> Plan:
        """The plan of the next step, which is timed from here on."""
        chances = self.chances()
        best = max(self.plans, key=lambda plan: self.tokens_per_second(plan, chances))
        if self.tokens_per_second(best, chances) <= 1 / self.times[PLAIN_SHAPE]:
            cheapest = min(self.plans, key=lambda plan: self.times[shape_of(plan, plan.draft_length)])
            best = cheapest if self.usual.num_plain >= RETRY else PLAIN
        self.began = time.perf_counter()
        return best

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
        """Of a step that verifies a whole draft, and of the step after it where no branch came true: this one reads
        what the block below still predicts, or only drafts."""
        length = plan.draft_length
        reaches = [1.0]  # the chance that token 1, 2, ... stands
        for chance in chances[: length - 1]:
            reaches.append(reaches[-1] * chance)
        stops = [here - further for here, further in pairwise([*reaches, 0.0])]
        branches = sorted(range(length), key=lambda stop: -stops[stop])[: plan.num_branches]
        both = self.times[shape_of(plan, length)]
        tokens, seconds = sum(reaches), both
        for stop in set(range(length)) - set(branches):
            below = max((branch for branch in branches if branch < stop), default=None)
            num_left = 0 if below is None else length - 1 - (stop - below)
            tokens += stops[stop] * sum(reaches[: num_left + 1])
            is_alone = not num_left and not self.is_static
            seconds += stops[stop] * (self.times[shape_of(plan, 1)] if is_alone else both)
        return tokens / seconds

    def saw(self, plan: Plan, num_drafted: list[int], num_tokens: int, counts: list[int]) -> None:
        """Takes in a step that read N tokens: how many of each row's draft counted, and how many of those stood."""
        self.see_time(shape_of(plan, num_tokens), time.perf_counter() - self.began)
        drafts = [(min(length, num_tokens), count) for length, count in zip(num_drafted, counts, strict=True)]
        self.usual.see(drafts)
        self.own.see(drafts)

    def see_time(self, shape: Shape, seconds: float) -> None:
        """A tenth of what is seen counts: for this shape, and for all, since the machine may have slowed."""
        if shape not in self.times:  # a draft of one length, read by a plan of another
            return
        change = min(max(seconds / self.times[shape], 0.5), 2.0) ** 0.1
        for other in self.times:
            self.times[other] *= change
        self.times[shape] *= change


@dataclass
class OnePlan:
    """One plan for every step."""

    plan: Plan

    def choose(self) -> Plan:
        return self.plan

    def saw(self, plan: Plan, num_drafted: list[int], num_tokens: int, counts: list[int]) -> None:
        """Nothing is learnt."""


def shape_of(plan: Plan, num_tokens: int) -> Shape:
    """The shape of a step of this plan that reads N = `num_tokens`."""
    num_blocks = plan.num_blocks(num_tokens)
    return num_tokens, num_blocks, plan.draft_length if num_blocks else 0


def plans_up_to(draft_length: int, is_wide: bool, is_static: bool) -> list[Plan]:
    """Drafts of K, K/2 .. 2 tokens after one or two numbers of accepted tokens; after each, where width is cheap. Over
    a static cache only drafts of K, since each shape is compiled."""
    lengths = [draft_length] if is_static else [draft_length >> i for i in range(8)]
    lengths = [length for length in lengths if length > 1]
    return [Plan(n, b) for n in lengths for b in dict.fromkeys((1, 2, *([n] if is_wide else [])))]


def planner_of(run: StepRunner, state: StepState, options: TiDAROptions) -> DraftPlanner | OnePlan:
    """The planner of one call. A model's step times are measured once for each device, dtype and number of rows, over
    the prompt that was just read (`state`)."""
    if options.num_branches != "auto":
        return OnePlan(Plan(options.draft_length, int(options.num_branches)))
    network, form, device = run.network, run.network.form, run.network.rows.cache.device
    plans = plans_up_to(options.draft_length, device.type != "cpu", options.is_static)
    known = kept_with(network.model).step_times
    about = network.model.dtype, device, form.implementation, form.is_token_by_token, form.is_packed
    key = *about, options.is_static, form.compiled is not None, network.head is not None, len(state.draft_ids)
    times = known.setdefault(key, {})
    shapes = [PLAIN_SHAPE, *(shape_of(plan, plan.draft_length) for plan in plans)]
    if not options.is_static:
        shapes += [shape_of(plan, 1) for plan in plans]
    if missing := [shape for shape in dict.fromkeys(shapes) if shape not in times]:
        times |= measured(missing, run, state)
    num_slots = options.draft_length - 1
    prior = [*options.draft_acceptance[:num_slots]]
    prior += [PRIOR_CHANCE] * (num_slots - len(prior))
    usual = known.setdefault(num_slots, Acceptance([0.0] * num_slots, [0.0] * num_slots))
    return DraftPlanner(times, plans, prior, usual, options.is_static)


def measured(shapes: list[Shape], run: StepRunner, state: StepState) -> dict[Shape, float]:
    """Seconds of a step of each shape: the best of three rounds after one that warms up."""
    rounds = [[run.seconds_of(shape, state) for shape in shapes] for _ in range(4)]
    return dict(zip(shapes, map(min, zip(*rounds[1:], strict=True)), strict=True))
