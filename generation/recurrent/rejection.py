"""Which sampled drafts stand, token by token. Draws of a position are repeated after a rejection, so no later draft may
have a say, as it has where a whole draft is verified at once.

B sequences, K drafted tokens, V vocabulary.
"""

import torch
from torch import Tensor


def accept_by_rejection(draft_ids: Tensor, target_probs: Tensor, draft_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Accepts draft token d with probability min(1, target(d) / draft(d)), up to the first rejection
    (Leviathan et al., arXiv 2211.17192, algorithm 1).

    Args:
        draft_ids: [B, K], the first is decided.
        target_probs: [B, K, V] full depth after each draft token.
        draft_probs: [B, K - 1, V] the distributions of draft tokens 2..K.
        uniforms: [B, K - 1] in [0, 1).

    Returns:
        [B] the number of accepted tokens, 1 to K.
    """
    drawn = draft_ids[:, 1:, None]
    target = target_probs[:, :-1].gather(2, drawn).squeeze(2)
    draft = draft_probs.gather(2, drawn).squeeze(2)
    return 1 + (uniforms * draft < target).long().cumprod(dim=1).sum(dim=1)


def residual_probs(target_probs: Tensor, draft_probs: Tensor, num_accepted: Tensor) -> Tensor:
    """The distribution of the token after the accepted run: the normalised positive part of target - draft after a
    rejection, else the target itself (arXiv 2211.17192, section 2.3).

    Returns:
        [B, V] probabilities. Arguments are as in `accept_by_rejection`.
    """
    rows = torch.arange(len(num_accepted), device=num_accepted.device)
    draft_length = target_probs.shape[1]
    target = target_probs[rows, num_accepted - 1]
    if draft_length == 1:
        return target
    draft = draft_probs[rows, (num_accepted - 1).clamp(max=draft_length - 2)]
    residual = torch.where((num_accepted < draft_length)[:, None], (target - draft).clamp(min=0), target)
    total = residual.sum(dim=-1, keepdim=True)
    # Rounding can leave a residual of 0 for two equal distributions: then draw from the target.
    return torch.where(total > 0, residual / total, target)
