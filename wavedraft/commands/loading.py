"""Checkpoints as the verbs load them, the last step before they do anything."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from ..bench.contenders import without_adapter
from ..modeling_recurrent import RecurrentDepthForCausalLM
from ..modeling_tidar import TiDARForCausalLM
from .cli_checks import check_folder, is_recurrent


def load(model: str, dtype: str, device: str, adapter: str | None) -> Any:
    """A TiDAR model with its adapter, or a recurrent-depth model, as the checkpoint's config.json says."""
    if is_recurrent(model):
        return RecurrentDepthForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    tidar = TiDARForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    if adapter is not None:
        tidar.load_adapter(adapter)
    return tidar


def load_with_stock(model: str, adapter: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """A TiDAR model with its adapter, and the stock model in the same memory."""
    loaded = load(model, dtype, device, adapter=None)
    stock = without_adapter(loaded)
    if adapter is not None:
        loaded.load_adapter(adapter)
    return loaded, stock


def load_assistant(assistant: str, dtype: str, tokenizer: Any) -> Any:
    """A smaller stock model, on the CPU; its vocabulary must be that of the model it assists."""
    check_folder(assistant)
    if AutoTokenizer.from_pretrained(assistant).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--assistant must have the model's own vocabulary, but that of {assistant} is another one.")
    return AutoModelForCausalLM.from_pretrained(assistant, dtype=dtype).eval()
