"""What a draft is taught with: distances between what the masks predict and what the model would write.

T positions with a label, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

IGNORED = -100


def cross_entropy(
    draft_logits: torch.Tensor, token_ids: torch.Tensor, target_logits: torch.Tensor | None = None
) -> torch.Tensor:
    """-log draft(token), [T]: the tokens themselves teach (arXiv 2511.08923)."""
    return F.cross_entropy(draft_logits.float(), token_ids, reduction="none")


def kl_divergence(draft_logits: torch.Tensor, token_ids: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """KL(target || draft), [T]: the autoregressive side teaches."""
    target = target_logits.float().log_softmax(dim=-1)
    draft = draft_logits.float().log_softmax(dim=-1)
    return (target.exp() * (target - draft)).sum(dim=-1)


def total_variation(draft_logits: torch.Tensor, token_ids: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """Half the L1 distance of the two distributions, [T], in [0, 1]: one minus the chance that a sampled draft token
    is accepted (arXiv 2211.17192, corollary 3.6)."""
    return (target_logits.float().softmax(dim=-1) - draft_logits.float().softmax(dim=-1)).abs().sum(dim=-1) / 2


DRAFT_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "cross_entropy": cross_entropy,
    "kl": kl_divergence,
    "tv": total_variation,
}
