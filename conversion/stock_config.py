"""The stock config of a source checkpoint: which keys are kept, and whether its architecture can draft."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from ..generation.stock_model import CACHE
from ..modeling_tidar.auto_tidar import stock_class_of

NEVER_KEPT = ("tidar_config", "auto_map", "custom_pipelines")
ARGUMENTS = {"attention_mask", "position_ids", CACHE, "logits_to_keep"}
SUPPORTED = (
    "Supported: decoder-only language models of transformers with attention in every layer: Llama, Mistral, "
    "Ministral, Qwen2, Qwen3, Qwen3-MoE, Gemma 1-3, Phi-3, OLMo 2-3, Granite, SmolLM3, GPT-NeoX, GPT-2, Falcon, "
    "StableLM, Cohere and similar ones."
)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}: it is not a checkpoint folder of transformers.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error}). Download it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, but is a {type(content).__name__}. Download it again.")
    return content


def load_config(values: dict[str, Any], origin: Path) -> PreTrainedConfig:
    """The stock config of a config.json's values. Code in the checkpoint is never run.

    Raises:
        ValueError: transformers has no such architecture, or its config class refuses the values.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{origin} has the `model_type` {model_type!r}, which this version of transformers does not support. Code "
            f"in a checkpoint is never run. {SUPPORTED}"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(
            {key: value for key, value in values.items() if key not in NEVER_KEPT and "attn_impl" not in key}
        )
    except Exception as error:  # config classes raise errors of any type
        reason = " ".join(str(error).split())
        raise ValueError(f"{origin} is not a valid config of the architecture {model_type!r}: {reason}") from None


def kept_values(values: dict[str, Any], origin: Path) -> dict[str, Any]:
    """The keys of a config.json that fill a field of its stock config class, old spellings included.

    All other keys (`auto_map`, kernels to fetch from the Hub, other packages' keys) are dropped.
    """
    config_class = type(load_config(values, origin))
    fields = {field.name for field in dataclasses.fields(config_class)} - set(NEVER_KEPT)
    names = fields | set(config_class.attribute_map) | {"model_type"}

    def filled(candidate: dict[str, Any]) -> dict[str, Any]:
        config = load_config(candidate, origin)
        return {name: getattr(config, name, None) for name in fields}

    kept = {key: value for key, value in values.items() if key in names}
    complete = filled(values)
    for key in values.keys() - names - set(NEVER_KEPT):
        without = {name: value for name, value in values.items() if name != key}
        if "attn_impl" not in key and filled(without) != complete:
            kept[key] = values[key]
    return kept


def draftable_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The stock class of a config. Its config and signature are checked: the model must be able to verify drafts.

    Raises:
        ValueError: it cannot; the message says why, and what is supported.
    """

    def refuse(reason: str) -> None:
        raise ValueError(f"A {config.model_type!r} model cannot draft: {reason}. {SUPPORTED}")

    if config.is_encoder_decoder:
        refuse("it is an encoder-decoder, whose decoder does not read the prompt")
    try:
        stock_class = stock_class_of(config)
    except ValueError as error:
        raise ValueError(f"A {config.model_type!r} model cannot draft. {error} {SUPPORTED}") from None
    if getattr(stock_class, "_is_stateful", False):
        refuse("its recurrent (linear-attention or state-space) layers cannot undo a rejected token")
    if config.get_text_config() is not config:
        refuse("it consists of several models; convert only its text model")
    if getattr(config, "alibi", False):
        refuse("its attention biases (ALiBi) depend on cache slots, not on positions")
    if lacking := sorted(ARGUMENTS - set(inspect.signature(stock_class.forward).parameters)):
        refuse(f"its forward does not take {', '.join(f'`{name}`' for name in lacking)}")
    if getattr(config, "quantization_config", None):
        raise ValueError(
            "This checkpoint is quantized (`quantization_config` in its config.json). Convert the checkpoint it was "
            "made from, and quantize the result when loading it."
        )
    return stock_class
