"""The simulation of the growth page: its formulas equal simulated results, its roofline published figures."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import growth
import growth_hybrids

from helpers_drafts import draft_now_and_then
from helpers_hybrids import tiny_hybrid
from wavedraft.generation.execution.stateful_layers import KeptState, LayerCall


def played(chances, draft_length, num_branches, seconds, num_steps=20_000):
    """Tokens a second of drafting, by playing it: drafts after the likeliest numbers of accepted tokens."""
    reaches = torch.tensor([1.0, *chances[: draft_length - 1], 0.0]).cumprod(0)
    likeliest = set((reaches[:-1] - reaches[1:]).topk(num_branches).indices.add(1).tolist())
    draws = torch.rand(num_steps, draft_length, generator=torch.Generator().manual_seed(0))
    tokens, taken, has_draft = 0, 0.0, False
    for draw in draws.tolist():
        if not has_draft:
            tokens, taken, has_draft = tokens + 1, taken + seconds(1 + draft_length), True
            continue
        accepted = 1
        while accepted < draft_length and draw[accepted] < chances[accepted - 1]:
            accepted += 1
        tokens, taken = tokens + accepted, taken + seconds(draft_length * (1 + num_branches))
        has_draft = accepted in likeliest
    return tokens / taken


@pytest.mark.parametrize("plan", [(2, 1), (4, 1), (4, 4), (8, 3)])
@pytest.mark.parametrize("chances", [[0.8] * 7, [0.6, 0.5, 0.4, 0.3, 0.3, 0.2, 0.1]])
def test_the_predicted_gain_is_that_of_playing_it(plan, chances):
    def seconds(width):
        return 1.0 + 0.02 * width

    predicted = growth.speed_up(chances, *plan, seconds, plain=1.0)
    assert predicted == pytest.approx(played(chances, *plan, seconds), rel=0.02)


def test_the_roofline_is_near_what_was_published():
    for width, published in growth.PUBLISHED.items():
        seconds = growth.forward_seconds(growth.MODELS[2], growth.H100, width, 1, 1024)
        assert 1e3 * seconds == pytest.approx(published, rel=0.03)


def test_a_steady_chance_gives_the_tokens_it_was_asked_for():
    for tokens in (1.5, 4.0, 7.45):
        chances = [growth.steady_chance(tokens, 16)] * 15
        assert growth.tokens_and_misses(chances, 16, 16) == pytest.approx((tokens, 0.0), abs=1e-6)


def test_a_curve_goes_through_what_was_measured_and_between():
    seconds = growth.curve({1: 1.0, 4: 1.5, 16: 6.0})
    assert [seconds(width) for width in (1, 4, 16)] == pytest.approx([1.0, 1.5, 6.0])
    assert 1.0 < seconds(2) < 1.5 and seconds(8) == pytest.approx(3.0) and seconds(32) == pytest.approx(12.0)


def test_drafting_pays_less_with_every_row_until_plain_decoding_is_best():
    chances = [growth.steady_chance(4.0, 16)] * 15
    model, machine = growth.MODELS[1], growth.H100
    gains = [growth.gain_on(chances, model, machine, 2**i, 16)[0] for i in range(12)]
    assert gains == sorted(gains, reverse=True) and gains[0] > 3 and gains[-1] == 1.0
    long = [growth.gain_on(chances, model, machine, 256, context)[0] for context in (16, 2048, 32_768)]
    assert long == sorted(long), "a long cache is read once for all query tokens of its row"
    assert growth.best_plan(chances, lambda width: 1.0 + 10 * width, plain=1.0) == (1.0, 0, 0)
    assert growth.best_plan(chances, lambda width: 1.0, plain=1.0)[1:] == (16, 16)


def test_what_one_plan_costs_beyond_its_forward_predicts_the_others():
    chances, plain, overhead = [0.7, 0.6, 0.5, 0.5, 0.4, 0.4, 0.3], 1.0, 0.3
    costs = {str(width): 1.0 + 0.03 * (width - 1) for width in (1, *range(2, 300))}
    seconds = growth.curve({int(width): cost for width, cost in costs.items()})
    measured = {"chances": chances, "costs": {"stock": {"1": plain}, "drafting": costs}}
    measured |= {"tokens_per_forward": {"plain": 1.0}, "speed_up": {"plain": 1.0}}
    for plan in growth.PLANS:
        tokens, misses = growth.tokens_and_misses(chances, *plan)
        name = "{}, {}".format(*plan)
        measured["tokens_per_forward"][name] = (tokens + misses) / (1 + misses)
        measured["speed_up"][name] = growth.speed_up(chances, *plan, lambda width: seconds(width) + overhead, plain)
    assert growth.step_overhead(measured) == pytest.approx(overhead)
    for _, tokens, real_tokens, gain, real_gain in growth.compared(measured):
        assert (tokens, gain) == pytest.approx((real_tokens, real_gain))


@pytest.mark.parametrize("num_branches", [1, 2, "all"])
def test_layers_with_a_state_read_what_the_formula_says(num_branches, monkeypatch):
    stock, model = tiny_hybrid("lfm2")
    prompt = torch.randint(1, 61, (1, 9), generator=torch.Generator().manual_seed(1))
    asked = {"max_new_tokens": 24, "do_sample": False}
    draft_now_and_then(monkeypatch, stock.generate(prompt, **asked))
    read, call, steps = KeptState.read, LayerCall.__call__, []

    def counted_read(self, run, states, reading):
        if run.number == 0:
            steps.append([reading, 0, 0])
        return read(self, run, states, reading)

    def counted_call(self, layer, states, *args, **kwargs):
        if self.number == 0:
            steps[-1][1] += states.shape[1]
            steps[-1][2] += 1
        return call(self, layer, states, *args, **kwargs)

    monkeypatch.setattr(KeptState, "read", counted_read)
    monkeypatch.setattr(LayerCall, "__call__", counted_call)
    model.generate(prompt, num_branches=num_branches, **asked)
    assert len(steps) > 5
    accepted = []
    for (before, _, _), (now, num_tokens, num_calls) in pairwise(steps):
        accepted.append(1 if before.is_prompt else now.lengths[0] - before.lengths[0])
        about = now.num_clean, now.draft_length, now.branches[0]
        assert growth_hybrids.stateful_reads(accepted[-1], *about) == (num_tokens, num_calls)
    assert max(accepted) > 1


def test_the_page_has_the_tables_numbers(capsys):
    growth_hybrids.print_hybrids()
    page = (Path(__file__).parents[1] / "docs" / "growth.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page
