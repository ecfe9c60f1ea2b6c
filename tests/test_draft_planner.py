"""`num_branches="auto"`: what to draft next is chosen by cost and acceptance, and never changes the text."""

import sys

import pytest
import torch

from helpers_tidar import CountedForwards, plain_greedy_loop, random_prompts, script_drafts, tiny_tidar
from wavedraft.generation.drafting.draft_network import DraftNetwork
from wavedraft.generation.drafting.draft_planner import RETRY_FORWARDS, DraftPlanner, plans_up_to, shapes_of
from wavedraft.generation.drafting.draft_step import PLAIN, Plan
from wavedraft.generation.drafting.step_times import StepTimes

DECODER = sys.modules["wavedraft.generation.drafting.decode_tidar"]  # the package names its function so


def planner(first, each_query, chance, draft_length=8):
    """Costs that rise by `each_query` for every query behind the first, and drafts that stand by `chance`, midway."""
    plans = plans_up_to(draft_length, is_wide=True)
    seconds = {(n, m, k): first + each_query * (n + m * k - 1) for n, m, k in shapes_of(plans)}
    planner = DraftPlanner(StepTimes(seconds), plans)
    planner.num_plain = 0
    for i in range(1, draft_length):
        planner.reached[i], planner.stood[i] = 1e6, 1e6 * chance
    return planner


def test_where_width_is_free_long_drafts_with_all_branches_are_best():
    assert planner(1.0, 0.0, 0.8).choose() == Plan(8, 8)


def test_where_width_costs_fewer_branches_and_tokens_are_drafted():
    assert planner(1.0, 0.02, 0.8).choose().num_branches <= 2
    assert planner(1.0, 0.05, 0.5).choose().draft_length < 8


@pytest.mark.parametrize("reads_masks", [False, True])
def test_a_draft_after_the_prompt_need_not_be_written_first(reads_masks, monkeypatch):
    seen, planner_of = [], DECODER.planner_of
    monkeypatch.setattr(
        DECODER, "planner_of", lambda *args: (found := planner_of(*args), seen.append(found.has_draft))[0]
    )
    if reads_masks:  # as on an accelerator, where masks cost nothing beside a prompt
        monkeypatch.setattr(DraftNetwork, "prefill", with_draft(DraftNetwork.prefill))
    tiny_tidar(draft_length=4).generate(random_prompts(1, 6), max_new_tokens=4, do_sample=False, num_branches="auto")
    assert seen == [reads_masks]


def with_draft(prefill):
    return lambda network, ids, positions, draft_length, has_draft: prefill(network, ids, positions, draft_length, True)


def test_where_nothing_pays_decoding_is_plain():
    assert planner(1.0, 1.0, 0.9).choose() == PLAIN
    assert planner(1.0, 0.01, 0.0).choose() == PLAIN


def simulated_rate(plan, chance, pace, num_forwards=40_000):
    """Tokens a second of a plan, by playing it."""
    draws = torch.rand(num_forwards, 8, generator=torch.Generator().manual_seed(0)) < chance
    chances = [chance**i * (1 - chance) for i in range(plan.draft_length - 1)] + [chance ** (plan.draft_length - 1)]
    lengths = sorted(range(1, plan.draft_length + 1), key=lambda length: -chances[length - 1])[: plan.num_branches]
    tokens, seconds, has_draft = 0, 0.0, False
    for draw in draws.tolist():
        if not has_draft:
            tokens, seconds, has_draft = tokens + 1, seconds + pace.costs.seconds[1, 1, plan.draft_length], True
            continue
        accepted = 1
        while accepted < plan.draft_length and draw[accepted]:
            accepted += 1
        mask_length = plan.draft_length if plan.num_branches else 0
        seconds += pace.costs.seconds[plan.draft_length, plan.num_branches, mask_length]
        tokens, has_draft = tokens + accepted, accepted in lengths
    return tokens / seconds


