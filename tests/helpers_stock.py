"""Tiny random stock checkpoints of every family, written by transformers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from helpers_tidar import SHAPE

GPT2_SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 61, "initializer_range": 0.2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOWS = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
# Family: config class, differences from SHAPE.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-3-rope-tied": (
        "LlamaConfig",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": 9}),
    "ministral": ("MinistralConfig", {"head_dim": 8, **WINDOWS}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-windows": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 9}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "qwen3-moe": ("Qwen3MoeConfig", {"head_dim": 8, **MOE}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 5.0, **WINDOWS}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "tie_word_embeddings": False, **WINDOWS}),
    "phi3": ("Phi3Config", {"sliding_window": 9}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", WINDOWS),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", GPT2_SHAPE),
    "falcon": ("FalconConfig", {"alibi": False, "ffn_hidden_size": 48}),
    "falcon-40b": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.25, **WINDOWS}),
    "glm4": ("Glm4Config", {"head_dim": 8}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 9}),
    "gpt-oss": ("GptOssConfig", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOWS}),
}


def tiny_config(family: str = "llama", **changes: Any) -> PreTrainedConfig:
    class_name, extra = FAMILIES[family]
    config_class = getattr(transformers, class_name)
    shape = {} if extra is GPT2_SHAPE else SHAPE
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return config_class(**{**shape, **ids, **extra, **changes})


def save_tiny_stock(folder: Path, family: str = "llama", max_shard_size: str = "1GB", **changes: Any):
    """Writes a random float32 checkpoint and returns its config."""
    torch.manual_seed(0)
    config = tiny_config(family, **changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        for parameter in model.parameters():
            if parameter.ndim == 1:  # initial norms of 1 and biases of 0 hide mistakes
                parameter += torch.randn_like(parameter) / 2
            elif parameter not in embeddings:  # a tied model with small layers repeats its input
                parameter *= 3
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return config


def edit_json(path: Path, **values: Any) -> None:
    """Sets keys of a JSON file; None removes a key."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
