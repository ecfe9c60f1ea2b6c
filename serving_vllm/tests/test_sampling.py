"""Sampled text has the model's own distribution: draws of each engine, compared by chi-square."""

from collections import Counter

import pytest
from vllm import SamplingParams

from helpers_engines import MIB, Counted, engine, prompts
from helpers_plain import plain_answers
from helpers_tiny import tiny_adapter

NUM_TOKENS, NUM_PROMPTS, NUM_PLAIN = 4, 16, 8000
HOW = {"temperature": 0.7, "top_k": 8, "min_p": 0.1, "max_tokens": NUM_TOKENS, "ignore_eos": True}
MOST = 5  # standard deviations of a chi-square above its mean


def asked():
    """One prompt, many times."""
    return prompts(1, seed=13) * NUM_PROMPTS


@pytest.fixture(scope="module")
def want(folders):
    """Draws of vLLM without drafts."""
    about = {"max_model_len": 256, "kv_cache_memory_bytes": 64 * MIB, "seed": 1}
    answers = plain_answers(folders[0], asked(), about, n=NUM_PLAIN // NUM_PROMPTS, **HOW)
    return [tuple(ids) for of_one in answers for _, ids in of_one]


@pytest.fixture(scope="module")
def guessing(folders, tmp_path_factory):
    """An engine whose drafts often stand: its masks read the row of a token that guesses well."""
    adapter = tiny_adapter(folders[0], tmp_path_factory.mktemp("guessing"), has_head=False, scale=0.05, mask_row=0)
    return engine(folders[0], adapter, {"keep": 0.0})


def draws(llm, num_draws):
    outputs = llm.generate(asked(), SamplingParams(n=num_draws // NUM_PROMPTS, **HOW), use_tqdm=False)
    return [tuple(answer.token_ids) for output in outputs for answer in output.outputs]


def z_of(first, second):
    """How many standard deviations the chi-square of two samples is above its mean. Rare outcomes are one."""
    counts = Counter(first), Counter(second)
    shares = [one.total() / (len(first) + len(second)) for one in counts]
    common = {key for key in counts[0] | counts[1] if (counts[0][key] + counts[1][key]) * min(shares) >= 5}
    table = [[one[key] for key in common] for one in counts]
    for row, one in zip(table, counts, strict=True):
        row.append(one.total() - sum(row))
    totals = [sum(column) for column in zip(*table, strict=True)]
    kept = [place for place, total in enumerate(totals) if total * min(shares) >= 5]
    chi_square = sum(
        (row[place] - totals[place] * share) ** 2 / (totals[place] * share)
        for row, share in zip(table, shares, strict=True)
        for place in kept
    )
    degrees = len(kept) - 1
    assert degrees > 0, "one outcome proves nothing"
    return (chi_square - degrees) / (2 * degrees) ** 0.5


@pytest.mark.parametrize(("num_draws", "wrong_share"), [(320, 4), pytest.param(2000, 10, marks=pytest.mark.dear)])
def test_sampled_text_has_the_models_own_distribution(want, guessing, num_draws, wrong_share):
    with Counted(guessing) as counted:
        got = draws(guessing, num_draws)
    assert counted.num_accepted > num_draws // 4, "without drafts that stand this proves nothing"
    assert len(got) == num_draws and len(want) == NUM_PLAIN and len(set(want)) > 20
    found = {f"token {place}": z_of([one[place] for one in want], [one[place] for one in got]) for place in range(4)}
    for length in (2, 3, NUM_TOKENS):
        found[f"first {length}"] = z_of([one[:length] for one in want], [one[:length] for one in got])
    print(f"{num_draws} draws, {counted.num_accepted} drafts stood, z: {found}")
    assert max(found.values()) < MOST, found
    guess = Counter(one[2] for one in got).most_common(1)[0][0]
    wrong = [guess if place % wrong_share == 0 else one[2] for place, one in enumerate(got)]
    assert z_of([one[2] for one in want], wrong) > MOST, "a draft that stands too often would be seen"
