"""Recurrent-depth models: prelude, a shared core run many times, coda (arXiv 2502.05171)."""

from transformers import AutoConfig, AutoModelForCausalLM

from ..generation.recurrent.options_recurrent import EVERY_RECURRENCE, LATEST_ONLY, PRESETS
from ..generation.recurrent.outputs_recurrent import RecurrentGenerateOutput
from .cache_recurrent import RecurrentCache, Window
from .configuration_ouro import OuroConfig
from .configuration_recurrent import RecurrentDepthConfig
from .looped_recurrent import DepthSampler, RecurrentDepthLM, sample_depth
from .modeling_recurrent import RecurrentDepthForCausalLM
from .ouro_recurrent import OuroForCausalLM

AutoConfig.register(RecurrentDepthConfig.model_type, RecurrentDepthConfig)
AutoModelForCausalLM.register(RecurrentDepthConfig, RecurrentDepthForCausalLM)
AutoConfig.register(OuroConfig.model_type, OuroConfig, exist_ok=True)
AutoModelForCausalLM.register(OuroConfig, OuroForCausalLM, exist_ok=True)

# For PEFT's `LoraConfig(target_modules=...)`: every linear layer of the core, and the adapter that feeds it.
LORA_CORE_AND_ADAPTER = (
    r".*\.(adapter|core_block\.\d+\.(attn\.Wqkv|mlp\.fc|(attn|mlp)\.proj))"  # Huginn and the retrofitted models
    r"|.*\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"  # Ouro, whose core is all its layers
)

__all__ = [
    "EVERY_RECURRENCE",
    "LATEST_ONLY",
    "LORA_CORE_AND_ADAPTER",
    "PRESETS",
    "DepthSampler",
    "OuroConfig",
    "OuroForCausalLM",
    "RecurrentCache",
    "RecurrentDepthConfig",
    "RecurrentDepthForCausalLM",
    "RecurrentDepthLM",
    "RecurrentGenerateOutput",
    "Window",
    "sample_depth",
]
