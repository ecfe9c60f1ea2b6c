"""`num_branches="auto"`: step times and acceptance choose the next draft, and never change the text."""

import functools
import random
import sys

import pytest
import torch

from helpers_tidar import CountedForwards, plain_greedy_loop, random_prompts, script_drafts, tiny_tidar
from wavedraft.generation.drafting.draft_planner import (
    RETRY,
    Acceptance,
    DraftPlanner,
    Line,
    OnePlan,
    StepTimes,
    num_queries,
    plans_up_to,
)
from wavedraft.generation.drafting.draft_step import PLAIN, Plan

GENERATION = sys.modules["wavedraft.modeling_tidar.generation_tidar"]
DECODER = sys.modules["wavedraft.generation.drafting.decode_tidar"]  # the package names its function so
LONGEST = 8


def seconds_of(plan, num_tokens, each_query):
    """A plain forward takes 1 and each query more `each_query`; masks take a little for themselves."""
    return 1 + each_query * (num_queries(plan, num_tokens) - 1) + 0.15 * (plan != PLAIN)


def times_of(each_query):
    """Times as they are once every plan was seen."""
    times = StepTimes()
    for plan in (PLAIN, *plans_up_to(LONGEST, True, False), *plans_up_to(LONGEST, False, True)):
        for num_tokens in (1, 1, plan.draft_length or 1):
            times.see(plan, num_tokens, seconds_of(plan, num_tokens, each_query))
    return times


def nothing_seen():
    return Acceptance([0.0] * (LONGEST - 1), [0.0] * (LONGEST - 1))


def planner(each_query, chance, is_static=False, is_wide=False, usual=None, times=None):
    times = times or times_of(each_query)
    prior = [chance] * (LONGEST - 1)
    return DraftPlanner(times, plans_up_to(LONGEST, is_wide, is_static), prior, usual or nothing_seen(), is_static)


class Text:
    """Plays a text whose drafted tokens stand by chance, and says what it took: the slow twin of a decode."""

    def __init__(self, chances, is_static, seed):
        self.chances, self.is_static, self.draw = chances, is_static, random.Random(seed)
        self.num_left = 0  # masks that still predict what follows
        self.tokens, self.seconds = 0, 0.0

    def step(self, plan, each_query):
        """Returns what the planner would be told: num_drafted, num_tokens, counts and the seconds."""
        length = plan.draft_length
        num_tokens = 1 if plan == PLAIN else length if self.is_static or self.num_left else 1
        num_drafted = 1 + (self.num_left if num_tokens > 1 else 0)
        count = 1
        while count < num_drafted and self.draw.random() < self.chances[count - 1]:
            count += 1
        seconds = seconds_of(plan, num_tokens, each_query)
        self.tokens, self.seconds = self.tokens + count, self.seconds + seconds
        self.num_left = self.masks_left(plan, num_tokens, num_drafted, count)
        return num_drafted, num_tokens, count, seconds

    def masks_left(self, plan, num_tokens, num_drafted, count):
        if plan == PLAIN:
            return 0
        if num_tokens == 1:
            return plan.draft_length - 1
        reaches = [1.0]
        for slot in range(num_drafted - 1):
            reaches.append(reaches[-1] * self.chances[slot])
        stops = [here - further for here, further in zip(reaches, [*reaches[1:], 0.0], strict=True)]
        likely = sorted(range(1, num_drafted + 1), key=lambda stop: -stops[stop - 1])[: plan.num_branches]
        below = [branch for branch in likely if branch <= count]
        return plan.draft_length - 1 - (count - max(below)) if below else 0


def play(chooser, chances, is_static, each_query, length=64, seed=0, noise=0.0):
    """The rate of one text; a `DraftPlanner` is told what a decode would tell it."""
    text, noises = Text(chances, is_static, seed), random.Random(seed + 1)
    while text.tokens < length:
        plan = chooser.choose()
        num_drafted, num_tokens, count, seconds = text.step(plan, each_query)
        if isinstance(chooser, DraftPlanner):
            chooser.times.see(plan, num_tokens, seconds * (1 + noise * noises.gauss(0, 1)))
            for seen in (chooser.usual, chooser.own):
                seen.see([(min(num_drafted, num_tokens), count)])
    return text


