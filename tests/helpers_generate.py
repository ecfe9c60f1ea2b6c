"""Arguments for `generate`: keywords, and a caller's own processors and stopping criteria."""

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, WatermarkingConfig

from helpers_tidar import VOCAB_SIZE


class ForbidsTheLastTokenAgain(LogitsProcessor):
    """A user's processor that depends on the whole prefix, and checks its input."""

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores)
        scores = scores.clone()
        scores[torch.arange(len(scores)), input_ids[:, -1]] = -torch.inf
        scores[torch.arange(len(scores)), input_ids.sum(dim=1) % VOCAB_SIZE] += 3.0
        return scores


def allowed_tokens(batch_id, prefix):
    """Allowed tokens that depend on the row's number and the prefix."""
    start = (batch_id + int(prefix[-1])) % 3
    return list(range(1 + start, VOCAB_SIZE, 3))


KEYWORDS = {
    "nothing": {},
    "temperature without sampling": {"temperature": 0.7},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[4], [7, 9], [12, 3, 5]]},
    "suppress_tokens": {"suppress_tokens": [4, 7, 12, 25, 36]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [4, 7, 12, 25, 36]},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(20, 50))},
    "min_length": {"min_length": 14, "eos_token_id": list(range(20, 50))},
    "eos list": {"eos_token_id": [25, 36, 44]},
    "forced_eos": {"forced_eos_token_id": 33},
    "exponential_decay": {"exponential_decay_length_penalty": (5, 1.3), "eos_token_id": 33},
    "sequence_bias": {"sequence_bias": [[[5], 4.0], [[6, 7], 2.0]]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed_tokens},
    "logits_processor": {"logits_processor": LogitsProcessorList([ForbidsTheLastTokenAgain()])},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.3},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=3.0)},
    "max_length": {"max_length": 21, "max_new_tokens": None},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 4, "eos_token_id": [25, 36]},
}


class StopsAfterTheSum(StoppingCriteria):
    """A user's stateful criterion. It must see each prefix once, in order, padded as in plain decoding."""

    def __init__(self, limit):
        self.limit, self.seen = limit, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return input_ids.sum(dim=1) > self.limit


class StopsAfterSureTokens(StoppingCriteria):
    """Sums the best scores of all steps: it needs the scores of every step so far, in order."""

    def __init__(self, limit):
        self.limit, self.num_steps = limit, []

    def __call__(self, input_ids, scores, **kwargs):
        self.num_steps.append(len(scores))
        return sum(step.max(dim=-1).values for step in scores) > self.limit
