"""Sampled text has the model's own distribution: 2,000 draws of each engine, compared by chi-square."""

from collections import Counter

from vllm import SamplingParams

from helpers_engines import Counted, prompts

NUM_DRAWS, NUM_TOKENS = 2000, 4


def draws(llm, seed):
    """Texts of one prompt."""
    params = SamplingParams(n=NUM_DRAWS // 16, temperature=0.7, top_k=8, max_tokens=NUM_TOKENS, ignore_eos=True)
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


def test_sampled_text_has_the_models_own_distribution(plain, drafting):
    want = draws(plain, 0)
    with Counted(drafting) as counted:
        got = draws(drafting, 1)
    assert counted.num_accepted > 100, "without drafts that stand this proves nothing"
    assert len(want) == len(got) == NUM_DRAWS and len(set(want)) > 20
    for place in range(NUM_TOKENS):
        assert abs(z_of([one[place] for one in want], [one[place] for one in got])) < 4
    for length in (2, 3, NUM_TOKENS):
        assert abs(z_of([one[:length] for one in want], [one[:length] for one in got])) < 4


def test_a_wrong_distribution_would_be_seen(plain):
    want = draws(plain, 2)
    wrong = [one if place % 8 else (want[0][0], *one[1:]) for place, one in enumerate(want)]
    assert z_of([one[0] for one in want], [one[0] for one in wrong]) > 4
