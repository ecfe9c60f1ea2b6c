"""The golden fixture of the reference implementation, and tiny models to compare with it.

`WAVEDRAFT_RAVEN_GOLDEN` selects another fixture of the same layout: the path of its two files without suffix.
"""

import functools
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from wavedraft.modeling_recurrent import RecurrentDepthConfig, RecurrentDepthForCausalLM

torch.set_num_threads(1)
STEM = os.environ.get("WAVEDRAFT_RAVEN_GOLDEN", str(Path(__file__).parent / "data" / "raven_tiny_golden"))
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
# The fields of the released config.json.
HUGINN_CONFIG = {
    "architecture_class_name": "RecurrentGPT",
    "architectures": ["RavenForCausalLM"],
    "auto_map": {
        "AutoConfig": "raven_config_minimal.RavenConfig",
        "AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM",
    },
    "bias": False,
    "block_class_name": "SandwichBlock",
    "block_size": 4096,
    "effective_expected_depth": 132,
    "head_dim": 96,
    "init_values": {"embed_scale": 72.6636084983398, "embedding": 0.008703882797784892, "std": 0.008703882797784892},
    "injection_type": "linear",
    "intermediate_size": 17920,
    "mean_backprop_depth": 8,
    "mean_recurrence": 32,
    "model_type": "huginn_raven",
    "n_embd": 5280,
    "n_heads": 55,
    "n_layers": 8,
    "n_layers_in_coda": 2,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 4,
    "norm_eps": 1e-06,
    "num_attention_heads": 55,
    "num_key_value_heads": 55,
    "padded_vocab_size": 65536,
    "qk_bias": True,
    "state_init": "like-init",
    "test_time_noise": 0,
    "tie_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 65536,
}


@functools.cache
def records() -> dict:
    """The fixture's JSON."""
    return json.loads(Path(STEM + ".json").read_text())


@functools.cache
def tensors() -> dict:
    """The fixture's tensors."""
    return load_file(STEM + ".safetensors")


def checkpoint(variant: str) -> dict:
    """The fixture's weights with the released names. In "slow", the state half of the adapter is scaled up."""
    weights = {name.removeprefix("weights/"): t for name, t in tensors().items() if name.startswith("weights/")}
    weights = {name: tensor.float() for name, tensor in weights.items()}
    if variant == "slow":
        width = records()["meta"]["config"]["n_embd"]
        weights["transformer.adapter.weight"][:, :width] *= records()["meta"]["slow_adapter_state_gain"]
    return weights


@functools.cache
def golden_model(variant: str) -> RecurrentDepthForCausalLM:
    """The fixture's model."""
    model = RecurrentDepthForCausalLM(RecurrentDepthConfig(**records()["meta"]["config"])).eval()
    weights = checkpoint(variant)
    model.load_state_dict({**weights, "lm_head.weight": weights["transformer.wte.weight"]})
    return model


def prompt_ids(name: str) -> torch.Tensor:
    """One of the fixture's prompts, [1, T]."""
    return torch.tensor([records()["prompts"][name]])


def random_model(seed: int = 0, **changes) -> RecurrentDepthForCausalLM:
    """A tiny model of odd sizes and large random weights, so that its texts vary."""
    torch.manual_seed(seed)
    sizes = {
        "n_embd": 24,
        "n_heads": 3,
        "intermediate_size": 40,
        "vocab_size": 37,
        "block_size": 160,
        "n_layers_in_prelude": 1,
        "n_layers_in_recurrent_block": 3,
        "n_layers_in_coda": 1,
        "mean_recurrence": 6,
    }
    model = RecurrentDepthForCausalLM(RecurrentDepthConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_f" not in name:
                parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if "wte" not in name else 1))
    return model


def keywords(params: dict) -> dict:
    """The fixture's parameters as keywords of our `generate`."""
    schedule = "dampened" if params.get("dampened_state_mixer", True) else "constant"
    return {
        "policy": "diffusion-forcing",
        "init_scale": records()["meta"]["init_scale"],
        "num_recurrences": params["num_steps"],
        "inner_recurrence": params["inner_recurrence"],
        "exit_threshold": params["exit_t"],
        "embedding_ema": params["ema_embeds"],
        "max_wavefront": params["max_wavefront"],
        "state_noise": params["state_noise_mixing"],
        "noise_schedule": "sqrt" if params.get("sqrt_mixer") else schedule,
        "freeze_criterion": params["freeze_strategy"].replace("latent-diff", "latent-difference"),
        "headway": params["headway"],
        "kv_cache": kv_cache_of(params["cache_lookup_strategy"]),
    }


def kv_cache_of(strategy: str) -> str | int:
    """Our `kv_cache` for a cache strategy of the reference: "compress-sN" has N slots for the core's layers."""
    if "-compress-s" not in strategy:
        return "every-recurrence"  # "full", and strategies equal to it when no recurrence is missing
    num_recurrences, rest = divmod(
        int(strategy.rsplit("-s", 1)[1]), records()["meta"]["config"]["n_layers_in_recurrent_block"]
    )
    assert num_recurrences and not rest, "the reference mixes up its layers' keys and values here"
    return "latest-only" if num_recurrences == 1 else num_recurrences


def new_tokens(model, prompt: str, num: int, **options) -> list[int]:
    """The fixture prompt's continuation."""
    ids = prompt_ids(prompt)
    return model.generate(ids, max_new_tokens=num, **options)[0, ids.shape[1] :].tolist()


def common_prefix(one: list[int], other: list[int]) -> int:
    """The length of the common prefix of two texts."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def settling_model(seed: int, **changes):
    """A model whose states settle. Other states double every rounding error at each recurrence."""
    model = random_model(seed, **{"mean_recurrence": 4, **changes})
    with torch.no_grad():
        model.transformer["adapter"].weight[:, : model.config.n_embd] *= 0.25
    return model


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """The rows as one left-padded batch, with its attention mask."""
    longest = max(len(row) for row in rows)
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