@functools.cache
def fixed_rates(each_query, chance, is_static, num_texts):
    """Tokens a second of each plan that never changes, over many texts."""
    chances, fixed = [chance] * (LONGEST - 1), {}
    for plan in (PLAIN, *plans_up_to(LONGEST, False, is_static)):
        texts = [play(OnePlan(plan), chances, is_static, each_query, seed=seed) for seed in range(num_texts)]
        fixed[plan] = sum(text.tokens for text in texts) / sum(text.seconds for text in texts)
    return fixed


def rates(each_query, chance, prior, is_static, num_texts=30):
    """Tokens a second over many texts: of the planner, of each fixed plan, and of the planner's slowest text. The first
    text shows what steps take."""
    chances = [chance] * (LONGEST - 1)
    fixed = fixed_rates(each_query, chance, is_static, num_texts)
    usual, followed, texts = nothing_seen(), StepTimes(), []
    for seed in range(num_texts):
        chooser = planner(each_query, prior, is_static, usual=usual, times=followed)
        texts.append(play(chooser, chances, is_static, each_query, seed=seed, noise=0.05))
    rate = sum(text.tokens for text in texts) / sum(text.seconds for text in texts)
    return rate, fixed, min(text.tokens / text.seconds for text in texts)


EACH_QUERY = (0.01, 0.03, 0.06, 0.1)  # from memory-bound to compute-bound


def test_over_all_texts_it_is_nearly_as_fast_as_the_best_plan_in_hindsight():
    shares = []
    for is_static in (False, True):
        for each_query in EACH_QUERY:
            for chance in (0.0, 0.3, 0.5, 0.7, 0.9):
                for prior in (0.3, 0.6, 0.85):  # a record that is right, and one that is not
                    rate, fixed, _ = rates(each_query, chance, prior, is_static)
                    shares.append(rate / max(fixed.values()))
    assert sum(shares) / len(shares) > 0.97 and min(shares) > 0.84


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("each_query", EACH_QUERY)
@pytest.mark.parametrize("prior", [0.3, 0.6, 0.85])
def test_drafts_that_never_stand_cost_little(each_query, is_static, prior):
    rate, fixed, slowest = rates(each_query, 0.0, prior, is_static)
    assert rate > 0.95 * fixed[PLAIN] and slowest > 0.9 * fixed[PLAIN]


@pytest.mark.parametrize(("prior", "chance"), [(0.9, 0.0), (0.9, 0.1), (0.05, 0.9), (0.3, 0.9)])
def test_a_wrong_record_is_left_within_sixteen_drafts(prior, chance):
    of = planner(0.05, prior)
    draws = random.Random(0)
    for _ in range(16):
        count = 1
        while count < 4 and draws.random() < chance:
            count += 1
        for seen in (of.usual, of.own):
            seen.see([(4, count)])
    right = planner(0.05, chance or 0.01)
    assert (of.choose() == PLAIN) == (right.choose() == PLAIN or chance < 0.2)
    assert abs(of.chances()[0] - chance) < 0.25


def test_where_width_is_free_long_drafts_with_all_branches_are_best():
    times = StepTimes()
    for plan in (PLAIN, *plans_up_to(LONGEST, True, False)) * 2:
        times.see(plan, 1, 1.0)
    assert planner(0.0, 0.8, is_wide=True, times=times).choose() == Plan(8, 8)


def test_where_width_costs_less_is_drafted():
    assert planner(0.02, 0.8).choose().num_branches <= 2
    assert planner(0.1, 0.6).choose().draft_length < 8


@pytest.mark.parametrize("plan", [Plan(2, 1), Plan(4, 1), Plan(4, 2), Plan(8, 2)])
@pytest.mark.parametrize("chance", [0.3, 0.8])
def test_the_promised_rate_is_nearly_the_rate_of_playing_it(plan, chance):
    of = planner(0.03, chance)
    played = play(OnePlan(plan), [chance] * 7, False, 0.03, length=30_000)
    promised = of.tokens_per_second(plan, of.chances())
    assert promised == pytest.approx(played.tokens / played.seconds, rel=0.06)  # it looks one missed branch ahead


def test_where_nothing_pays_a_draft_is_tried_now_and_then():
    of, plans = planner(1.0, 0.9), []
    for _ in range(3 * RETRY):
        plan = of.choose()
        plans.append(plan)
        has_draft = len(plans) > 1 and plans[-2] != PLAIN
        for seen in (of.usual, of.own):
            seen.see([(2, 1) if has_draft and plan != PLAIN else (1, 1)])
    tries = [i for i, plan in enumerate(plans) if plan != PLAIN]
    assert tries[:2] == [0, 1] and 4 <= len(tries) <= 6


