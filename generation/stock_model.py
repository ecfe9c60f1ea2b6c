"""Properties of a stock model that decoding needs: decoder, layers, devices, logits, positions and cache.

D channels, C candidates, V vocabulary.
"""

import os
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import cached_file

# transformers' name of the key-value cache: `cache` since 5.24, `past_key_values` before.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(GenerateDecoderOnlyOutput)})

BIDIRECTIONAL, CAUSAL = "bidirectional", "causal"

# Kinds of layers that keep a state, the last of them keys and values too.
STATEFUL = {"linear_attention", "conv", "hybrid"}

# -- parts


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder below the lm_head: one object, shared by all views of the model."""
    return getattr(model, model.base_model_prefix)


def num_cache_layers(model: Any) -> int:
    """The number of layers with keys and values of their own: the model's `num_cache_layers`, or the config's."""
    if (own := getattr(model, "num_cache_layers", None)) is not None:
        return own
    config = model.config.get_text_config()
    return config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)


def is_composite(config: Any) -> bool:
    """Whether a model reads images or other parts besides text."""
    return config.get_text_config() is not config


def has_states(config: Any) -> bool:
    """Whether layers keep a state besides or instead of keys and values."""
    return not STATEFUL.isdisjoint(getattr(config.get_text_config(), "layer_types", None) or ())


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's list of `config.num_hidden_layers` layers. Raises ValueError if there is none."""
    decoder = decoder_of(model)
    num_layers = model.config.get_text_config().num_hidden_layers
    stacks = (m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers)
    if (stack := next(stacks, None)) is None:
        raise ValueError(
            f"`compile_config` compiles the decoder's layers, but {type(decoder).__name__} has no list of its "
            f"{num_layers} layers. Pass `disable_compile=True`."
        )
    return stack


def last_position_of(model: Any) -> int | None:
    """The last position of a learned or a rotary table; None for rotary positions of one table."""
    config = model.config.get_text_config()
    if (longest := longest_in_rotary_table(config)) is not None:
        return longest - 1
    if has_states(config):
        return None
    has_table = getattr(model, "has_position_table", getattr(config, "rope_parameters", None) is None)
    return config.max_position_embeddings - 1 if has_table else None


def longest_in_rotary_table(config: Any) -> int | None:
    """The longest text of the first rotary table, where a forward's last position chooses the table (dynamic NTK,
    LongRoPE); else None."""
    stored = getattr(config, "rope_parameters", None) or {}
    tables = [one for one in (stored, *stored.values()) if isinstance(one, dict)]
    ends = [one["original_max_position_embeddings"] for one in tables if one.get("rope_type") == "longrope"]
    ends += [config.max_position_embeddings for one in tables if one.get("rope_type") == "dynamic"]
    return min(ends, default=None)


# -- attention, adapters and experts


def attention_of(config: Any) -> str | None:
    """The attention implementation of a model with this config; of its text, where it has several parts."""
    return getattr(config.get_text_config(), "_attn_implementation", None)


def attend_by(config: Any, implementation: str | None) -> None:
    """Sets only the name of the implementation: `set_attn_implementation` also loads kernels and visits every part."""
    config.get_text_config()._attn_implementation = implementation


def has_loaded_adapter(model: Any) -> bool:
    """Whether transformers' `load_adapter` or `add_adapter` has added an adapter."""
    return getattr(model, "_hf_peft_config_loaded", False)


def taught_of(model: Any) -> dict[str, Any]:
    """The `tidar_config` of a model's config, or else of its adapter's repository (`taught`); empty without either."""
    return getattr(model.config, "tidar_config", None) or getattr(model, "taught", None) or {}


def mask_token_of(model: Any) -> int:
    """The mask token's id; where none is known, the first id after the vocabulary."""
    return taught_of(model).get("mask_token_id", model.config.get_text_config().vocab_size)


def has_causal_blocks(taught: dict[str, Any]) -> bool:
    """Whether a mask sees only the masks before it in its block, by a `tidar_config`."""
    return taught.get("block_attention") == CAUSAL


