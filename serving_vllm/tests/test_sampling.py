"""Sampled text has the model's own distribution: draws of each engine, compared by chi-square."""

from collections import Counter

import pytest
from vllm import SamplingParams

from helpers_engines import Counted, prompts

NUM_TOKENS = 4


def draws(llm, num_draws):
    """Texts of one prompt."""
    params = SamplingParams(
        n=num_draws // 16, temperature=0.7, top_k=8, min_p=0.1, max_tokens=NUM_TOKENS, ignore_eos=True
    )
    (one,) = prompts(1, seed=13)
    outputs = llm.generate([one] * 16, params.clone(), use_tqdm=False)
    return [tuple(answer.token_ids) for output in outputs for answer in output.outputs]


def z_of(first, second):
    """How many standard deviations the chi-square of two samples is above its mean. Rare outcomes are one."""
    counts = Counter(first), Counter(second)
    common = {key for key in counts[0] | counts[1] if counts[0][key] + counts[1][key] >= 10}
    table = [[one[key] for key in common] for one in counts]
    for row, one in zip(table, counts, strict=True):
        row.append(one.total() - sum(row))
    totals = [sum(column) for column in zip(*table, strict=True)]
    kept = [place for place, total in enumerate(totals) if total >= 10]
    chi_square = sum((row[place] - totals[place] / 2) ** 2 / (totals[place] / 2) for row in table for place in kept)
    degrees = len(kept) - 1
    return (chi_square - degrees) / (2 * degrees) ** 0.5 if degrees > 0 else 0.0


@pytest.mark.parametrize("num_draws", [320, pytest.param(2000, marks=pytest.mark.dear)])
def test_sampled_text_has_the_models_own_distribution(plain, drafting, num_draws):
    want = draws(plain, num_draws)
    with Counted(drafting) as counted:
        got = draws(drafting, num_draws)
    assert counted.num_accepted > num_draws // 10, "without drafts that stand this proves nothing"
    assert len(want) == len(got) == num_draws and len(set(want)) > 20
    for place in range(NUM_TOKENS):
        assert abs(z_of([one[place] for one in want], [one[place] for one in got])) < 4
    for length in (2, 3, NUM_TOKENS):
        assert abs(z_of([one[:length] for one in want], [one[:length] for one in got])) < 4
    wrong = [one if place % 4 else (*one[:2], got[0][2]) for place, one in enumerate(got)]
    assert z_of([one[2] for one in want], [one[2] for one in wrong]) > 4, "a wrong distribution would be seen"
