"""A tiny model of every causal language model of transformers."""

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from helpers_tidar import SHAPE

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

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
BOTH_KINDS = ["sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SHARED_CACHE = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": BOTH_KINDS * 2}
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
HYBRID = {"num_hidden_layers": 3, "layer_types": LINEAR}
PICTURES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), ALL_HEADS),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), ALL_HEADS),
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(BOTH_KINDS, ROPE)},
    "cwm": {"bos_token_id": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": ALL_HEADS | {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": SHARED_CACHE | {
        "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8,
        "altup_num_inputs": 2,
    },
    "gemma4_text": SHARED_CACHE,
    "git": {"vision_config": PICTURES},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 9},
    "gptj": {"rotary_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "modernbert-decoder": {"bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1},
    "phi4_multimodal": {
        "vision_config": PICTURES,
        "audio_config": PICTURES | {"num_blocks": 1, "ext_pw_out_channel": 32, "nemo_conv_channels": 32},
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "roc_bert": dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 20)
    | dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 8),
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "granitemoehybrid"), HYBRID),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid", "qwen4_exp_text"), HYBRID | ALL_HEADS),
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "jamba": {"num_hidden_layers": 3, "attn_layer_offset": 1, "attn_layer_period": 2},
    "nemotron_h": {"layers_block_type": [*LINEAR[:1], "moe", "full_attention", "mlp", *LINEAR[:1]]},
}  # fmt: skip

# Models of several parts, or with layers that share weights, whose tiny form would take a table of its own.
NOT_TINY = {
    "blt", "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified",
    "gemma4_unified_assistant", "got_ocr2", "llama4", "mllama", "moss_transcribe_diarize", "musicgen",
    "musicgen_melody", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "zamba", "zamba2",
}  # fmt: skip


def tiny_config_of(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The config of a tiny model."""
    config_class = CONFIG_MAPPING[model_type]
    names = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    values = {name: value for name, value in (SHAPE | SIZES).items() if name in names}
    twice = {alias for alias, name in config_class.attribute_map.items() if alias in values and name in values}
    values = {name: value for name, value in values.items() if name not in twice}
    return config_class(**values | CHANGES.get(model_type, {}) | changes)


def tiny_model_of(config: PreTrainedConfig) -> PreTrainedModel:
    """A random stock model in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # initial norms of 1 and biases of 0 hide mistakes
                parameter += torch.randn_like(parameter) / 4
    return model