def test_times_lie_on_a_line_through_the_steps_seen():
    times = times_of(0.05)
    for plan in (PLAIN, Plan(2, 1), Plan(4, 2), Plan(8, 1), Plan(8, 8)):
        for num_tokens in {1, plan.draft_length or 1}:
            assert times.of(plan, num_tokens) == pytest.approx(seconds_of(plan, num_tokens, 0.05), rel=0.02)


def test_wider_steps_are_guessed_from_plain_and_narrow_ones_until_they_are_seen():
    times = StepTimes()
    for plan, num_tokens, seconds in ((PLAIN, 1, 1.0), (Plan(2, 1), 2, 1.6)):  # 1 and 4 queries
        times.see(plan, num_tokens, 30.0)
        times.see(plan, num_tokens, seconds)
    assert times.of(Plan(8, 1), 8) == pytest.approx(1.6 + 12 * 0.2, rel=0.01)  # 16 queries
    for _ in range(20):
        times.see(Plan(2, 1), 2, 1.6)
        times.see(Plan(4, 1), 4, 1.8)
    assert times.of(Plan(8, 1), 8) == pytest.approx(1.8 + 8 * 0.05, rel=0.05)


def test_more_queries_never_take_less_and_no_step_takes_nothing():
    line = Line()
    for queries, seconds in ((4, 2.0), (16, 1.0), (4, 2.0), (16, 1.0)):
        line.see(queries, seconds)
    assert line.at(4) == line.at(16) == pytest.approx(1.5, rel=0.02)
    line = Line()
    for queries, seconds in ((10, 1.0), (12, 1.9), (10, 1.0), (12, 1.9)):
        line.see(queries, seconds)
    assert 0 < line.at(1) < line.at(2) < line.at(10)


def test_an_interrupted_step_counts_for_two_and_a_slower_machine_is_noticed():
    times = times_of(0.02)
    expected = seconds_of(Plan(8, 1), 8, 0.02)
    before = times.of(Plan(8, 1), 8)
    times.see(Plan(8, 1), 8, 1000.0)
    assert before < times.of(Plan(8, 1), 8) < 1.2 * before
    for _ in range(200):
        times.see(Plan(8, 1), 8, 3 * expected)
    assert times.of(Plan(8, 1), 8) == pytest.approx(3 * expected, rel=0.2)


@pytest.mark.parametrize("is_static", [False, True])
def test_a_first_step_may_compile_and_is_not_counted(is_static):
    times = StepTimes(is_static)
    first_of_a_plan = [(Plan(2, 1), 60.0)] * is_static
    for plan, seconds in ((PLAIN, 30.0), (PLAIN, 1.0), (Plan(4, 1), 60.0), (Plan(4, 1), 2.0), *first_of_a_plan):
        times.see(plan, 1, seconds)
    assert (times.of(PLAIN, 1), times.of(Plan(4, 1), 1)) == (1.0, pytest.approx(2.0, rel=0.01))
    times.see(Plan(2, 1), 1, 1.5)
    assert times.of(Plan(2, 1), 1) == pytest.approx(1.5, rel=0.02)


@pytest.mark.parametrize("each_query", [0.0, 0.02, 10.0])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_text_is_the_plain_loops_whatever_the_planner_does(each_query, batch_size, monkeypatch):
    model = tiny_tidar("mistral", draft_length=8)
    monkeypatch.setattr(DECODER, "planner_of", lambda *_: planner(each_query, 0.5))
    prompts = random_prompts(batch_size, 7)
    found = model.generate(prompts, max_new_tokens=40, do_sample=False, num_branches="auto", repetition_penalty=1.0)
    assert found.tolist() == [plain_greedy_loop(model, row, num_new=40).tolist() for row in prompts]


class Restless(OnePlan):
    """Goes by chance."""

    def __init__(self, plans):
        self.plans, self.generator = plans, torch.Generator().manual_seed(0)

    def choose(self):
        return self.plans[int(torch.randint(len(self.plans), (), generator=self.generator))]


