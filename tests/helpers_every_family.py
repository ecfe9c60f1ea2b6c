"""A tiny model of every causal language model of transformers."""

import dataclasses
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from helpers_tidar import SHAPE

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class Shape(NamedTuple):
    """What tiny models of every family have in common."""

    heads: int = 4
    kv_heads: int = 2
    head_size: int = 8
    vocabulary: int = 61
    layers: int = 2
    window: int = 9
    tied: bool | None = None  # None is the family's own

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size


SHAPES = {
    "grouped": Shape(),
    "three groups, odd vocabulary, untied": Shape(6, 3, 8, 131, 3, 5, False),
    "one key head, tied": Shape(8, 1, 4, 97, 2, 7, True),
    "all heads, wide": Shape(2, 2, 16, 77, 4, 16),
}
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
BOTH_KINDS = ["sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
PICTURES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def sizes_of(shape: Shape) -> dict[str, Any]:
    """The names that families have for their sizes, and tiny values."""
    wide = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "hidden_dim", "word_embed_proj_dim", "embedding_size")
    layers = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
    heads = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
    one_head = ("head_dim", "global_head_dim", "d_kv", "dim_head", "d_head", "attention_head_dim")
    tied = {} if shape.tied is None else {"tie_word_embeddings": shape.tied}
    return SHAPE | tied | {
        **dict.fromkeys(wide, shape.hidden),
        **dict.fromkeys(("n_inner", "ffn_dim", "ffn_hidden_size", "d_inner", "dff", "dim_ff", "inner_dim"), 48),
        **dict.fromkeys((*layers, "num_decoder_layers"), shape.layers),
        **dict.fromkeys((*heads, "decoder_attention_heads"), shape.heads),
        **dict.fromkeys(one_head, shape.head_size),
        **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), shape.kv_heads),
        **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), shape.vocabulary),
        **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim", "mamba_d_state"), 8),
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "state_size"), 8),
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim"), 16),
        **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), shape.hidden // 2),
        **dict.fromkeys(("n_positions", "max_seq_len", "n_ctx"), 256),
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
        **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "mamba_expand"), 2),
        **dict.fromkeys(("linear_num_key_heads", "index_n_heads"), 2),
        **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
        **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
        **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "first_k_dense_replace"), 1),
        **dict.fromkeys(("cls_token_id", "sep_token_id"), None),
        "hidden_size_per_layer_input": 8,
        "init_std": 0.2,
        "index_topk": 300,
        "sliding_window": shape.window,
        "is_decoder": True,
    }  # fmt: skip


def changes_of(model_type: str, shape: Shape) -> dict[str, Any]:
    """What one family alone needs."""
    all_heads = {"num_key_value_heads": shape.heads}
    hybrid = {"num_hidden_layers": 3, "layer_types": LINEAR}
    convolutions = {"layer_types": (["conv", "full_attention"] * 2)[: shape.layers]}
    shared_cache = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": BOTH_KINDS * 2}
    changes: dict[str, dict[str, Any]] = {
        **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), all_heads),
        **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"), all_heads),
        "codegen": {"rotary_dim": 4, "n_head": 4},
        "cohere_compass_text": {"rope_parameters": dict.fromkeys(BOTH_KINDS, ROPE)},
        "cwm": {"bos_token_id": 1},
        "dbrx": {
            "attn_config": {"kv_n_heads": shape.kv_heads, "rope_theta": 1e4, "clip_qkv": 8},
            "ffn_config": {
                "hidden_size": shape.hidden, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2,
            },
            "tie_word_embeddings": False,
        },
        "diffllama": {"num_key_value_heads": 2},
        "dots1": all_heads | {"n_shared_experts": 1},
        "falcon_h1": {"mamba_d_ssm": 2 * shape.hidden},
        "gemma3n_text": shared_cache | {
            "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8,
            "altup_num_inputs": 2,
        },
        "gemma4_text": shared_cache,
        "git": {"vision_config": PICTURES},
        "gpt_neo": {
            "attention_types": [[["global", "local"], shape.layers // 2], [["global"], shape.layers % 2]],
            "window_size": shape.window,
        },
        "gptj": {"rotary_dim": 4},
        "lfm2_moe": convolutions | {"num_dense_layers": 1},
        "lfm3": convolutions,
        "longcat_flash": all_heads | {"head_dim": 8},  # that of its rotary part
        "mamba2": {"num_heads": 4, "head_dim": shape.hidden // 2},
        "mimo_v2_flash": {"num_key_value_heads": min(shape.kv_heads, shape.heads // 2)},  # doubled in window layers
        "modernbert-decoder": {"bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1},
        "phi4_multimodal": {
            "vision_config": PICTURES,
            "audio_config": PICTURES | {"num_blocks": 1, "ext_pw_out_channel": 32, "nemo_conv_channels": 32},
        },
        "reformer": {"axial_pos_embds": False, "attn_layers": (["local", "lsh"] * 2)[: shape.layers]},
        "roc_bert": dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 20)
        | dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 8),
        "zaya": {"num_experts_per_tok": 1},
        **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "granitemoehybrid"), hybrid),
        "bailing_hybrid": hybrid | all_heads,
        "kimi_linear": hybrid | all_heads | {"linear_num_heads": 4, "linear_head_dim": 8},
        "qwen4_exp_text": {
            "num_hidden_layers": 3, "layer_types": [LINEAR[0], "indexed_attention", LINEAR[0]], "indexer_budget": 32,
            "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_compress_ratio": 4,
        },
        "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
        "jamba": {"num_hidden_layers": 3, "attn_layer_offset": 1, "attn_layer_period": 2},
        "nemotron_h": {"layers_block_type": [LINEAR[0], "moe", "full_attention", "mlp", LINEAR[0]]},
    }  # fmt: skip
    return changes.get(model_type, {})


# Models of several parts, or with layers that share weights, whose tiny form would take a table of its own.
NOT_TINY = {
    "blt", "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified",
    "gemma4_unified_assistant", "got_ocr2", "llama4", "mllama", "moss_transcribe_diarize", "musicgen",
    "musicgen_melody", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "zamba", "zamba2",
}  # fmt: skip


def tiny_config_of(model_type: str, shape: Shape = SHAPES["grouped"], **changes: Any) -> PreTrainedConfig:
    """The config of a tiny model."""
    config_class = CONFIG_MAPPING[model_type]
    names = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    values = {name: value for name, value in sizes_of(shape).items() if name in names}
    twice = {alias for alias, name in config_class.attribute_map.items() if alias in values and name in values}
    values = {name: value for name, value in values.items() if name not in twice}
    return config_class(**values | changes_of(model_type, shape) | changes)


def tiny_model_of(config: PreTrainedConfig) -> PreTrainedModel:
    """A random stock model in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # initial norms of 1 and biases of 0 hide mistakes
                parameter += torch.randn_like(parameter) / 4
    return model
