"""Compares counts of sampled texts with their true probabilities."""

import itertools
import math

import torch
from transformers import GenerationConfig

ERROR_RATE = 1e-3  # the probability that a correct sampler fails a test of `chance_of_worse`
SMALL_VOCABULARY, NUM_DRAWS = 5, 8_000
NORMAL_QUANTILE = 4.7534  # of 1 - 1e-6; a correct sampler fails `chi_square_bound` with probability 1e-6


def chance_of_worse(counts: dict[tuple, int], probabilities: dict[tuple, float]) -> float:
    """The chi-square test's p-value; cells with an expected count below five are pooled."""
    num = sum(counts.values())
    large = [text for text, prob in probabilities.items() if num * prob >= 5]
    observed = [counts.get(text, 0) for text in large]
    expected = [num * probabilities[text] for text in large]
    observed, expected = [*observed, num - sum(observed)], [*expected, num - sum(expected)]
    if expected[-1] < 1e-6 * num:
        assert observed[-1] == 0, "texts of probability 0 were written"
        observed.pop(), expected.pop()
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    degrees = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)).item()


def chi_square_bound(degrees: int) -> float:
    """The quantile of 1 - 1e-6 (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + NORMAL_QUANTILE * math.sqrt(spread)) ** 3


@torch.no_grad()
def exact_joint(model, prompt_ids, num_new, **sampling) -> torch.Tensor:
    """The probability of every continuation, [V] * num_new, step by step with transformers' processors."""
    config = GenerationConfig(do_sample=True, max_new_tokens=num_new, **sampling)
    config, _ = model._prepare_generation_config(config)
    model._prepare_special_tokens(config, False, device="cpu")
    processors = model._get_logits_processor(config, input_ids_seq_length=prompt_ids.shape[1], device="cpu")
    joint = torch.ones(1)
    for step in range(num_new):
        prefixes = torch.tensor(list(itertools.product(range(SMALL_VOCABULARY), repeat=step)), dtype=torch.long)
        ids = torch.cat([prompt_ids.expand(len(prefixes), -1), prefixes.view(len(prefixes), step)], dim=1)
        probs = processors(ids, model(ids).logits[:, -1].float()).softmax(-1)
        joint = (joint.flatten()[:, None] * probs).flatten()
    return joint.view([SMALL_VOCABULARY] * num_new)


def draw(model, prompt_ids, num_new, num_draws, seed, **sampling) -> torch.Tensor:
    """Counts of every continuation, [V] * num_new."""
    torch.manual_seed(seed)
    counts = torch.zeros(SMALL_VOCABULARY**num_new)
    for _ in range(num_draws // 4000):
        batch = prompt_ids.expand(4000, -1)
        output = model.generate(
            batch, attention_mask=torch.ones_like(batch), do_sample=True, max_new_tokens=num_new, **sampling
        )
        new = output[:, prompt_ids.shape[1] :]
        place = sum(new[:, i] * SMALL_VOCABULARY ** (num_new - 1 - i) for i in range(num_new))
        counts += place.bincount(minlength=len(counts))
    return counts.view([SMALL_VOCABULARY] * num_new)
