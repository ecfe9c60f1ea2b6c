"""Tiny random checkpoints and adapters. Their texts are easy to guess, so that drafts sometimes stand."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHANNELS, INNER, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, RANK = 128, 96, 2, 4, 2, 32, 4
EOS, PAD = 256, 257
VOCAB = 264
DRAFT_LENGTH = 4
# Of what all embeddings have in common: the more, the easier a text is guessed, and the less it says.
EASE = {"Llama": 0.4, "Mistral": 0.4, "Qwen2": 0.3, "Qwen3": 0.25, "Gemma3": 0.25, "Qwen3Moe": 0.12}


def tiny_config(family: str) -> transformers.PretrainedConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": CHANNELS,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "initializer_range": 0.2,
        "tie_word_embeddings": family == "Qwen2",
    }
    own = {
        "Mistral": {"sliding_window": 24},
        "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1},
        "Gemma3": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    }
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    return getattr(transformers, name)(**sizes, **own.get(family, {}))


def tiny_checkpoint(family: str, folder: Path, seed: int = 0) -> Path:
    """A float32 checkpoint with a byte-level tokenizer."""
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(tiny_config(family)).float().eval()
    with torch.no_grad():
        model.get_input_embeddings().weight += torch.randn(CHANNELS) * EASE[family]
        if family == "Gemma3":  # which multiplies embeddings by this
            model.get_input_embeddings().weight /= CHANNELS**0.5
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and an end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<pad>"])
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", chat_template=template
    )


def tiny_adapter(
    checkpoint: Path, folder: Path, has_head: bool = True, seed: int = 1, scale: float = 0.1, mask_row: int = 16
) -> Path:
    """A random gated adapter on all linear layers of a checkpoint outside of its experts, and a draft head.

    Args:
        scale: of what the adapter changes.
        mask_row: the row of the embedding table that masks read: some guess better than others.
    """
    torch.manual_seed(seed)
    stored = transformers.AutoConfig.from_pretrained(checkpoint)
    attention = {"q_proj": (CHANNELS, HEADS), "k_proj": (CHANNELS, KV_HEADS), "v_proj": (CHANNELS, KV_HEADS)}
    shapes = {f"self_attn.{name}": (inputs, n * HEAD_SIZE) for name, (inputs, n) in attention.items()}
    shapes["self_attn.o_proj"] = (HEADS * HEAD_SIZE, CHANNELS)
    if stored.model_type != "qwen3_moe":
        shapes |= {"mlp.gate_proj": (CHANNELS, INNER), "mlp.up_proj": (CHANNELS, INNER)}
        shapes["mlp.down_proj"] = (INNER, CHANNELS)
    tensors = {}
    for layer in range(LAYERS):
        for name, (inputs, outputs) in shapes.items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, inputs) * scale
            tensors[f"{place}.lora_B.weight"] = torch.randn(outputs, RANK) * scale
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "alora_invocation_tokens": [VOCAB],
        "base_model_name_or_path": str(checkpoint),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "bias": "none",
        "target_modules": sorted({name.split(".")[1] for name in shapes}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    options = {"draft_length": DRAFT_LENGTH, "mask_embedding_id": mask_row, "draft_keep": 0.02}
    (folder / "generation_config.json").write_text(json.dumps(options))
    if has_head:
        head = {"input_weight": (8, 2 * CHANNELS), "input_bias": (8,), "output_weight": (CHANNELS, 8)}
        save_file({name: torch.randn(shape) * 0.1 for name, shape in head.items()}, folder / "draft_head.safetensors")
    return folder
