"""The stock config of a source checkpoint: which keys are kept, and whether its architecture can draft."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from ..generation.drafting.draftable import SUPPORTED, reason_in_class
from ..modeling_tidar.auto_tidar import causal_class_of, stock_class_of

NEVER_KEPT = ("tidar_config", "auto_map", "custom_pipelines")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}: it is not a checkpoint folder of transformers.") from None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise ValueError(f"{path} is not a JSON file ({error}). Download it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, but is a {type(content).__name__}. Download it again.")
    return content


def untagged(value: Any) -> Any:
    """A config's value with the floats that JSON lacks. Transformers writes infinity as {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [untagged(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("NaN", "Infinity", "-Infinity"):
        return float(value["__float__"])
    return {name: untagged(one) for name, one in value.items()}


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
    config_class = CONFIG_MAPPING[model_type]
    try:
        config = config_class.from_dict(
            {key: untagged(value) for key, value in values.items() if key not in NEVER_KEPT and "attn_impl" not in key}
        )
        if not isinstance(config.dtype, torch.dtype | None):
            raise ValueError(f"`dtype` must name a dtype of torch, such as 'bfloat16', but is {config.dtype!r}")
        if not isinstance(text := config.get_text_config(), PreTrainedConfig):
            raise ValueError(f"`text_config` must be an object, but is {text!r}")
        return config
    except Exception as error:  # config classes raise errors of any type
        if refused := reason_in_class(causal_class_of(config_class), config_class):
            raise ValueError(f"A {model_type!r} model cannot draft: {refused}. {SUPPORTED}") from None
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
        config = load_config(candidate, origin)  # whose layers may differ: then its attributes cannot be read
        return {name: vars(config).get(config.attribute_map.get(name, name)) for name in fields}

    kept = {key: value for key, value in values.items() if key in names}
    complete = filled(values)
    for key in values.keys() - names - set(NEVER_KEPT):
        without = {name: value for name, value in values.items() if name != key}
        if "attn_impl" not in key and filled(without) != complete:
            kept[key] = values[key]
    return kept


def draftable_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The stock class of a config. A model of it must be able to verify drafts.

    Raises:
        ValueError: it cannot; the message says why, and what is supported.
    """
    stock_class = stock_class_of(config)
    refuse_quantized(config)
    return stock_class


def refuse_quantized(config: PreTrainedConfig) -> None:
    """Raises ValueError for a quantized checkpoint, whose tensors are no weights to copy."""
    if getattr(config, "quantization_config", None):
        raise ValueError(
            "This checkpoint is quantized (`quantization_config` in its config.json). Convert the checkpoint it was "
            "made from, and quantize the result when loading it."
        )


def without_weights(stock_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this config without weights.

    Raises:
        ValueError: its class cannot be built with the config's sizes.
    """
    try:
        with torch.device("meta"):
            return stock_class(copy.deepcopy(config))
    except Exception as error:  # model classes raise errors of any type
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{stock_class.__name__} cannot be built as config.json says ({type(error).__name__}: {reason}). Download "
            "config.json again."
        ) from None
