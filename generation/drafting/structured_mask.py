"""Who may see whom in a forward that reads tokens and drafts more: one rule for training, prefill and decoding.

B sequences, N clean tokens, M blocks of K masks (none, where nothing is drafted), Q = N + M*K queries, C cached slots.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks

from ..stock_model import attention_of

MaskFunction = Callable[..., Tensor]
WINDOWED = ("full_attention", "sliding_attention")  # kinds of layers that can take a rejected token back


def draft_positions(num_clean: int, draft_length: int, branch_lengths: Tensor) -> Tensor:
    """Position of each query after the first clean token, [N + M*K] or [B, N + M*K]: 0..N-1, then K from each
    branch's length on (`branch_lengths` [M] or [B, M])."""
    device = branch_lengths.device
    blocks = branch_lengths[..., None] + torch.arange(draft_length, device=device)  # [..., M, K]
    clean = torch.arange(num_clean, device=device).expand(*branch_lengths.shape[:-1], -1)
    return torch.cat([clean, blocks.flatten(start_dim=-2)], dim=-1)


def draft_mask_function(
    num_clean: int,
    draft_length: int,
    branch_lengths: Tensor,
    cached_lengths: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool = False,
) -> MaskFunction:
    """TiDAR's structured mask as an index function for transformers' mask interface.

    Queries are N clean tokens, then M blocks of K masks. Keys are each row's cached slots, then the same Q entries.
    Everyone sees the whole cache. A clean token sees the clean tokens up to itself. Block j sees the first
    `branch_lengths[j]` clean tokens and the whole of itself, or, where `is_causal`, itself up to each mask.

    N = S and lengths 0, K, 2K, ... are the training mask, N = P and length P the prefill, N = K and lengths 1..K the
    decode step (arXiv 2511.08923, figures 2 and 3).

    Args:
        branch_lengths: integers in [0, N], [M] or [B, M].
        cached_lengths: [B] slots cached in each row, or None.
        sliding_window: keys so many positions away or more are hidden.
    """
    branch_lengths = nn.functional.pad(branch_lengths, (0, 1))  # one more, of no query: M may be 0
    num_blocks = branch_lengths.shape[-1]

    def block_of(index: Tensor) -> Tensor:  # -1: clean or cached
        return torch.where(index < num_clean, -1, (index - num_clean) // draft_length)

    def length_seen(batch_idx: Tensor, block: Tensor) -> Tensor:
        block = block.clamp(0, num_blocks - 1)
        return branch_lengths[block] if branch_lengths.dim() == 1 else branch_lengths[batch_idx, block]

    def position(batch_idx: Tensor, index: Tensor, block: Tensor) -> Tensor:
        after_branch = length_seen(batch_idx, block) + (index - num_clean) % draft_length
        return torch.where(block < 0, index, after_branch)

    def may_see(batch_idx, head_idx, q_idx, kv_idx):
        key = kv_idx if cached_lengths is None else kv_idx - cached_lengths[batch_idx]  # negative: cached
        query_block, key_block = block_of(q_idx), block_of(key)
        num_seen = torch.where(query_block < 0, q_idx + 1, length_seen(batch_idx, query_block))
        is_own_block = key_block == query_block
        if is_causal:
            is_own_block = is_own_block & (key <= q_idx)
        visible = torch.where(key_block < 0, key < num_seen, is_own_block)
        if sliding_window is not None:
            distance = position(batch_idx, q_idx, query_block) - position(batch_idx, key, key_block)
            visible = visible & (distance < sliding_window)
        return visible

    return may_see


def real_slot_function(is_real_slot: Tensor, cached_lengths: Tensor) -> MaskFunction:
    """Hides slots that are padding, where `is_real_slot` [B, C] is false. A query always sees itself, so that a padding
    row stays finite."""

    def may_see(batch_idx, head_idx, q_idx, kv_idx):
        return is_real_slot[batch_idx, kv_idx] | (kv_idx - cached_lengths[batch_idx] == q_idx)

    return may_see


def attention_windows(config: Any) -> dict[str, int | None]:
    """Sliding window (in positions, None for full attention) of each kind of layer in a stock decoder."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return {"full_attention": window}
    windows = dict(zip(WINDOWED, (None, window), strict=True))
    kinds = {"full_attention" if kind == "hybrid" else kind for kind in layer_types}
    return {kind: windows[kind] for kind in sorted(kinds & windows.keys())}


def structured_attention_mask(
    config: Any,
    mask_function_of_window: Callable[[int | None], MaskFunction],
    *other_conditions: MaskFunction,
    batch_size: int,
    query_length: int,
    key_length: int,
    dtype: torch.dtype,
    device: torch.device,
    implementation: str | None = None,
) -> Any:
    """Writes a mask in the form that an attention implementation reads.

    Args:
        mask_function_of_window: makes the index function for a sliding window.
        other_conditions: index functions that must hold as well (padding, documents).
        implementation: by default the config's.

    Returns:
        an additive tensor (eager), a boolean one (sdpa) or a BlockMask (flex_attention), [B, 1, Q, keys]; a dictionary
        of them where layers differ in their window.
    """
    implementation = implementation or attention_of(config)
    if implementation not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"Attention implementation {implementation!r} cannot express the structured mask of a draft. Load the "
            "model with attn_implementation='sdpa', 'eager' or 'flex_attention'."
        )
    masks = {
        kind: ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=batch_size,
            q_length=query_length,
            kv_length=key_length,
            mask_function=and_masks(mask_function_of_window(window), *other_conditions),
            allow_is_causal_skip=False,
            dtype=dtype,
            device=device,
            config=config,
        )
        for kind, window in attention_windows(config).items()
    }
    return masks if len(masks) > 1 else next(iter(masks.values()))


def masks_of_step(
    branch_lengths: Tensor,
    cached_lengths: Tensor,
    is_real_slot: Tensor | None,
    num_clean: int,
    draft_length: int,
    num_slots: int,
    windows: tuple[int | None, ...],
    is_causal: bool,
    num_groups: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """The structured mask for each window, [A, 1, Q, S], true where a query sees a slot.

    `branch_lengths` [A, M], `cached_lengths` [A], `is_real_slot` [A, S] false for padding, or None.

    Args:
        num_groups: G, the query heads that share a key head. If given, the mask is to be added to their scores, in
            `dtype`, [A, 1, G*Q, S]: it is made once for all layers.
    """
    device, num_rows = branch_lengths.device, len(branch_lengths)
    num_queries = num_clean + branch_lengths.shape[1] * draft_length
    row = torch.arange(num_rows, device=device)[:, None, None]
    place = torch.arange(num_queries, device=device)[:, None], torch.arange(num_slots, device=device)
    masks = []
    for window in windows:
        function = draft_mask_function(num_clean, draft_length, branch_lengths, cached_lengths, window, is_causal)
        mask = function(row, None, *place)
        if is_real_slot is not None:
            mask = mask & real_slot_function(is_real_slot, cached_lengths)(row, None, *place)
        if num_groups is not None:
            mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, -torch.inf)
            mask = mask.repeat(1, num_groups, 1)
        masks.append(mask[:, None])
    return tuple(masks)
