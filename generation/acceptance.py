"""How much of a draft is accepted: by equality (greedy) or as a block (sampled).

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
    num_accepted = 1 + (draft_ids[:, 1:] == target_ids[:, :-1]).long().cumprod(dim=1).sum(dim=1)
    return num_accepted if num_drafted is None else num_accepted.minimum(num_drafted)


def accept_block(
    draft_ids: Tensor, target_probs: Tensor, draft_probs: Tensor, uniforms: Tensor, num_drafted: Tensor
) -> tuple[Tensor, Tensor]:
    """Accepts as much of a draft as any rule can that keeps the target's distribution (block verification, Sun et al.,
    arXiv 2403.10444). A token likelier to the target than to the drafter makes up for one before it that is not.

    Args:
        target_probs: [B, K, V] the autoregressive side after each draft token.
        draft_probs: [B, K - 1, V] the distributions of draft tokens 2..K.
        uniforms: [B, K - 1] in [0, 1). All of them count, so no later draft may be decided by the same.
        num_drafted: [B] the number of draft tokens in each row, 1 to K.

    Returns:
        [B] the number of accepted tokens, 1 to `num_drafted`; [B, V] what the next one is drawn from, not normalised.
    """
    drawn = draft_ids[:, 1:, None]
    ratios = (target_probs[:, :-1].gather(2, drawn) / draft_probs.gather(2, drawn)).squeeze(2)
    shares = [ratios.new_ones(len(ratios))]  # the chance that so many stand or more
    for ratio in ratios.unbind(dim=1):
        shares.append((shares[-1] * ratio).clamp(max=1))
    share = torch.stack(shares, dim=1)  # [B, K]
    place, longest = torch.arange(1, len(shares) + 1, device=share.device), num_drafted[:, None]
    left = share[..., None] * target_probs  # [B, K, V] what longer runs do not bring
    left[:, :-1] -= draft_probs
    mass = torch.where(place < longest, left.clamp_(min=0).sum(dim=-1), share)
    stands = nn.functional.pad(uniforms, (1, 0)) < mass / (mass + 1 - share)
    num_accepted = (place * (stands & (place <= longest))).amax(dim=1).clamp(min=1)
    rows, last = torch.arange(len(mass), device=share.device), num_accepted - 1
    # Rounding can leave nothing of two equal distributions: then draw from the target.
    has_left = (num_accepted < num_drafted) & (mass[rows, last] > 0)
    return num_accepted, torch.where(has_left[:, None], left[rows, last], target_probs[rows, last])


def sample(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one id per row by inverting the cumulative distribution: the first whose cumulative probability exceeds a
    threshold, so never one of probability 0.

    Args:
        probs: [..., V], not necessarily normalised.
        uniforms: [...] in [0, 1).

    Returns:
        [...] ids, each with a probability above 0.
    """
    cumulative = probs.double().cumsum(dim=-1)
    threshold = uniforms.double().unsqueeze(-1) * cumulative[..., -1:]
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
