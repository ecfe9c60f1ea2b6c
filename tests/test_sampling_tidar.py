"""Sampling with drafts has the distribution of plain sampling.

The joint distribution of the first three tokens is enumerated exactly and compared with 8,000 draws.
"""

import pytest
import torch

from helpers_marks import slow_but
from helpers_sampling import NUM_DRAWS, SMALL_VOCABULARY, chi_square_bound, draw, exact_joint
from helpers_tidar import random_prompts, tiny_tidar

SAMPLING = {
    "plain": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_k": 0, "top_p": 0.8},
    "min_p": {"top_k": 0, "min_p": 0.15},
    "repetition_penalty": {"top_k": 0, "repetition_penalty": 1.5},
    "all": {"top_k": 4, "temperature": 0.8, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("draft_length", slow_but({3}, (2, 3)))
@pytest.mark.parametrize("sampling", SAMPLING)
def test_joint_distribution_of_three_tokens_is_plain_samplings(sampling, draft_length):
    model = tiny_tidar(draft_length=draft_length, vocab_size=SMALL_VOCABULARY, initializer_range=0.12)
    prompt_ids = random_prompts(1, 4) % (SMALL_VOCABULARY - 1) + 1
    joint = exact_joint(model, prompt_ids, 3, **SAMPLING[sampling])
    assert joint.sum() == pytest.approx(1, abs=1e-4)
    assert joint.max() < 0.5, "a nearly certain continuation would prove nothing"

    counts = draw(model, prompt_ids, 3, NUM_DRAWS, seed=draft_length, **SAMPLING[sampling])

    expected = joint * NUM_DRAWS
    assert counts[joint < 1e-9].sum() == 0
    is_common = expected >= 5
    observed = torch.cat([counts[is_common], counts[~is_common].sum()[None]])
    expected = torch.cat([expected[is_common], expected[~is_common].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    assert statistic < chi_square_bound(len(expected) - 1)


def test_the_test_would_notice_a_sampler_that_trusts_its_drafts():
    """The same statistic, with drafts accepted blindly: far above its bound."""
    from wavedraft.generation.drafting import choice

    model = tiny_tidar(draft_length=3, vocab_size=SMALL_VOCABULARY, initializer_range=0.12)
    prompt_ids = random_prompts(1, 4) % (SMALL_VOCABULARY - 1) + 1
    joint = exact_joint(model, prompt_ids, 3, top_k=0)
    honest = choice.accept_block
    choice.accept_block = lambda ids, probs, *more: (torch.full_like(ids[:, 0], ids.shape[1]), probs[:, -1])
    try:
        counts = draw(model, prompt_ids, 3, NUM_DRAWS, seed=0, top_k=0)
    finally:
        choice.accept_block = honest
    statistic = ((counts - joint * NUM_DRAWS) ** 2 / (joint * NUM_DRAWS)).sum().item()
    assert statistic > 2 * chi_square_bound(joint.numel() - 1)


def test_a_row_with_its_own_seed_writes_the_same_in_any_batch():
    model = tiny_tidar("qwen3", draft_length=4)
    prompts = random_prompts(5, 6)
    seeds = [11, 7, 11, 2**40, 0]
    together = model.generate(prompts, do_sample=True, max_new_tokens=25, seed=seeds)
    for row, seed in enumerate(seeds):
        alone = model.generate(prompts[row : row + 1], do_sample=True, max_new_tokens=25, seed=[seed])
        assert alone[0].tolist() == together[row].tolist()
    again = model.generate(prompts[1:2], do_sample=True, max_new_tokens=25, seed=7)
    assert again[0].tolist() == together[1].tolist()


def test_seeded_and_greedy_decoding_leave_the_global_generator_alone():
    model = tiny_tidar()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.generate(random_prompts(1, 4), do_sample=True, max_new_tokens=8, seed=3)
    model.generate(random_prompts(1, 4), do_sample=False, max_new_tokens=8)
    assert torch.equal(torch.rand(3), expected)


def test_a_temperature_near_zero_approaches_greedy():
    model = tiny_tidar()
    prompts = random_prompts(3, 5)
    greedy = model.generate(prompts, do_sample=False, max_new_tokens=20)
    cold = model.generate(prompts, do_sample=True, temperature=1e-4, top_k=0, max_new_tokens=20)
    assert torch.equal(cold, greedy)
