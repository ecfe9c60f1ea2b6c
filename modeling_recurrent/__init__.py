"""Recurrent-depth models: prelude, a shared core run many times, coda (arXiv 2502.05171)."""

from transformers import AutoConfig, AutoModelForCausalLM

from .cache_recurrent import EVERY_RECURRENCE, LATEST_ONLY, RecurrentCache, Window
from .configuration_recurrent import RecurrentDepthConfig
from .modeling_recurrent import RecurrentDepthForCausalLM

AutoConfig.register(RecurrentDepthConfig.model_type, RecurrentDepthConfig)
AutoModelForCausalLM.register(RecurrentDepthConfig, RecurrentDepthForCausalLM)

__all__ = [
    "EVERY_RECURRENCE",
    "LATEST_ONLY",
    "RecurrentCache",
    "RecurrentDepthConfig",
    "RecurrentDepthForCausalLM",
    "Window",
]
