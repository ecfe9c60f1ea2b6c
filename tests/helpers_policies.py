"""Recurrent policies that write the text of full depth, with tiny models and padded prompts for them."""

import torch

from helpers_recurrent import random_model
from helpers_tidar import VOCAB_SIZE
from wavedraft.modeling_recurrent import RecurrentDepthForCausalLM

DEPTH = 3
FORCED = {"policy": "diffusion-forcing", "freeze_criterion": "fixed", "embedding_ema": 0.0, "max_wavefront": 1}
POLICIES = {
    "exact": {"policy": "exact", "draft_recurrences": (1, 2)},
    "self-speculative": {"policy": "self-speculative", "draft_recurrences": 1, "draft_length": 3},
    "forced": {**FORCED, "inner_recurrence": DEPTH, "kv_cache": "every-recurrence"},
}


def tiny_model(seed: int = 0) -> RecurrentDepthForCausalLM:
    return random_model(seed, vocab_size=VOCAB_SIZE, mean_recurrence=DEPTH, n_layers_in_recurrent_block=1)


def padded_prompts(batch_size: int, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of which the last has padding on its left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB_SIZE, (batch_size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, : 2 * (batch_size - 1)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
