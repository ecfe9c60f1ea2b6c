"""Chooses a checkpoint's drafting class. A checkpoint's config names its class, so this file does not travel."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from ..generation.drafting.draftable import refuse_undraftable
from ..generation.drafting.options_tidar import TiDAROptions
from ..generation.stock_model import file_if_there
from .configuration_tidar import TiDARConfig
from .modeling_tidar import hub_keywords, tidar_class

# Text parts without a class of their own, and the text model that they are where all positions are of text.
PLAIN_FORMS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
PREFIX_MODELS = {"paligemma"}  # their prompts are read from both sides; their text classes read one way


class TiDARForCausalLM:
    """Loads drafting models: chooses the class for a checkpoint's architecture."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise TypeError(
            "TiDARForCausalLM has no architecture of its own: use `TiDARForCausalLM.from_pretrained(folder_or_hub_id)` "
            "or `TiDARForCausalLM.from_config(config)`."
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Loads a TiDAR checkpoint, without running any code in it; keywords as in transformers' `from_pretrained`.

        The folder of an adapter also loads: first the base that its `adapter_config.json` names, then the adapter.

        Raises:
            ValueError: the checkpoint was not converted, or its architecture cannot draft.
        """
        base = base_of_adapter(name_or_path, **hub_keywords(kwargs))
        config = AutoConfig.from_pretrained(name_or_path if base is None else base, **hub_keywords(kwargs))
        stock_class = stock_class_of(config)
        TiDARConfig.from_model_config(config)
        return tidar_class(stock_class).from_pretrained(name_or_path, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Load a model first: `TiDARForCausalLM.from_pretrained(folder_or_hub_id).generate(...)`.")

    generate.__doc__ = f"""`generate` of every loaded model: as transformers', with drafts and these keywords more.
    {TiDAROptions.__doc__}"""

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> PreTrainedModel:
        """A drafting model with random weights, for a stock config with a `tidar_config`."""
        return tidar_class(stock_class_of(config))._from_config(config, **kwargs)


def causal_class_of(config_class: type) -> Any:
    """The `...ForCausalLM` class of a config class, or that of text and images, or None if transformers has none."""
    of_images = AutoModelForImageTextToText._model_mapping
    is_several = "text_config" in getattr(config_class, "sub_configs", {})
    found = of_images.get(config_class, None) if is_several else None
    return found or AutoModelForCausalLM._model_mapping.get(config_class, None)


def text_class_of(config: Any) -> Any:
    """The `...ForCausalLM` class of the text of a model of several parts, or None if transformers has none."""
    text = config.get_text_config()
    if text is config:
        return None
    config_class = CONFIG_MAPPING[PLAIN_FORMS[text.model_type]] if text.model_type in PLAIN_FORMS else type(text)
    return AutoModelForCausalLM._model_mapping.get(config_class, None)


def base_of_adapter(name_or_path: str | os.PathLike, **hub: Any) -> str | None:
    """The base that an adapter's folder or repository names; None for one with a model of its own."""
    if file_if_there(name_or_path, "config.json", may_be_offline=True, **hub) is not None:
        return None
    found = file_if_there(name_or_path, "adapter_config.json", may_be_offline=True, **hub)
    return json.loads(Path(found).read_text(encoding="utf-8"))["base_model_name_or_path"] if found else None


def stock_class_of(config: Any) -> type[PreTrainedModel]:
    """The stock `...ForCausalLM` class of a config.

    Raises:
        ValueError: transformers has none, or it cannot draft.
    """
    stock_class = causal_class_of(type(config))
    try:
        refuse_undraftable(stock_class, config)
    except ValueError as error:
        if config.model_type in PREFIX_MODELS:
            raise ValueError(f"{error} It is a prefix model: it reads a prompt from both sides.") from None
        if not can_draft_text(config):
            raise
        raise ValueError(f"{error} `wavedraft convert --text-only` writes its text tower, which can draft.") from None
    return stock_class


def can_draft_text(config: Any) -> bool:
    """Whether the text of a model of several parts can draft as a model of its own."""
    try:
        if (text_class := text_class_of(config)) is None or config.model_type in PREFIX_MODELS:
            return False
        refuse_undraftable(text_class, config.get_text_config())
    except ValueError:  # also transformers', of a model with several texts
        return False
    return True