def test_plans_that_change_all_the_time_leave_the_text_alone(monkeypatch):
    model = tiny_tidar("qwen3", draft_length=8)
    restless = Restless(
        [Plan(8, 2), PLAIN, Plan(4, 0), Plan(4, 1), Plan(2, 1), Plan(8, 8), Plan(8, 0), PLAIN, Plan(2, 2)]
    )
    monkeypatch.setattr(DECODER, "planner_of", lambda *_: restless)
    prompts = random_prompts(3, 9)
    attention_mask = torch.ones_like(prompts)
    attention_mask[1, :4] = 0
    keywords = {"attention_mask": attention_mask, "max_new_tokens": 40, "do_sample": False}
    keywords |= {"repetition_penalty": 1.3, "eos_token_id": [25, 36]}
    expected = model.generate(prompts, draft_length=0, **keywords)
    for _ in range(3):
        assert model.generate(prompts, num_branches="auto", **keywords).tolist() == expected.tolist()


def test_a_model_is_timed_by_the_steps_of_its_first_text():
    model, prompt = tiny_tidar(draft_length=4), random_prompts(1, 7)
    hook = CountedForwards(model)
    text = plain_greedy_loop(model, prompt[0], num_new=60).tolist()
    keywords = {"max_new_tokens": 60, "do_sample": False, "num_branches": "auto", "return_dict_in_generate": True}
    plans = []
    for _ in range(2):
        hook.num_queries.clear()
        output = model.generate(prompt, **keywords)
        assert output.sequences[0].tolist() == text
        assert len(hook.num_queries) == output.num_forwards + output.num_prefill_forwards
        assert sum(output.plans.values()) == output.num_forwards
        plans.append(output.plans)
    assert all(plans[0][plan] >= 2 for plan in (PLAIN, (2, 1)))


def test_without_keywords_the_planner_chooses(monkeypatch):
    model, seen, planner_of = tiny_tidar(draft_length=4), [], DECODER.planner_of
    monkeypatch.setattr(DECODER, "planner_of", lambda *args: seen.append(planner_of(*args)) or seen[-1])
    model.generation_config.num_branches = None
    model.generate(random_prompts(1, 4), max_new_tokens=3, do_sample=False)
    model.generate(random_prompts(1, 4), max_new_tokens=3, do_sample=True, seed=1)  # which a clock may not change
    model.generate(random_prompts(1, 4), max_new_tokens=3, num_branches="auto", draft_length=1)
    assert [type(of) for of in seen] == [DraftPlanner, OnePlan, OnePlan]
    assert [of.plan for of in seen[1:]] == [Plan(4, 1), PLAIN]


def test_a_checkpoint_that_was_never_taught_decodes_plainly_and_says_so_once(monkeypatch):
    said = []
    monkeypatch.setattr(GENERATION.logger, "warning_once", said.append)
    model, prompt = tiny_tidar(draft_length=4), random_prompts(1, 7)
    model.generation_config.num_branches = None
    model.generation_config.draft_acceptance = {"chances": [0.0] * 3, "num_prompts": 0}
    hook = CountedForwards(model)
    keywords = {"max_new_tokens": 20, "do_sample": False}
    text = model.generate(prompt, **keywords)
    assert hook.num_queries == [7, *[1] * 19] and text[0].tolist() == plain_greedy_loop(model, prompt[0], 20).tolist()
    assert "never taught to draft" in said.pop() and not said
    hook.num_queries.clear()
    assert model.generate(prompt, num_branches=1, **keywords).tolist() == text.tolist()
    assert max(hook.num_queries[1:]) > 1 and not said


def test_perfect_drafts_are_used_where_they_pay(monkeypatch):
    model = tiny_tidar(draft_length=8)
    prompts = random_prompts(1, 5)
    text = plain_greedy_loop(model, prompts[0], num_new=60)
    script_drafts(monkeypatch, text, is_right=True, sureness=20.0)
    monkeypatch.setattr(DECODER, "planner_of", lambda *_: planner(0.01, 0.95))
    hook = CountedForwards(model)
    output = model.generate(
        prompts, max_new_tokens=1 + 1 + 5 * 8, do_sample=False, num_branches="auto", return_dict_in_generate=True
    )
    assert output.sequences[0].tolist() == text[:47].tolist()
    assert hook.num_queries[:2] == [5, 1 + 8]  # the prompt alone, then a token with the first masks after it
    assert output.num_forwards == 1 + 5