def can_choose_experts(model: Any) -> bool:
    """Whether a model, or its class, has experts with a choice of implementation."""
    return getattr(model, "_can_set_experts_implementation", bool)()


# -- devices


def device_of(model: nn.Module) -> torch.device:
    """The device that a model computes on. Its weights may be offloaded elsewhere by accelerate."""
    device = model.device  # a search through the parameters
    if device.type != "meta":
        return device
    return next(torch.device(hook.execution_device) for hook in _placing_hooks(model))


def devices_of(model: nn.Module) -> set[torch.device]:
    """All devices that a model computes on: several if a `device_map` distributes its layers."""
    return {torch.device(hook.execution_device) for hook in _placing_hooks(model)} or {model.device}


def is_hooked(model: nn.Module) -> bool:
    """Whether accelerate moves weights or states between devices."""
    return next(_placing_hooks(model), None) is not None


def _placing_hooks(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "execution_device", None) is not None:
                yield one


def is_shared_by_ranks(model: Any) -> bool:
    """Whether a forward needs every rank: with FSDP or ZeRO-3 (`generate` sets `synced_gpus`), or `fully_shard`."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule) or is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)


# -- logits


def lm_head_logits(model: Any, hidden_states: Tensor) -> Tensor:
    """The model's logits [..., V] of last hidden states [..., D]. Conversion proves them equal to `forward`'s."""
    return finished_logits(model, model.get_output_embeddings()(hidden_states))


def candidate_logits(model: Any, states: Tensor, candidates: Tensor) -> Tensor | None:
    """Logits [A, C] of only `candidates` [A, C], for states [A, D]. None if the lm_head's rows cannot be read
    (quantized, adapted or offloaded)."""
    if not has_rows_to_read(model, states.device):
        return None
    lm_head = model.get_output_embeddings()
    weight = lm_head.weight
    logits = (weight[candidates] @ states.to(weight.dtype)[..., None])[..., 0]
    return finished_logits(model, logits if lm_head.bias is None else logits + lm_head.bias[candidates])


def has_rows_to_read(model: Any, device: torch.device) -> bool:
    """Whether the lm_head is a plain layer on this device, with one row of weights per token."""
    lm_head = model.get_output_embeddings()
    weight = getattr(lm_head, "weight", None)
    is_plain = type(lm_head) is nn.Linear or getattr(lm_head, "has_plain_weight", False)
    return is_plain and weight.device == device and weight.is_floating_point()


def finished_logits(model: Any, logits: Tensor) -> Tensor:
    """Logits [..., n] from the lm_head's output: scaled (Cohere, Falcon-H1), divided (Granite), capped (Gemma 2)."""
    config = model.config.get_text_config()
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (scale := getattr(config, "lm_head_multiplier", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


# -- cache


def is_users_cache(cache: Any) -> bool:
    """Whether this cache came from the caller of `generate`, so that decoding must update it."""
    return getattr(cache, "_is_user_defined", False)


def mark_users_cache(cache: Any) -> None:
    """Marks a cache for `is_users_cache`."""
    cache._is_user_defined = True


def num_columns_of(input_ids: Tensor, attention_mask: Tensor | None, generation_config: Any) -> int:
    """Columns of a text, of which `input_ids` may be only those after a cache's."""
    if attention_mask is None:  # `generate` drops a mask of ones, but keeps its length
        return getattr(generation_config, "_mask_length", input_ids.shape[1])
    return attention_mask.shape[1]


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache argument of a forward, under either name. Raises ValueError if both are given."""
    if cache is not None and past_key_values is not None:
        raise ValueError("`past_key_values` must be left out with `cache`: both name the same argument.")
    return past_key_values if cache is None else cache


# -- files


def file_if_there(name_or_path: str | os.PathLike, name: str, may_be_offline: bool = False, **hub: Any) -> str | None:
    """The path of a file, downloaded if necessary; None if the repository does not have the file.

    Args:
        may_be_offline: return None instead of raising if the Hub cannot be reached.
        hub: `cache_dir`, `revision`, `token` etc. of transformers' `from_pretrained`. A commit is first looked for in
            the local cache.
    """
    return cached_file(
        name_or_path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=not may_be_offline,
        **hub,
    )
