"""Tiny random models of the families whose layers keep states, stock and drafting."""

import copy

import pytest
import torch

from helpers_every_family import tiny_config_of, tiny_model_of
from wavedraft import TiDARForCausalLM
from wavedraft.generation.stock_model import can_choose_experts

MIXED = ["linear_attention", "full_attention", "linear_attention"]
THREE = {"num_hidden_layers": 3}
HYBRIDS = {
    "qwen3_next": {**THREE, "layer_types": MIXED},
    "qwen3_5_text": {**THREE, "layer_types": MIXED},
    "qwen3_5_moe_text": {**THREE, "layer_types": MIXED},
    "lfm2": {**THREE, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {**THREE, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.7, "mamba_rms_norm": True},
    "granitemoehybrid": {**THREE, "layer_types": MIXED, "logits_scaling": 2.0, "position_embedding_type": "rope"},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"]},
    "olmo_hybrid": {**THREE, "layer_types": MIXED},
}
QUICK = {"qwen3_next", "lfm2"}  # the others are of the slow tests
EVERY_HYBRID = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in HYBRIDS]
OTHERS = {
    "bamba": {**THREE, "attn_layer_indices": [1]},
    "jamba": {**THREE, "attn_layer_offset": 1, "attn_layer_period": 2},
    "kimi_linear": {**THREE, "layer_types": MIXED, "num_key_value_heads": 4},
    "bailing_hybrid": {**THREE, "layer_types": MIXED, "num_key_value_heads": 4},
    "zaya": {**THREE},
}
TAUGHT = {"draft_length": 4, "mask_token_id": 61, "mask_embedding_id": 3}


def tiny_hybrid(family, draft_length=4, dtype=torch.float32, **changes):
    """A stock model, and a drafting model with its weights."""
    config = tiny_config_of(family, **{**(HYBRIDS | OTHERS)[family], **changes})
    stock = tiny_model_of(config).to(dtype)
    config = copy.deepcopy(config)
    config.tidar_config = TAUGHT | {"draft_length": draft_length}
    model = TiDARForCausalLM.from_config(config).eval().to(dtype)
    model.load_state_dict(stock.state_dict())
    for one in (stock, model):
        one.generation_config.pad_token_id, one.generation_config.eos_token_id = 0, None
        if dtype == torch.float64 and can_choose_experts(one):
            one.set_experts_implementation("eager")  # the grouped products have no float64
    return stock, model
