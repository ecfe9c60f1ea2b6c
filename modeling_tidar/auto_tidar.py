"""Chooses a checkpoint's drafting class. A checkpoint's config names its class, so this file does not travel."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..generation.drafting.options_tidar import TiDAROptions
from ..generation.drafting.structured_mask import attention_windows
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
        refuse_recurrent_depth(config)
        TiDARConfig.from_model_config(config)
        return tidar_class(stock_class_of(config)).from_pretrained(name_or_path, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Load a model first: `TiDARForCausalLM.from_pretrained(folder_or_hub_id).generate(...)`.")

    generate.__doc__ = f"""`generate` of every loaded model: as transformers', with drafts and these keywords more.
    {TiDAROptions.__doc__}"""

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> PreTrainedModel:
        """A drafting model with random weights, for a stock config with a `tidar_config`."""
        return tidar_class(stock_class_of(config))._from_config(config, **kwargs)


def base_of_adapter(name_or_path: str | os.PathLike, **hub: Any) -> str | None:
    """The base that an adapter's folder or repository names; None for one with a model of its own."""
    if file_if_there(name_or_path, "config.json", may_be_offline=True, **hub) is not None:
        return None
    found = file_if_there(name_or_path, "adapter_config.json", may_be_offline=True, **hub)
    return json.loads(Path(found).read_text(encoding="utf-8"))["base_model_name_or_path"] if found else None


def refuse_recurrent_depth(config: Any) -> None:
    """Raises ValueError for a recurrent-depth model, which has its own policies."""
    if hasattr(config, "mean_recurrence"):
        raise ValueError(
            f"A {config.model_type!r} model has a recurrent depth and is not a TiDAR model: it decodes several tokens "
            "at once without masks. Load it with `RecurrentDepthForCausalLM.from_pretrained` and decode with "
            "its own `generate(policy='exact')`."
        )


def stock_class_of(config: Any) -> type[PreTrainedModel]:
    """The stock `...ForCausalLM` class of a config.

    Raises:
        ValueError: it is not a decoder-only language model of transformers, or it cannot undo a rejected token.
    """
    refuse_recurrent_depth(config)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model_type!r} is an encoder-decoder: its decoder does not read the prompt, so it cannot "
            "draft in the same forward. Use a decoder-only model, such as Llama, Mistral, Qwen3, Gemma, Phi or OLMo."
        )
    try:
        stock_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ValueError(
            f"transformers has no causal language model for the architecture {config.model_type!r}. Supported: its "
            "decoder-only models, such as Llama, Mistral, Qwen2, Qwen3, Gemma, Phi or OLMo."
        ) from None
    attention_windows(config)
    return stock_class
