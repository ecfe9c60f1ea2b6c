"""Sampling with the exact policies: every text of three tokens is counted, and held against its true probability.

The test statistic is chi-square; a correct sampler fails it with probability ERROR_RATE, and the seeds are fixed.
"""

import itertools

import pytest
import torch

from recurrent_golden import random_model

ERROR_RATE = 1e-3
VOCABULARY = 5
PROMPT = [1, 3, 0, 2]
WARPERS = {"temperature": 1.4, "top_k": 4, "top_p": 1.0}


def true_probabilities(model, process) -> dict[tuple, float]:
    """Probability of each text of three tokens, by plain forwards of every prefix."""
    probabilities = {}
    for text in itertools.product(range(VOCABULARY), repeat=3):
        ids = torch.tensor([[*PROMPT, *text]])
        with torch.no_grad():
            logits = model(ids, init_scale=0.0).logits[0, len(PROMPT) - 1 : -1].double()
        probs = process(logits).softmax(dim=-1)
        probabilities[text] = torch.stack([probs[i, token] for i, token in enumerate(text)]).prod().item()
    return probabilities


def warp(logits: torch.Tensor) -> torch.Tensor:
    """WARPERS, written out: the temperature, then all but the four likeliest ruled out."""
    logits = logits / WARPERS["temperature"]
    return logits.masked_fill(logits < logits.topk(WARPERS["top_k"]).values[:, -1:], -torch.inf)


def chance_of_worse(counts: dict[tuple, int], probabilities: dict[tuple, float]) -> float:
    """The chi-square test's p-value; cells expecting fewer than five are pooled."""
    num = sum(counts.values())
    large = [text for text, prob in probabilities.items() if num * prob >= 5]
    observed = [counts.get(text, 0) for text in large]
    expected = [num * probabilities[text] for text in large]
    observed, expected = [*observed, num - sum(observed)], [*expected, num - sum(expected)]
    if expected[-1] < 1e-6 * num:
        assert observed[-1] == 0, "texts that cannot be were written"
        observed.pop(), expected.pop()
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    degrees = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)).item()


def draw(model, num: int, seed: int, **options) -> dict[tuple, int]:
    rows = torch.tensor([PROMPT]).expand(num // 10, -1)
    generator, counts = torch.Generator().manual_seed(seed), {}
    for _ in range(10):
        output = model.generate(
            rows, max_new_tokens=3, do_sample=True, init_scale=0.0, generator=generator, **WARPERS, **options
        )
        for text in output[:, len(PROMPT) :].tolist():
            counts[tuple(text)] = counts.get(tuple(text), 0) + 1
    return counts


OPTIONS = [
    {"policy": "exact", "draft_recurrences": (1,)},
    {"policy": "exact", "draft_recurrences": (1, 2, 3)},
    {"policy": "exact", "draft_recurrences": (2,), "max_wavefront": 2},
    {"policy": "self-speculative", "draft_recurrences": 1, "draft_length": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sampled_texts_have_their_true_probabilities(options):
    model = random_model(3, vocab_size=VOCABULARY, mean_recurrence=4)
    probabilities = true_probabilities(model, warp)
    assert chance_of_worse(draw(model, 20_000, seed=7, **options), probabilities) > ERROR_RATE


def test_the_test_sees_a_sampler_that_is_wrong():
    model = random_model(3, vocab_size=VOCABULARY, mean_recurrence=4)
    probabilities = true_probabilities(model, warp)
    shallow = {"policy": "exact", "num_recurrences": 2, "draft_recurrences": (1,)}
    assert chance_of_worse(draw(model, 20_000, seed=7, **shallow), probabilities) < 1e-9
