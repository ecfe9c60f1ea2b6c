"""Drafting inside vLLM. vLLM loads this package by its entry point, and `register` names the models that draft."""

__version__ = "0.1.0"
OLDEST, TOO_NEW = "0.32", "0.33"  # of vLLM
MODELS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3", "Qwen3Moe")
PREFIX = "Wavedraft"  # of our architectures: WavedraftLlamaForCausalLM drafts for LlamaForCausalLM


def drafting_name(architecture: str) -> str | None:
    """The architecture that drafts for a stock one; None where there is none."""
    names = {f"{model}ForCausalLM": f"{PREFIX}{model}ForCausalLM" for model in MODELS}
    return names.get(architecture)


def check_vllm_version() -> None:
    """
    Raises:
        ValueError: the installed vLLM was not tested with this package.
    """
    from packaging.version import Version
    from vllm import __version__ as installed

    if not Version(OLDEST) <= Version(Version(installed).base_version) < Version(TOO_NEW):
        raise ValueError(
            f"wavedraft-vllm {__version__} is tested with vLLM from {OLDEST} and before {TOO_NEW}, but vLLM is "
            f"{installed}. Its inner parts differ from version to version: install one of these, or a newer "
            "wavedraft-vllm."
        )


def register() -> None:
    """Called by vLLM in each of its processes, before any model is chosen."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .engine_settings import DraftingModelConfig

    for model in MODELS:
        name = f"{PREFIX}{model}ForCausalLM"
        ModelRegistry.register_model(name, f"wavedraft_vllm.models:{name}")
        MODELS_CONFIG_MAP[name] = DraftingModelConfig
