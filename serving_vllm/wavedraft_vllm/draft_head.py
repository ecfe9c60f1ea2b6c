"""The next draft, from what the masks say: slot after slot, each knowing the one before.

R requests, N slots, D channels, C candidates, V vocabulary.
"""

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from vllm.distributed import tensor_model_parallel_all_reduce

NUM_CANDIDATES = 64  # each mask's likeliest tokens, which the head scores anew


class DraftHead(nn.Module):
    """wavedraft's head: mends a mask's last state for the token before it.

    Args:
        path: the head's safetensors file.
    """

    def __init__(self, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__()
        for name, tensor in load_file(path).items():
            self.register_buffer(name, tensor.to(device, dtype), persistent=False)

    def mend(self, states: Tensor, previous: Tensor) -> Tensor:
        """States [R, D] of one slot, mended for the embeddings [R, D] of the tokens before it."""
        num_channels = states.shape[-1]
        both = [functional.rms_norm(x.to(self.input_weight.dtype), x.shape[-1:]) for x in (states, previous)]
        read = functional.linear(both[0], self.input_weight[:, :num_channels], self.input_bias)
        read = read + functional.linear(both[1], self.input_weight[:, num_channels:])
        return states + functional.linear(functional.silu(read), self.output_weight).to(states.dtype)


def draft_chain(
    model: Any, head: DraftHead | None, states: Tensor, logits: Tensor, places: Tensor, previous: Tensor
) -> tuple[Tensor, Tensor]:
    """What is drafted after the tokens `previous` [R], and each token's confidence.

    Args:
        states, logits: [n, D] and [n, V] of all rows that the sampler sees.
        places: [R, N] the rows of each request's masks after the first.

    Returns:
        ids [R, N] and confidences [R, N].
    """
    ids, confidences = [], []
    for slot in range(places.shape[1]):
        rows = places[:, slot]
        scores = logits[rows].float()
        if head is not None:
            mended = head.mend(states[rows], model.embed_input_ids(previous))
            candidates = scores.topk(min(NUM_CANDIDATES, scores.shape[1]), sorted=False).indices
            scores = scores.scatter(1, candidates, candidate_logits(model, mended, candidates).float())
        best, previous = scores.max(dim=1)
        ids.append(previous)
        confidences.append((best - scores.logsumexp(dim=1)).exp())
    return torch.stack(ids, dim=1), torch.stack(confidences, dim=1)


def candidate_logits(model: Any, states: Tensor, candidates: Tensor) -> Tensor:
    """Logits [R, C] of states [R, D] for only `candidates` [R, C]. With tensor parallelism each rank has some rows."""
    lm_head, finish = lm_head_of(model), model.logits_processor
    first, last = lm_head.shard_indices.org_vocab_start_index, lm_head.shard_indices.org_vocab_end_index
    is_here = (candidates >= first) & (candidates < last)
    rows = lm_head.weight[(candidates - first).masked_fill(~is_here, 0)]
    logits = torch.einsum("rcd,rd->rc", rows, states.to(rows.dtype)) * is_here
    if lm_head.tp_size > 1:
        logits = tensor_model_parallel_all_reduce(logits)
    if finish.soft_cap is not None:
        logits = torch.tanh(logits / finish.soft_cap) * finish.soft_cap
    return logits * finish.scale


def lm_head_of(model: Any) -> Any:
    """The model's lm_head, below vLLM's LoRA layer if there is one.

    Raises:
        ValueError: it has no plain rows of weights to read.
    """
    lm_head = getattr(model.lm_head, "base_layer", model.lm_head)
    weight = getattr(lm_head, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.dim() != 2 or not weight.numel():
        raise ValueError(
            "The draft head reads rows of the lm_head, whose weights are quantized here. Quantize all but the lm_head, "
            "or take draft_head.safetensors out of the adapter's folder, to draft without it."
        )
    return lm_head
