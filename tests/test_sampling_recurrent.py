"""Sampling with the exact policies: counts of all texts of three tokens are compared with their true probabilities.

The statistic is chi-square. A correct sampler fails with probability ERROR_RATE; the seeds are fixed.
"""

import itertools

import pytest
import torch

from helpers_marks import slow_but
from helpers_recurrent import random_model
from helpers_sampling import ERROR_RATE, chance_of_worse

VOCABULARY = 5
PROMPT = [1, 3, 0, 2]


def warm(scores: torch.Tensor, prefix: list[int]) -> torch.Tensor:
    """Temperature 1.4, then all but the four likeliest ruled out."""
    scores = scores / 1.4
    return scores.masked_fill(scores < scores.topk(4).values[-1], -torch.inf)


def nucleus(scores: torch.Tensor, prefix: list[int]) -> torch.Tensor:
    """Temperature 5, then the fewest likeliest tokens that hold 0.8 of the probability."""
    scores = scores / 5.0
    probs, order = scores.softmax(dim=-1).sort(descending=True)
    unlikely = order[probs.cumsum(dim=-1) - probs >= 0.8]
    return scores.index_fill(0, unlikely, -torch.inf)


def near_the_best(scores: torch.Tensor, prefix: list[int]) -> torch.Tensor:
    """Temperature 5, then the tokens at least 0.2 times as likely as the likeliest."""
    scores = scores / 5.0
    probs = scores.softmax(dim=-1)
    return scores.masked_fill(probs < 0.2 * probs.max(), -torch.inf)


def unrepeated(scores: torch.Tensor, prefix: list[int]) -> torch.Tensor:
    """Scores of tokens that have been said divided by 1.8, or multiplied where negative, then temperature 3."""
    said = torch.tensor([token in prefix for token in range(VOCABULARY)])
    return torch.where(said, torch.where(scores > 0, scores / 1.8, scores * 1.8), scores) / 3.0


WARPERS = {
    "temperature and top-k": ({"temperature": 1.4, "top_k": 4}, warm),
    "top-p": ({"temperature": 5.0, "top_p": 0.8}, nucleus),
    "min-p": ({"temperature": 5.0, "min_p": 0.2}, near_the_best),
    "repetition penalty": ({"repetition_penalty": 1.8, "temperature": 3.0}, unrepeated),
}


def true_probabilities(model, process) -> dict[tuple, float]:
    """Probability of each text of three tokens, by plain forwards of every prefix."""
    probabilities = {}
    for text in itertools.product(range(VOCABULARY), repeat=3):
        ids = [*PROMPT, *text]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), init_scale=0.0).logits[0].double()
        places = range(len(PROMPT), len(ids))
        probs = [process(logits[place - 1], ids[:place]).softmax(dim=-1)[ids[place]] for place in places]
        probabilities[text] = torch.stack(probs).prod().item()
    return probabilities


def draw(model, num: int, seed: int, **options) -> dict[tuple, int]:
    rows = torch.tensor([PROMPT]).expand(num // 10, -1)
    generator, counts = torch.Generator().manual_seed(seed), {}
    for _ in range(10):
        output = model.generate(rows, max_new_tokens=3, do_sample=True, init_scale=0.0, generator=generator, **options)
        for text in output[:, len(PROMPT) :].tolist():
            counts[tuple(text)] = counts.get(tuple(text), 0) + 1
    return counts


def small_model():
    return random_model(3, vocab_size=VOCABULARY, mean_recurrence=4, n_layers_in_recurrent_block=1)


OPTIONS = [
    {"policy": "exact", "draft_recurrences": (1,)},
    {"policy": "exact", "draft_recurrences": (1, 2, 3)},
    {"policy": "exact", "draft_recurrences": (2,), "max_wavefront": 2},
    {"policy": "self-speculative", "draft_recurrences": 1, "draft_length": 2},
]


@pytest.mark.parametrize(
    ("warper", "options"),
    slow_but(
        [("temperature and top-k", OPTIONS[3]), ("repetition penalty", OPTIONS[1])],
        [("temperature and top-k", options) for options in OPTIONS]
        + [(warper, OPTIONS[1]) for warper in ("top-p", "min-p", "repetition penalty")],
        is_of_several=True,
    ),
    ids=str,
)
def test_sampled_texts_have_their_true_probabilities(warper, options):
    model = small_model()
    keywords, process = WARPERS[warper]
    probabilities = true_probabilities(model, process)
    assert 10 < sum(probability > 0.002 for probability in probabilities.values()) < 125, "too sure, or all possible"
    assert chance_of_worse(draw(model, 4_000, seed=7, **keywords, **options), probabilities) > ERROR_RATE


def test_the_test_sees_a_sampler_that_is_wrong():
    model = small_model()
    keywords, process = WARPERS["temperature and top-k"]
    shallow = {"policy": "exact", "num_recurrences": 2, "draft_recurrences": (1,)}
    counts = draw(model, 4_000, seed=7, **keywords, **shallow)
    assert chance_of_worse(counts, true_probabilities(model, process)) < 1e-9


@pytest.mark.parametrize("policy", ["adaptive", "self-speculative", "diffusion-forcing", "exact"])
def test_a_falling_temperature_ends_in_the_greedy_text(policy):
    model, ids = random_model(4), torch.tensor([[5, 6, 7, 8]] * 8)
    options = {"max_new_tokens": 10, "policy": policy, "init_scale": 0.0}
    greedy = model.generate(ids[:1], **options)[0].tolist()
    shares = []
    for temperature in (2.0, 0.5, 1e-4):
        sampled = model.generate(ids, do_sample=True, temperature=temperature, top_k=0, seed=1, **options).tolist()
        same = sum(a == b for text in sampled for a, b in zip(text[4:], greedy[4:], strict=True))
        shares.append(same / 80)
    assert shares[0] < shares[1] < shares[2] == 1.0
