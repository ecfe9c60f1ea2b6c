"""The masks a TiDAR model is trained with; prefill and decoding use the same rule (`structured_mask`).

S clean tokens, then S masks in blocks of K.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..generation.drafting.structured_mask import MaskFunction, draft_mask_function, structured_attention_mask


def training_branch_lengths(sequence_length: int, draft_length: int, device: Any = None, first: int = 0) -> Tensor:
    """`first` + 0, K, 2K, ...: how many clean tokens each block of the doubled sequence sees."""
    return torch.arange(first, sequence_length, draft_length, device=device)


def blocks_with_labels(has_label: Tensor, draft_length: int, first: int = 0) -> Tensor:
    """How many clean tokens each block with a label sees. Other blocks have no loss.

    Args:
        has_label: [B, S] booleans.

    Returns:
        [B, M]. Rows with fewer blocks are padded with blocks after their end, at S.
    """
    sequence_length = has_label.shape[1]
    starts = training_branch_lengths(sequence_length, draft_length, has_label.device, first)
    has_label = nn.functional.pad(has_label[:, first:], (0, (first - sequence_length) % draft_length))
    teaches = has_label.unflatten(1, (-1, draft_length)).any(dim=2)  # [B, all blocks]
    order = teaches.int().argsort(dim=1, descending=True, stable=True)[:, : int(teaches.sum(dim=1).max())]
    return torch.where(teaches.gather(1, order), starts[order], sequence_length)


def mask_positions(draft_length: int, branch_lengths: Tensor) -> Tensor:
    """Positions [..., M*K] of the masks of blocks [..., M]. A last block may reach past the end."""
    return (branch_lengths[..., None] + torch.arange(draft_length, device=branch_lengths.device)).flatten(-2)


def at_positions(values: Tensor, positions: Tensor, after_end: int) -> Tensor:
    """The `values` [B, S] at the masks' positions [B, M*K]; `after_end` at positions after the sequence."""
    sequence_length = values.shape[1]
    return values.gather(1, positions.clamp(max=sequence_length - 1)).masked_fill(
        positions >= sequence_length, after_end
    )


def document_positions(document_ids: Tensor) -> Tensor:
    """Each token's position in its own document, [B, S]: a packed document is read as if it were alone."""
    before = nn.functional.pad(document_ids, (1, 0), value=-2)[:, :-1]
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    starts = torch.where(document_ids != before, index, 0).cummax(dim=1).values
    return index - starts


def same_document_function(document_ids: Tensor) -> MaskFunction:
    """Hides other documents than each query's own in `document_ids` [B, Q]. Padding is one too."""

    def may_see(batch_idx, head_idx, q_idx, kv_idx):
        return document_ids[batch_idx, q_idx] == document_ids[batch_idx, kv_idx]

    return may_see


def training_attention_mask(
    config: Any,
    draft_length: int,
    branch_lengths: Tensor,
    document_ids: Tensor,
    *,
    dtype: torch.dtype,
    half: str = "both",
    is_causal: bool = False,
) -> Any:
    """The doubled sequence's mask for `forward`, with other documents and padding hidden in both halves.

    Args:
        branch_lengths: the drafted blocks, [M] or [B, M]: all or some of `training_branch_lengths`.
        document_ids: [B, S] the document of each clean token; -1 marks padding.
        half: the queries: "both"; "clean", without masks as keys; or "masks", with the clean tokens in a cache.
        is_causal: whether a mask sees only the masks before it in its block.
    """
    batch_size, sequence_length = document_ids.shape
    positions = mask_positions(draft_length, branch_lengths).expand(batch_size, -1)
    documents_of_masks = at_positions(document_ids, positions, after_end=-1)
    same_document = same_document_function(torch.cat([document_ids, documents_of_masks], dim=1))

    num_skipped = sequence_length if half == "masks" else 0
    num_keys = sequence_length if half == "clean" else sequence_length + positions.shape[1]

    def mask_function_of_window(window):
        may_see = draft_mask_function(sequence_length, draft_length, branch_lengths, None, window, is_causal)
        return lambda b, h, q, kv: may_see(b, h, q + num_skipped, kv)

    return structured_attention_mask(
        config,
        mask_function_of_window,
        lambda b, h, q, kv: same_document(b, h, q + num_skipped, kv),
        batch_size=batch_size,
        query_length=num_keys - num_skipped,
        key_length=num_keys,
        dtype=dtype,
        device=document_ids.device,
    )