@pytest.mark.parametrize("plan", [Plan(2, 0), Plan(4, 0), Plan(4, 1), Plan(8, 2), Plan(8, 8)])
def test_the_promised_rate_is_the_rate_of_playing_it(plan):
    for chance in (0.3, 0.8):
        of = planner(1.0, 0.02, chance)
        assert of.tokens_per_second(plan) == pytest.approx(simulated_rate(plan, chance, of), rel=0.02)


def played_forwards(of, count_of_draft, num_forwards):
    """The plans of so many forwards, a draft read in the one behind that which wrote it."""
    plans, has_draft = [], False
    for _ in range(num_forwards):
        plan = of.choose()
        plans.append(plan)
        if plan == PLAIN:
            of.see([(1, 1)], (1, 0, 0), 1.0)
        elif has_draft:
            of.see([(plan.draft_length, count_of_draft)], (plan.draft_length, 0, 0), 1.0)
        else:
            of.see([(1, 1)], (1, 1, plan.draft_length), 1.0)
        has_draft = plan != PLAIN and not has_draft
    return plans


def test_drafting_is_tried_again_now_and_then_until_a_draft_was_read():
    plans = played_forwards(planner(1.0, 0.1, 0.0), 1, 10 * RETRY_FORWARDS)
    tries = [i for i, plan in enumerate(plans) if plan != PLAIN]
    assert tries == [48, 49, 48 + 98, 48 + 99, 48 + 98 + 194, 48 + 98 + 195]  # each waits twice as long


