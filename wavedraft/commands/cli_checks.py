"""What the command line refuses before it loads a model: what the config or the machine forbids."""

import copy
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from ..generation.drafting.options_tidar import TiDAROptions
from ..generation.recurrent.options_recurrent import RecurrentOptions
from ..modeling_recurrent.checkpoint_recurrent import is_recurrent_config
from ..modeling_tidar import TiDARConfig
from .early_checks import FOR_SAMPLING, check_folder, flag


def check_adapter(adapter: str | None, model: str) -> None:
    """Raises where an adapter is given to a recurrent-depth model."""
    if adapter is not None and is_recurrent(model):
        raise ValueError(f"--adapter is for TiDAR checkpoints, but {model} is a recurrent-depth model.")


def device_for(device: str | None) -> str:
    """The device asked for; by default cuda where there is one, else cpu."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"--device must be one torch knows, such as cpu or cuda:0, but is {device!r}.") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {device!r}, but torch sees no GPU here. Leave it out, or pass cpu.")
    return device


def is_recurrent(model: str) -> bool:
    """Whether a checkpoint is a recurrent-depth model, by its config.json."""
    check_folder(model)
    return is_recurrent_config(AutoConfig.from_pretrained(model))


def stored_generation_config(model: str) -> GenerationConfig:
    """The checkpoint's generation_config.json, or the defaults where there is none."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return GenerationConfig()


def check_keywords(model: str, keywords: dict[str, Any]) -> None:
    """Raises what `generate` would raise of these keywords, as far as the checkpoint's config tells."""
    config, stored = AutoConfig.from_pretrained(model), stored_generation_config(model)
    if is_recurrent_config(config):
        recurrent_options(config, stored, keywords)
    elif hasattr(config, "tidar_config"):
        options = copy.copy(stored)
        for name, value in keywords.items():
            setattr(options, name, value)
        draft_length = TiDAROptions.of(options, config).draft_length
        if "seed" in keywords and not keywords["do_sample"]:
            raise ValueError(f"--seed {FOR_SAMPLING}")
        for name in ("num_branches", "exact"):
            if name in keywords and not draft_length:
                raise ValueError(f"{flag(name)} has no effect with --draft-length 0, which drafts nothing.")


def recurrent_options(config: Any, stored: GenerationConfig, keywords: dict[str, Any]) -> RecurrentOptions:
    """How `generate` decodes a recurrent-depth model with these keywords."""
    names = sorted(RecurrentOptions.names())
    from_file = {name: value for name in names if (value := getattr(stored, name, None)) is not None}
    from_call = {name: keywords[name] for name in names if name in keywords}
    return RecurrentOptions.from_layers([from_call, from_file], config.mean_recurrence)


def has_wavefront(model: str, keywords: dict[str, Any]) -> bool:
    """Whether `generate` with these keywords decodes a wavefront, and can record it."""
    config = AutoConfig.from_pretrained(model)
    if not is_recurrent_config(config):
        return False
    return hasattr(recurrent_options(config, stored_generation_config(model), keywords), "record_wavefront")


def trained_draft_length(model: str) -> int:
    """K of a TiDAR checkpoint, read from its config.json alone."""
    check_folder(model)
    config = AutoConfig.from_pretrained(model)
    if is_recurrent_config(config):
        raise ValueError(
            f"`wavedraft bench` times TiDAR checkpoints, but {model} is a recurrent-depth model: "
            "benchmarks/bench_recurrent.py of the repository times those."
        )
    return TiDARConfig.from_model_config(config).draft_length
