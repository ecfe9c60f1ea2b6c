"""Chooses a checkpoint's drafting class. A checkpoint's config names its class, so this file does not travel."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from ..generation.drafting.draftable import refuse_undraftable
from ..generation.drafting.options_tidar import TiDAROptions
from ..generation.stock_model import file_if_there
from .configuration_tidar import TiDARConfig
from .modeling_tidar import hub_keywords, tidar_class


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
    refuse_undraftable(stock_class, config)
    return stock_class
