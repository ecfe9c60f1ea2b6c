"""Recurrent-depth models: prelude, a shared core run many times, coda (arXiv 2502.05171)."""

from transformers import AutoConfig, AutoModelForCausalLM

from ..generation.options_recurrent import EVERY_RECURRENCE, LATEST_ONLY, PRESETS
from ..generation.outputs_recurrent import RecurrentGenerateOutput
from .cache_recurrent import RecurrentCache, Window
from .configuration_recurrent import RecurrentDepthConfig
from .modeling_recurrent import RecurrentDepthForCausalLM

AutoConfig.register(RecurrentDepthConfig.model_type, RecurrentDepthConfig)
AutoModelForCausalLM.register(RecurrentDepthConfig, RecurrentDepthForCausalLM)

__all__ = [
    "EVERY_RECURRENCE",
    "LATEST_ONLY",
    "PRESETS",
    "RecurrentCache",
    "RecurrentDepthConfig",
    "RecurrentDepthForCausalLM",
    "RecurrentGenerateOutput",
    "Window",
]
