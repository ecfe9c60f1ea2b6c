"""The structured masks as whole boolean tables, for comparison and drawing."""

import torch

from wavedraft.generation.drafting.structured_mask import draft_mask_function
from wavedraft.modeling_tidar.masking_tidar import training_branch_lengths


def training_mask(sequence_length: int, draft_length: int, is_causal: bool = False) -> torch.Tensor:
    """The boolean mask of the doubled sequence, [2S, 2S]: row sees column (arXiv 2511.08923, figure 2)."""
    branch_lengths = training_branch_lengths(sequence_length, draft_length)
    may_see = draft_mask_function(sequence_length, draft_length, branch_lengths, is_causal=is_causal)
    index = torch.arange(2 * sequence_length)
    return may_see(0, 0, index[:, None], index[None, :])


def decode_mask(draft_length: int, branch_lengths: list[int] | None = None, is_causal: bool = False) -> torch.Tensor:
    """The boolean mask of a decode step without the cached prefix, [K + M*K, K + M*K]; default: M = K branches."""
    branches = torch.tensor(branch_lengths or range(1, draft_length + 1))
    may_see = draft_mask_function(draft_length, draft_length, branches, is_causal=is_causal)
    index = torch.arange(draft_length * (1 + len(branches)))
    return may_see(0, 0, index[:, None], index[None, :])