def test_the_record_of_a_checkpoint_is_what_is_expected_first(monkeypatch):
    model, seen, planner_of = tiny_tidar(draft_length=4), [], DECODER.planner_of
    monkeypatch.setattr(DECODER, "planner_of", lambda *args: seen.append(planner_of(*args)) or seen[-1])
    prompt, keywords = random_prompts(1, 4), {"max_new_tokens": 3, "do_sample": False, "num_branches": "auto"}
    model.generate(prompt, **keywords)
    model.generation_config.draft_acceptance = {"chances": [0.9, 0.5], "num_prompts": 40}
    model.generate(prompt, **keywords)
    assert [of.prior for of in seen] == [[0.6] * 3, [0.9, 0.5, 0.6]]
    model.generation_config.draft_acceptance = {"chances": [0.9, "0.5"]}
    with pytest.raises(ValueError, match="`draft_acceptance` must be a dictionary with a list of `chances` from 0 to"):
        model.generate(prompt, **keywords)


def test_calls_of_other_draft_lengths_take_turns():
    model, prompt = tiny_tidar(draft_length=4), random_prompts(1, 5)
    text = plain_greedy_loop(model, prompt[0], num_new=20).tolist()
    for draft_length in (2, 4, 3, 2):
        keywords = {"max_new_tokens": 20, "do_sample": False, "num_branches": "auto", "draft_length": draft_length}
        assert model.generate(prompt, **keywords)[0].tolist() == text


def test_sampling_with_a_seed_is_refused():
    with pytest.raises(ValueError, match="clock"):
        tiny_tidar().generate(random_prompts(1, 4), max_new_tokens=3, do_sample=True, seed=1, num_branches="auto")


def test_the_first_drafts_of_a_text_may_cost_a_little_and_those_after_them_must_pay():
    losing = next(p / 100 for p in range(90, 0, -1) if expected_gain(0.06, p / 100) < 0.97)
    assert expected_gain(0.06, losing) > 0.9
    of = planner(0.06, losing)
    assert of.choose() != PLAIN
    of.usual.num_plain = 0
    of.own.reached[0] = 4.0
    of.own.stood[0] = 4 * losing
    assert of.choose() == PLAIN
    assert planner(1.0, losing, usual=tried_just_now()).choose() == PLAIN  # far from paying


@pytest.mark.parametrize("num_rows", [4, 16])
def test_the_first_drafts_of_a_batch_may_cost_less_the_more_rows_it_has(num_rows):
    limit = 1 - 0.25 / num_rows**0.5
    worst = min(p / 200 for p in range(200) if expected_gain(0.06, p / 200) > limit)
    for chance, is_tried in ((worst, True), (worst - 0.05, False)):
        of = planner(0.06, chance, usual=tried_just_now())
        of.num_rows = num_rows
        assert (of.choose() != PLAIN) == is_tried


def expected_gain(each_query, chance):
    of = planner(each_query, chance)
    return max(of.tokens_per_second(plan, of.chances()) for plan in of.plans) * of.times.of(PLAIN, 1)


def tried_just_now():
    usual = nothing_seen()
    usual.num_plain = 0
    return usual


def test_a_plan_that_brings_less_than_it_promised_is_left():
    of = planner(0.03, 0.8)
    best = of.choose()
    promised, _ = of.expected(best, of.chances())
    for _ in range(100):
        of.usual.see_tokens(best, 0.6 * promised, promised)
    assert of.usual.share_brought(best) == pytest.approx(0.6, abs=0.05)
    assert of.choose() != best
    assert planner(0.03, 0.8).choose() == best


def test_each_row_of_a_batch_is_a_draft_of_its_own():
    """Eight rows tell as much as eight drafts of one row."""
    alone, together = nothing_seen(), nothing_seen()
    drafts = [(4, 1), (4, 3), (4, 4), (3, 2), (2, 1), (2, 2), (4, 4), (4, 1)]
    together.see(drafts)
    for draft in drafts:
        alone.see([draft])
    assert together.reached == pytest.approx(alone.reached, rel=0.08)
    assert together.stood == pytest.approx(alone.stood, rel=0.08)


def test_a_lucky_text_does_not_hold_its_plan():
    of = planner(0.03, 0.65)
    for _ in range(30):
        of.usual.see_tokens(Plan(2, 1), 2.0, 1.4)
    assert of.usual.share_brought(Plan(2, 1)) == of.usual.share_brought(Plan(8, 1)) == 1