@pytest.mark.parametrize("each_query", [0.0, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("is_static", [False, True])
def test_a_text_loses_no_more_than_its_allowance_whatever_its_drafts_are_worth(each_query, is_static):
    plans = plans_up_to(8, is_wide=False, is_static=is_static)
    shapes = shapes_of(plans, is_static)
    seconds = {(n, m, k): 1.0 + each_query * (n + m * k - 1) for n, m, k in shapes}
    chances = torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist()
    draws = torch.rand(20, 400, 8, generator=torch.Generator().manual_seed(1))
    for chance, text in zip([0.0, *chances], [draws[0], *draws], strict=True):
        # Drafts that begin by always standing, so that the pace trusts them, and then stand by chance.
        of, num_tokens, taken, has_draft = DraftPlanner(StepTimes(dict(seconds)), plans, is_static), 0, 0.0, False
        for number, draw in enumerate(text.tolist()):
            plan, count = of.choose(), 1
            if plan == PLAIN:
                shape, has_draft = (1, 0, 0), False
            elif has_draft or is_static:
                shape = plan.draft_length, plan.num_branches, plan.draft_length if plan.num_branches else 0
                stands = has_draft
                while stands and count < plan.draft_length and (number < 10 * chance or draw[count] < chance):
                    count += 1
                has_draft = bool(plan.num_branches)
            else:
                shape, has_draft = (1, 1, plan.draft_length), True
            of.see([(shape[0], count)], shape, seconds[shape])
            taken, num_tokens = taken + seconds[shape], num_tokens + count
            assert taken <= num_tokens + 2.0 + 0.01 * num_tokens + 1e-6
        has_drafted = of.num_plain < len(text)
        assert has_drafted != (is_static and each_query == 0.5)  # there a try would cost more than 400 tokens allow


@pytest.mark.parametrize(("estimate", "limit"), [(1.0, 1.03), (0.85, 1.04), (0.7, 1.05)])
@pytest.mark.parametrize("each_query", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("is_static", [False, True])
def test_a_text_hardly_loses_more_where_clocks_are_noisy_and_drafts_were_measured_too_cheap(
    each_query, estimate, limit, is_static
):
    """Texts of 96 tokens whose drafts never stand: each forward's time is off by 8%, and before the first text, that of
    every forward with drafts was measured at `estimate` of what it is."""
    plans = plans_up_to(4, is_wide=False, is_static=is_static)
    true = {(n, m, k): 1.0 + each_query * (n + m * k - 1) for n, m, k in shapes_of(plans, is_static)}
    noise = torch.Generator().manual_seed(0)

    def seen(seconds):
        return seconds * float(torch.exp(0.08 * torch.randn((), generator=noise)))

    taken = []
    for _ in range(40):
        measured = {shape: seen(cost * (estimate if shape != (1, 0, 0) else 1)) for shape, cost in true.items()}
        of, has_draft = (
            DraftPlanner(StepTimes(measured, plain_slowness=None), plans, is_static, max_new_tokens=96),
            False,
        )
        taken.append(0.0)
        for _ in range(96):
            plan = of.choose()
            if plan == PLAIN:
                shape, has_draft = (1, 0, 0), False
            elif has_draft or is_static:
                shape = plan.draft_length, plan.num_branches, plan.draft_length if plan.num_branches else 0
                has_draft = bool(plan.num_branches)
            else:
                shape, has_draft = (1, 1, plan.draft_length), True
            of.see([(shape[0], 1)], shape, seen(true[shape]))
            taken[-1] += true[shape] / 96
    assert sum(taken) / len(taken) < limit


def test_the_first_forward_of_all_is_plain_for_others_are_measured_by_it():
    of = planner(1.0, 0.02, 0.9)
    assert of.choose() != PLAIN
    of.costs.plain_slowness = None
    assert of.choose() == PLAIN
    of.see([(1, 1)], (1, 0, 0), 2.0)
    assert of.costs.plain_slowness == 2.0 and of.choose() != PLAIN
    of.see([(1, 1)], (1, 1, 8), 4.0)  # what it has really taken, on a machine that is twice as slow
    assert of.spent == pytest.approx(1 + 4.0 / (2 * of.costs.seconds[1, 0, 0]))


def test_a_batch_loses_no_more_by_its_slowest_row_however_well_the_others_do():
    of = planner(1.0, 0.02, 0.9)
    taken, progress, num_plain = 0.0, 0, 0
    for _ in range(200):
        plan = of.choose()
        num_plain += plan == PLAIN
        shape = plan.draft_length or 1, plan.num_branches, plan.draft_length if plan.num_branches else 0
        count = plan.draft_length or 1
        of.see([(count, count), (count, 1)], shape, of.costs.seconds[shape])
        taken, progress = taken + of.costs.seconds[shape], progress + 1
        assert taken <= progress + 2.0 + 0.01 * progress + 1e-6
    assert 0 < num_plain < 200


def test_a_short_text_is_allowed_no_more_than_three_percent_either():
    plans = plans_up_to(8, is_wide=False)
    seconds = {(n, m, k): 1.0 + 0.15 * (n + m * k - 1) for n, m, k in shapes_of(plans)}  # a try costs 0.45 and more
    for num_new in (10, 40, 200):
        of = DraftPlanner(StepTimes(dict(seconds)), plans, max_new_tokens=num_new)
        has_tried = any(plan != PLAIN for plan in played_forwards(of, 1, num_new))
        assert has_tried == (num_new > 10) and of.spent <= 1.03 * num_new


def played_text(costs, chance, seed, num_new=48):
    """Time and tokens of a text over a static cache whose drafts stand by chance, and whether it drafted."""
    of = DraftPlanner(costs, plans_up_to(4, is_wide=False, is_static=True), is_static=True, max_new_tokens=num_new)
    draws = torch.rand(num_new, 4, generator=torch.Generator().manual_seed(seed)).tolist()
    has_draft, taken = False, 0.0
    while of.progress < num_new:
        plan, count, draw = of.choose(), 1, draws.pop()
        shape = plan.draft_length or 1, plan.num_branches, plan.draft_length
        is_read = has_draft and plan != PLAIN
        while is_read and count < 4 and draw[count] < chance:
            count += 1
        has_draft = plan != PLAIN
        of.see([(4 if is_read else 1, count)], shape, costs.seconds[shape])
        taken += costs.seconds[shape]
    of.end()
    return taken, of.progress, taken != of.progress


def test_what_drafts_saved_earlier_texts_pays_for_tries_in_later_ones():
    plans = plans_up_to(4, is_wide=False, is_static=True)
    seconds = {(n, m, k): 1.0 + 0.11 * (n + m * k - 1) for n, m, k in shapes_of(plans, is_static=True)}

    def texts(credit, chances):
        costs = StepTimes(dict(seconds), credit=credit)
        return [played_text(costs, chance, seed) for seed, chance in enumerate(chances)]

    assert not any(has_drafted for *_, has_drafted in texts(0.0, [1.0] * 3))  # none can afford a try by itself
    good = texts(2.0, [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    assert all(has_drafted for *_, has_drafted in good)
    assert all(taken < 0.75 * num for (taken, num, _), i in zip(good, range(7), strict=True) if i in (0, 1, 3, 6))
    assert all(taken <= 1.03 * num + 2.0 for taken, num, _ in good)
    bad = texts(2.0, [0.0] * 6)
    assert sum(taken for taken, *_ in bad) <= sum(1.03 * num for _, num, _ in bad) + 2.0
    assert not any(has_drafted for *_, has_drafted in bad[2:])


def test_a_batch_does_not_begin_with_a_try_that_only_nearly_pays():
    plans = plans_up_to(8, is_wide=False)
    seconds = {(n, m, k): 1.0 + 0.15 * (n + m * k - 1) for n, m, k in shapes_of(plans)}
    assert DraftPlanner(StepTimes(seconds), plans, num_rows=1).choose() != PLAIN
    assert DraftPlanner(StepTimes(seconds), plans, num_rows=2).choose() == PLAIN


def test_the_pace_of_a_batch_is_told_what_its_slowest_unfinished_row_has(monkeypatch):
    model, seen = tiny_tidar(draft_length=4), []

    class Told(DraftPlanner):
        def see(self, accepted, shape, seconds, progress=None):
            seen.append((min(count for _, count in accepted), progress))
            super().see(accepted, shape, seconds, progress)

    monkeypatch.setattr(
        DECODER,
        "planner_of",
        lambda run, state, options, _: Told(planner(1.0, 0.0, 0.9, 4).costs, plans_up_to(4, True)),
    )
    model.generate(random_prompts(3, 7), max_new_tokens=20, do_sample=False, num_branches="auto")
    assert seen[0][1] == seen[0][0] and seen[-1][1] == 19
    assert [progress for _, progress in seen] == sorted(progress for _, progress in seen)


def test_a_text_begins_with_a_try_where_usual_drafts_nearly_pay():
    plans = plans_up_to(8, is_wide=False)
    for each_query, is_tried in ((0.15, True), (0.5, False)):
        seconds = {(n, m, k): 1.0 + each_query * (n + m * k - 1) for n, m, k in shapes_of(plans)}
        of = DraftPlanner(StepTimes(seconds), plans)
        assert max(map(of.tokens_per_second, plans)) < 1.1 * of.tokens_per_second(PLAIN)
        begins = [plan != PLAIN for plan in played_forwards(of, 1, 8)]
        assert begins == [is_tried, is_tried, *[False] * 6]


def test_a_text_knows_nothing_of_those_before_it_but_what_forwards_cost():
    model, prompts, paces = tiny_tidar(draft_length=4), random_prompts(1, 7), []
    before = DECODER.planner_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DECODER, "planner_of", lambda *args: paces.append(before(*args)) or paces[-1])
        for _ in range(2):
            model.generate(prompts, max_new_tokens=20, do_sample=False, num_branches="auto")
    assert paces[0].costs is paces[1].costs and paces[0] is not paces[1]


def test_plain_forwards_are_timed_again_now_and_then():
    of = planner(1.0, 0.02, 0.9)
    of.costs.seconds[1, 0, 0] = 5.0  # as if another program had held it up
    plans = []
    for _ in range(80 * RETRY_FORWARDS):
        plans.append(of.choose())
        if plans[-1] == PLAIN:
            of.see([(1, 1)], (1, 0, 0), 0.1)
        else:
            length, branches = plans[-1].draft_length, plans[-1].num_branches
            of.see([(length, length)], (length, branches, length if branches else 0), 1.2)
    assert plans[: 2 * RETRY_FORWARDS].count(PLAIN) <= 2
    assert plans[-RETRY_FORWARDS:].count(PLAIN) >= RETRY_FORWARDS - 2


def test_a_machine_that_slows_down_while_drafting_does_not_make_plain_decoding_look_cheap():
    of = planner(1.0, 0.02, 0.8)
    best = of.choose()
    shape = (best.draft_length, best.num_branches, best.draft_length if best.num_branches else 0)
    promised = of.tokens_per_second(best) / of.tokens_per_second(PLAIN)
    seconds = of.costs.seconds[shape]
    for _ in range(200):
        of.see([(best.draft_length, 1)], (0, 0, 0), 1.0)  # a shape nobody measured says nothing
        of.see([(1, 1)], shape, 3 * seconds)
    assert of.costs.slowness > 1.5
    of.reached, of.stood = [1e6] * 8, [0.8e6] * 8
    assert of.tokens_per_second(best) / of.tokens_per_second(PLAIN) > promised / 2


def test_a_forward_of_a_shape_nobody_measured_is_charged_what_it_took():
    of = planner(1.0, 0.02, 0.8)
    of.see([(1, 1)], (1, 0, 0), 1.0)
    assert of.spent == pytest.approx(1.0)
    of.see([(4, 2)], (4, 1, 8), 1.5)
    assert of.spent == pytest.approx(2.5) and of.progress == 3


def test_what_late_blocks_give_is_promised_where_there_are_blocks():
    of = planner(1.0, 0.02, 0.5)
    before = {plan: of.tokens_per_second(plan) for plan in of.plans}
    for _ in range(100):
        of.see([(1, 3), (1, 1)], (4, 1, 4), of.costs.seconds[4, 1, 4])
    assert of.late == pytest.approx(1.0, abs=0.01) and of.costs.slowness == pytest.approx(1)
    for plan in of.plans:
        promised = of.tokens_per_second(plan)
        assert promised > before[plan] if 0 < plan.num_branches < plan.draft_length else promised == before[plan]


def test_one_lucky_measurement_does_not_stand_out():
    plans = plans_up_to(8, is_wide=False)
    seconds = {(n, m, k): 1.0 + 0.05 * (n + m * k - 1) + 0.3 * (m > 0) for n, m, k in shapes_of(plans)}
    straight = StepTimes(dict(seconds)).smoothed().seconds
    assert straight == pytest.approx(seconds, rel=1e-3)
    lucky = StepTimes(seconds | {(8, 1, 8): seconds[8, 1, 8] * 0.5}).smoothed().seconds
    assert lucky[8, 1, 8] > 0.6 * seconds[8, 1, 8]


def test_acceptance_that_changes_is_noticed():
    of = planner(1.0, 0.02, 0.0)
    of.reached, of.stood = [200.0] * 8, [0.0] * 8
    assert of.choose() == PLAIN
    for _ in range(300):
        of.see([(8, 8)], (8, 1, 8), 1.2)
    of.see([(1, 1)], (1, 0, 0), 1.0)
    assert of.choose() != PLAIN
    assert of.costs.seconds[8, 1, 8] * of.costs.slowness == pytest.approx(1.2, rel=0.05)


@pytest.mark.parametrize("costs", [(1.0, 0.0), (1.0, 0.02), (1.0, 10.0)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_text_is_the_plain_loops_whatever_the_pace(costs, batch_size, monkeypatch):
    model = tiny_tidar("mistral", draft_length=8)
    monkeypatch.setattr(
        DECODER, "planner_of", lambda run, state, options, _: planner(*costs, 0.5, options.draft_length)
    )
    prompts = random_prompts(batch_size, 7)
    found = model.generate(prompts, max_new_tokens=40, do_sample=False, num_branches="auto", repetition_penalty=1.0)
    assert found.tolist() == [plain_greedy_loop(model, row, num_new=40).tolist() for row in prompts]


def test_plans_that_change_all_the_time_leave_the_text_alone(monkeypatch):
    model = tiny_tidar("qwen3", draft_length=8)
    plans = [Plan(8, 2), PLAIN, Plan(4, 0), Plan(4, 1), Plan(2, 1), Plan(8, 8), Plan(8, 0), PLAIN, Plan(2, 2)]
    generator = torch.Generator().manual_seed(0)

    class Restless(DraftPlanner):
        def choose(self):
            return plans[int(torch.randint(len(plans), (), generator=generator))]

    restless = Restless(StepTimes({(1, 0, 0): 1.0}), plans, num_rows=3)
    monkeypatch.setattr(DECODER, "planner_of", lambda run, state, options, _: restless)
    prompts = random_prompts(3, 9)
    attention_mask = torch.ones_like(prompts)
    attention_mask[1, :4] = 0
    keywords = {"attention_mask": attention_mask, "max_new_tokens": 40, "do_sample": False}
    keywords |= {"repetition_penalty": 1.3, "eos_token_id": [25, 36]}
    expected = model.generate(prompts, draft_length=0, **keywords)
    for _ in range(3):
        assert model.generate(prompts, num_branches="auto", **keywords).tolist() == expected.tolist()


def test_costs_are_measured_once_for_a_model_and_leave_the_text_alone():
    model = tiny_tidar(draft_length=4)
    hook = CountedForwards(model)
    prompts = random_prompts(1, 7)
    text = plain_greedy_loop(model, prompts[0], num_new=60).tolist()
    hook.num_queries.clear()
    first = model.generate(
        prompts, max_new_tokens=60, do_sample=False, num_branches="auto", return_dict_in_generate=True
    )
    num_measured = len(hook.num_queries) - first.num_forwards - first.num_prefill_forwards
    assert num_measured >= 3 * len(shapes_of(plans_up_to(4, is_wide=False)))
    hook.num_queries.clear()
    again = model.generate(
        prompts, max_new_tokens=60, do_sample=False, num_branches="auto", return_dict_in_generate=True
    )
    assert len(hook.num_queries) == again.num_forwards + again.num_prefill_forwards
    assert first.sequences[0].tolist() == again.sequences[0].tolist() == text


def test_perfect_drafts_are_used_where_they_pay(monkeypatch):
    model = tiny_tidar(draft_length=8)
    prompts = random_prompts(1, 5)
    text = plain_greedy_loop(model, prompts[0], num_new=60)
    script_drafts(monkeypatch, text, is_right=True, sureness=20.0)
    monkeypatch.setattr(DECODER, "planner_of", lambda run, state, options, _: planner(1.0, 0.01, 0.9))
    hook = CountedForwards(model)
    output = model.generate(
        prompts, max_new_tokens=1 + 1 + 5 * 8, do_sample=False, num_branches="auto", return_dict_in_generate=True
    )
    assert output.sequences[0].tolist() == text[:47].tolist()
    assert hook.num_queries[:2] == [5, 1 + 8]  # the prompt alone, then a token with the first masks behind it
    assert output.num_forwards == 1 + 5


def test_sampling_with_a_seed_is_refused():
    with pytest.raises(ValueError, match="clock"):
        tiny_tidar().generate(random_prompts(1, 4), max_new_tokens=3, do_sample=True, seed=1, num_branches="auto")
