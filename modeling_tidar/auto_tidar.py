"""Chooses a checkpoint's drafting class. A checkpoint's config names its class, so this file does not travel."""

import os
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..generation.drafting.draftable import refuse_undraftable
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

        Raises:
            ValueError: the checkpoint was not converted, or its architecture cannot draft.
        """
        config = AutoConfig.from_pretrained(name_or_path, **hub_keywords(kwargs))
        stock_class = stock_class_of(config)
        TiDARConfig.from_model_config(config)
        return tidar_class(stock_class).from_pretrained(name_or_path, *args, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> PreTrainedModel:
        """A drafting model with random weights, for a stock config with a `tidar_config`."""
        return tidar_class(stock_class_of(config))._from_config(config, **kwargs)


def stock_class_of(config: Any) -> type[PreTrainedModel]:
    """The stock `...ForCausalLM` class of a config.

    Raises:
        ValueError: transformers has none, or it cannot draft.
    """
    stock_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    refuse_undraftable(stock_class, config)
    return stock_class
