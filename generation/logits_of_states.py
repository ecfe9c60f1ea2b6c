"""The model's logits of its last hidden states, of the whole vocabulary or of a few candidates.

D channels, C candidates, V vocabulary.
"""

import torch
from torch import nn


def lm_head_logits(model: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The model's logits [..., V] of its last hidden states [..., D], read from what its config says it does to them:
    a scale (Cohere), a divisor (Granite), a soft cap (Gemma 2). Conversion proves that this equals `forward`."""
    return finished_logits(model, model.get_output_embeddings()(hidden_states))


def candidate_logits(model: nn.Module, states: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor | None:
    """The same of `candidates` [A, C] only, for states [A, D]: [A, C]. None where the lm_head is no plain layer whose
    rows can be read (quantized, adapted or offloaded)."""
    if not has_rows_to_read(model, states.device):
        return None
    lm_head = model.get_output_embeddings()
    weight = lm_head.weight
    logits = (weight[candidates] @ states.to(weight.dtype)[..., None])[..., 0]
    return finished_logits(model, logits if lm_head.bias is None else logits + lm_head.bias[candidates])


def has_rows_to_read(model: nn.Module, device: torch.device) -> bool:
    """Whether the lm_head is a plain layer on this device, a row of whose weight is a token's."""
    lm_head = model.get_output_embeddings()
    weight = getattr(lm_head, "weight", None)
    return type(lm_head) is nn.Linear and weight.device == device and weight.is_floating_point()


def finished_logits(model: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """What the model makes of the lm_head's output, [..., n] of any tokens."""
    config = model.config.get_text_config()
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
