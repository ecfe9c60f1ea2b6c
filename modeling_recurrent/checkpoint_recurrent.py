"""Identifies a checkpoint folder by its config and the names of its weights."""

import json
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..generation.stock_model import file_if_there

HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

SERVED = ("huginn_raven", "ouro")
NOT_SERVED = {
    "hrm_text": "it alternates two stacks on a fixed schedule and reads its prompt in both directions. Its states do "
    "not decode at every depth, and new tokens change the keys and values of earlier tokens",
}


def is_recurrent_config(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint of this config is a recurrent-depth model."""
    return config.model_type in SERVED


def check_is_served(model_type: str | None) -> None:
    """Raise ValueError, with the reason, for a model this package cannot run."""
    if model_type in SERVED or model_type is None:
        return
    reason = NOT_SERVED.get(model_type, "this package has no `RecurrentDepthLM` for it")
    raise ValueError(
        f"`model_type` must be one of {SERVED} to be decoded as a recurrent-depth model, but config.json says "
        f"{model_type!r}: {reason}. Load it with `transformers.AutoModelForCausalLM`."
    )


def config_fields(path: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a folder or Hub repository; `keywords` are those of `from_pretrained`."""
    return PreTrainedConfig.get_config_dict(path, **hub_keywords(keywords))[0]


def block_form_of(names: Iterable[str]) -> str:
    """The `RecurrentDepthConfig.block_form` of weights with these names; by default Huginn's."""
    last_parts = {part for name in names for part in name.split(".")[-2:]}
    if "norm_3" in last_parts or "norm_1" not in last_parts:
        return "sandwich"
    return "post-norm" if "q_norm" in last_parts else "pre-norm"


def weight_names(path: Any, keywords: dict[str, Any]) -> list[str] | None:
    """Names of the weights of a folder or Hub repository; None if it has none in a supported format."""

    def find(name: str) -> str | None:
        return file_if_there(path, name, **hub_keywords(keywords))

    if (file := find(SAFE_WEIGHTS_NAME)) is not None:
        with safe_open(file, framework="pt") as weights:
            return list(weights.keys())
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if (file := find(name)) is not None:
            with open(file, encoding="utf-8") as index:
                return list(json.load(index)["weight_map"])
    if (file := find(WEIGHTS_NAME)) is not None:
        return list(torch.load(file, map_location="meta", weights_only=True))
    return None


def hub_keywords(keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `from_pretrained` that say where files come from."""
    return {name: keywords[name] for name in HUB_KEYWORDS if keywords.get(name) is not None}
