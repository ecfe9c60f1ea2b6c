"""Which models can draft, wherever they come in. D channels."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..execution.stateful_layers import stateful_layers
from ..kept_with_model import kept_with
from ..stock_model import CACHE, STATEFUL, decoder_of, device_of, is_composite
from ..torch_internals import parts_of, tensors_of
from .structured_mask import WINDOWED, attention_windows

ARGUMENTS = {"attention_mask", "position_ids", CACHE, "logits_to_keep"}
DRAFTABLE_LAYERS = {*WINDOWED, *STATEFUL, "moe", "mlp"}
COMPOSITES = {"gemma3", "internvl", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"}
COMPOSITES |= {"qwen3_vl_moe", "qwen3_5_moe"}
SUPPORTED = (
    "Supported: decoder-only language models such as Llama, Qwen3, Gemma or GPT-2, and hybrids such as Qwen3-Next or "
    "LFM2. Decode others with transformers."
)


def refuse_undraftable(model_class: Any, config: Any, model: Any = None) -> None:
    """Raises ValueError for a model that cannot verify drafts."""
    reason = reason_in_class(model_class, config) or _reason_in_config(config)
    if not reason and model is not None:
        reason = _reason_in_parts(model)
    if reason:
        raise ValueError(f"A {config.model_type!r} model cannot draft: {reason}. {SUPPORTED}")


def reason_in_class(model_class: Any, config: Any) -> str | None:
    """Why no model of a class can verify drafts, or None. `config` may be a config class."""
    if hasattr(config, "mean_recurrence"):
        return "it has a recurrent depth. Load it with `RecurrentDepthForCausalLM`, for `generate(policy='exact')`"
    text = getattr(config, "text_config", None) or config
    kinds = getattr(text, "layer_types", None)
    has_kinds = isinstance(kinds, list | tuple) and not STATEFUL.isdisjoint(kinds)
    if getattr(model_class, "_is_stateful", False) and not has_kinds:
        return "its recurrent layers do not keep their state in transformers' cache"
    if model_class and (lacking := sorted(ARGUMENTS - set(inspect.signature(model_class.forward).parameters))):
        return f"its forward does not take {', '.join(f'`{name}`' for name in lacking)}"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, whose decoder does not read the prompt"
    return None if model_class else "transformers has no causal language model of this architecture"


def _reason_in_config(config: Any) -> str | None:
    parts = [getattr(config, name, None) for name in config.sub_configs]
    has_parts = is_composite(config) or any(hasattr(part, "num_hidden_layers") for part in parts)
    if has_parts and config.model_type not in COMPOSITES:
        return "it consists of several models"
    config = config.get_text_config()
    if "zamba" in config.model_type:
        return "its layers share an attention block"
    if getattr(config, "alibi", False) or hasattr(config, "attention_types"):
        return "its attention (ALiBi, GPT-Neo) goes by cache slots, not by positions"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "its attention reads backwards too"
    if any(window is not None and window < 1 for window in attention_windows(config).values()):
        return f"its `sliding_window` of {config.sliding_window} hides every token from itself"
    if refused := sorted(set(getattr(config, "layer_types", None) or ()) - DRAFTABLE_LAYERS):
        return f"its layers of the kind {', '.join(refused)} keep a state, or their mask is not a window"
    return None


def _reason_in_parts(model: Any) -> str | None:
    if not _is_decoder_with_head(model):
        return "its forward is more than a decoder and an lm_head"
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    num_states = sum(kind in STATEFUL for kind in kinds or ())
    found = stateful_layers(model)
    if len(found) != num_states or not all(hasattr(one, "conv1d") or hasattr(one, "conv") for one in found):
        return "its layers keep states of another form"
    if any(hasattr(one, "x_proj") for one in found):
        return "its Mamba-1 layers read several tokens without the state before them"
    return None


def _is_decoder_with_head(model: Any) -> bool:
    """Whether the decoder's states go straight to the lm_head."""
    parts = decoder_of(model), model.get_output_embeddings()
    decoder = getattr(parts[0], "language_model", parts[0]) if is_composite(model.config) else parts[0]
    return model.get_decoder() is decoder and all(any(child is part for part in parts) for child in model.children())


def reason_of_layers(model: Any) -> str | None:
    """Why drafts could change the text of a model with quantized layers, or None: where a token's result depends on the
    tokens beside it. Each layer is asked once."""
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    kept = kept_with(model).asked_layers
    for name, layer in model.named_modules():
        kinds = tuple(type(tensor) for tensor in tensors_of(layer))
        holds = any(is_packed(tensor) for tensor in tensors_of(layer))
        if isinstance(layer, nn.Embedding) or "lora_A" in parts_of(layer) or not (holds or is_quantized):
            continue
        if not hasattr(layer, "in_features"):
            if any(is_packed(tensor) for tensor in layer.parameters(recurse=False)):
                return f"`{name}` ({type(layer).__name__}) has quantized weights, and is not a linear layer"
            continue
        if layer not in kept or kept[layer][0] != kinds:
            kept[layer] = kinds, _reason_of_layer(layer, model)
        if kept[layer][1]:
            return f"quantized layers such as `{name}` ({type(layer).__name__}) {kept[layer][1]}"
    return None


def is_packed(tensor: Tensor | None) -> bool:
    """Whether a tensor holds quantized weights."""
    if tensor is None or tensor.ndim < 2:
        return False
    is_small = tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool
    return is_small or tensor.dtype == torch.int32 or type(tensor.data).__name__ not in ("Tensor", "DTensor")


@torch.no_grad()
def _reason_of_layer(layer: Any, model: Any) -> str | None:
    """Asks one layer about a token beside two different ones."""
    place = next((tensor.device for tensor in tensors_of(layer) if tensor is not None), torch.device("meta"))
    device = device_of(model) if place.type == "meta" else place
    draws = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
    token, other = draws.to(device, model.dtype)
    beside_itself, beside_other = (torch.stack([token, one])[None] for one in (token, 100 * other))  # [1, 2, D]
    try:
        alike, different = layer(beside_itself)[0, 0], layer(beside_other)[0, 0]
        if torch.equal(alike, different):
            return None
        noise = (layer(beside_itself)[0, 0] - alike).abs().max()  # of products that are never twice the same
    except Exception as error:  # any package's
        return f"cannot be asked about one token ({type(error).__name__}: {error})"
    if (different - alike).abs().max() <= 4 * noise:
        return None
    return "round a token by the tokens beside it, masks too. Quantize activations by the token, or weights alone"
