"""Tiny models of the recurrent-depth family, and their checkpoints in their authors' published format."""

import json

import torch
from safetensors.torch import save_file

from wavedraft.modeling_recurrent import OuroConfig, OuroForCausalLM, RecurrentDepthConfig, RecurrentDepthForCausalLM

# The relevant or misleading fields of the released config.json files, at a tiny size.
RETROFIT = {
    "model_type": "huginn_raven",
    "architectures": ["RavenForCausalLM"],
    "auto_map": {
        "AutoConfig": "raven_config_minimal.RavenConfig",
        "AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM",
    },
    "bias": False,
    "block_class_name": "SandwichBlock",
    "block_size": 4096,
    "head_dim": 6,
    "init_values": {"embed_scale": 1.0, "embedding": 0.0087, "out_proj": 0.0005, "std": 0.0087},
    "injection_type": "linear",
    "intermediate_size": 40,
    "mean_backprop_depth": 8,
    "mean_recurrence": 5,
    "n_embd": 24,
    "n_heads": 4,
    "n_layers": 4,
    "n_layers_in_coda": 1,
    "n_layers_in_prelude": 1,
    "n_layers_in_recurrent_block": 2,
    "norm_eps": 1e-05,
    "num_attention_heads": 4,
    "padded_vocab_size": 37,
    "qk_bias": False,
    "rope_base": 50000.0,
    "state_init": "like-init",
    "test_time_noise": 0,
    "tie_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 37,
}

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}

CONFIGS = {
    "llama": RETROFIT
    | {"num_key_value_heads": 2, "rope_theta": 500000.0, "rope_scaling": LLAMA3, "max_position_embeddings": 131072},
    "tinyllama": RETROFIT | {"num_key_value_heads": 1, "rope_theta": 10000.0, "max_position_embeddings": 2048},
    "olmo": RETROFIT | {"num_key_value_heads": 4, "rope_theta": 500000.0, "norm_eps": 1e-06},
    "ouro": {
        "model_type": "ouro",
        "architectures": ["OuroForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_ouro.OuroConfig",
            "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
        },
        "attention_dropout": 0.0,
        "early_exit_step": None,
        "early_exit_threshold": 1.0,
        "head_dim": 6,
        "hidden_act": "silu",
        "hidden_size": 24,
        "intermediate_size": 40,
        "layer_types": ["full_attention"] * 3,
        "max_position_embeddings": 65536,
        "max_window_layers": 3,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "total_ut_steps": 4,
        "use_sliding_window": False,
        "vocab_size": 37,
    },
}

FORMS = {"llama": "pre-norm", "tinyllama": "pre-norm", "olmo": "post-norm"}


def raven_shapes(config: dict, has_qk_norm: bool) -> dict[str, tuple]:
    """The names and shapes of a retrofitted checkpoint, listed from the original converter."""
    width, hidden, vocab = config["n_embd"], config["intermediate_size"], config["vocab_size"]
    query, key = config["n_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "transformer.wte.weight": (vocab, width),
        "transformer.adapter.weight": (width, 2 * width),
        "transformer.ln_f.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    for part in ("prelude", "recurrent_block", "coda"):
        for i in range(config[f"n_layers_in_{part}"]):
            layer = f"transformer.{part.replace('recurrent', 'core')}.{i}."
            shapes |= {
                layer + "attn.Wqkv.weight": (query + 2 * key, width),
                layer + "attn.proj.weight": (width, query),
                layer + "mlp.fc.weight": (2 * hidden, width),
                layer + "mlp.proj.weight": (width, hidden),
                layer + "norm_1.weight": (width,),
                layer + "norm_2.weight": (width,),
            }
            if has_qk_norm:
                shapes |= {layer + "attn.q_norm.weight": (query,), layer + "attn.k_norm.weight": (key,)}
    return shapes


def ouro_shapes(config: dict) -> dict[str, tuple]:
    """The names and shapes of an Ouro checkpoint, listed from its description."""
    width, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query, key = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    shapes = {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
        "model.early_exit_gate.weight": (1, width),
        "model.early_exit_gate.bias": (1,),
        "lm_head.weight": (vocab, width),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "self_attn.q_proj.weight": (query, width),
            layer + "self_attn.k_proj.weight": (key, width),
            layer + "self_attn.v_proj.weight": (key, width),
            layer + "self_attn.o_proj.weight": (width, query),
            layer + "mlp.gate_proj.weight": (hidden, width),
            layer + "mlp.up_proj.weight": (hidden, width),
            layer + "mlp.down_proj.weight": (width, hidden),
        }
        for half in ("input", "post_attention"):
            shapes |= {f"{layer}{half}_layernorm{end}.weight": (width,) for end in ("", "_2")}
    return shapes


def random_weights(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint with its original names, weights large enough for varied texts, and norms other than 1."""
    config, generator = CONFIGS[kind], torch.Generator().manual_seed(seed)
    shapes = ouro_shapes(config) if kind == "ouro" else raven_shapes(config, has_qk_norm=kind == "olmo")
    weights = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weights[name] = 1 + 0.2 * drawn
        else:
            weights[name] = drawn if "wte" in name or "embed" in name else drawn * shape[-1] ** -0.5
    return weights


def write_folder(folder, kind: str, seed: int = 0):
    """Writes a checkpoint folder in its released form."""
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    save_file(random_weights(kind, seed), folder / "model.safetensors")
    return folder


def tiny_model(kind: str, seed: int = 0):
    """The same checkpoint, in memory."""
    if kind == "ouro":
        model = OuroForCausalLM(OuroConfig(**CONFIGS[kind]))
    else:
        model = RecurrentDepthForCausalLM(RecurrentDepthConfig(**CONFIGS[kind], block_form=FORMS[kind]))
    model.load_state_dict(random_weights(kind, seed))
    return model.eval()
