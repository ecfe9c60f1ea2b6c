"""How much of a draft is accepted: by equality (greedy) or by rejection sampling (sampled).

B sequences, K drafted tokens, V vocabulary.
"""

import torch
from torch import Tensor, nn


def accept_by_equality(draft_ids: Tensor, target_ids: Tensor, num_drafted: Tensor | None = None) -> Tensor:
    """Accepts the longest run of draft tokens that the model itself would have written.

    Args:
        draft_ids: [B, K], the first is decided.
        target_ids: [B, K] the model's own choice after each draft token.
        num_drafted: [B] the number of draft tokens in each row, 1 to K (None: all).

    Returns:
        [B] the number of accepted tokens, 1 to `num_drafted`.
    """
    return _num_accepted(draft_ids[:, 1:] == target_ids[:, :-1], num_drafted)


def accept_by_rejection(
    draft_ids: Tensor, target_probs: Tensor, draft_probs: Tensor, uniforms: Tensor, num_drafted: Tensor | None = None
) -> Tensor:
    """Accepts draft token d with probability min(1, target(d) / draft(d)), up to the first rejection
    (Leviathan et al., arXiv 2211.17192, algorithm 1).

    Args:
        target_probs: [B, K, V] the autoregressive side after each draft token.
        draft_probs: [B, K - 1, V] the distributions of draft tokens 2..K.
        uniforms: [B, K - 1] in [0, 1).

    Other arguments and the result are as in `accept_by_equality`.
    """
    drawn = draft_ids[:, 1:, None]
    target = target_probs[:, :-1].gather(2, drawn).squeeze(2)
    draft = draft_probs.gather(2, drawn).squeeze(2)
    return _num_accepted(uniforms * draft < target, num_drafted)


def _num_accepted(stands: Tensor, num_drafted: Tensor | None) -> Tensor:
    num_accepted = 1 + stands.long().cumprod(dim=1).sum(dim=1)
    return num_accepted if num_drafted is None else num_accepted.minimum(num_drafted)


def residual_probs(
    target_probs: Tensor, draft_probs: Tensor, num_accepted: Tensor, num_drafted: Tensor | None = None
) -> Tensor:
    """The distribution of the token after the accepted run: the normalised positive part of target - draft after a
    rejection, else the target itself (arXiv 2211.17192, section 2.3).

    Returns:
        [B, V] probabilities. Arguments are as in `accept_by_rejection`.
    """
    rows = torch.arange(len(num_accepted), device=num_accepted.device)
    draft_length = target_probs.shape[1]
    is_rejected = num_accepted < (draft_length if num_drafted is None else num_drafted)
    target = target_probs[rows, num_accepted - 1]
    if draft_length == 1:
        return target
    draft = draft_probs[rows, (num_accepted - 1).clamp(max=draft_length - 2)]
    residual = torch.where(is_rejected[:, None], (target - draft).clamp(min=0), target)
    total = residual.sum(dim=-1, keepdim=True)
    # Rounding can leave a residual of 0 for two equal distributions: then draw from the target.
    return torch.where(total > 0, residual / total, target)


def sample(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one id per row by inverting the cumulative distribution.

    Args:
        probs: [..., V], not necessarily normalised.
        uniforms: [...] in [0, 1).

    Returns:
        [...] ids, each with a probability above 0.
    """
    cumulative = probs.double().cumsum(dim=-1)
    threshold = uniforms.double().unsqueeze(-1) * cumulative[..., -1:]
    # The first id whose cumulative probability exceeds the threshold: never an id of probability 0.
    ids = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    last_possible = probs.shape[-1] - 1 - (probs.flip(-1) > 0).long().argmax(dim=-1)
    return torch.minimum(ids, last_possible)


def draft_confidence(draft_ids: Tensor, draft_scores: Tensor) -> Tensor:
    """The drafter's probability of each of its tokens: [B, N] from ids [B, N] and scores [B, N, V]."""
    chosen = draft_scores.gather(2, draft_ids[..., None]).squeeze(2)
    return (chosen.float() - draft_scores.logsumexp(dim=-1).float()).exp()


def likely_lengths(confidence: Tensor, num_drafted: Tensor, num_branches: int) -> Tensor:
    """The most probable numbers of accepted tokens, if each token is accepted with the drafter's confidence.

    Args:
        confidence: [B, K - 1] the drafter's probabilities of draft tokens 2..K.
        num_drafted: [B] the maximum number of accepted tokens, 1 to K.
        num_branches: how many numbers to choose, 0 to K.

    Returns:
        [B, num_branches] rising numbers from 1 to K.
    """
    if not num_branches:
        return num_drafted.new_empty(len(num_drafted), 0)
    place = torch.arange(1, confidence.shape[1] + 1, device=confidence.device)
    stands = confidence.masked_fill(place >= num_drafted[:, None], 0)
    reached = nn.functional.pad(stands.cumprod(dim=1), (1, 0), value=1.0)  # [B, K]
    stops = reached * (1 - nn.functional.pad(stands, (0, 1)))
    return 1 + stops.topk(num_branches).indices.sort().values
