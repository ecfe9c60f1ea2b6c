"""A tiny model of every causal language model of transformers."""

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from helpers_tidar import SHAPE

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOST_PARAMETERS = 4_000_000

# The names that families have for their sizes, and tiny values.
SIZES = {
    **dict.fromkeys(("d_model", "n_embd", "dim", "emb_dim", "hidden_dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("n_inner", "ffn_dim", "ffn_hidden_size", "d_inner", "dff", "dim_ff", "inner_dim"), 48),
    **dict.fromkeys(("num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "global_head_dim", "d_kv", "dim_head", "d_head", "attention_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim", "mamba_d_state"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "state_size", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("n_positions", "max_seq_len", "n_ctx"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_kv_heads", "mamba_expand"), 2),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "first_k_dense_replace"), 1),
    **dict.fromkeys(("cls_token_id", "sep_token_id"), None),
    "init_std": 0.2,
    "vocab_size_per_layer_input": 61,
    "index_topk": 300,
    "sliding_window": 9,
    "is_decoder": True,
}
ALL_HEADS = {"num_key_value_heads": 4}
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), ALL_HEADS),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), ALL_HEADS),
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "cwm": {"bos_token_id": 1},
    "dots1": ALL_HEADS | {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 9},
    "modernbert-decoder": {"bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config_of(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The config of a tiny model; raises any error where the family cannot be that small."""
    config_class = CONFIG_MAPPING[model_type]
    names = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    values = {name: value for name, value in (SHAPE | SIZES).items() if name in names}
    twice = {alias for alias, name in config_class.attribute_map.items() if alias in values and name in values}
    values = {name: value for name, value in values.items() if name not in twice}
    return config_class(**values | CHANGES.get(model_type, {}) | changes)


def tiny_model_of(config: PreTrainedConfig) -> PreTrainedModel | None:
    """A random stock model in float32; None if it is not tiny."""
    with torch.device("meta"):
        if AutoModelForCausalLM.from_config(config).num_parameters() > MOST_PARAMETERS:
            return None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # initial norms of 1 and biases of 0 hide mistakes
                parameter += torch.randn_like(parameter) / 4
    return model
