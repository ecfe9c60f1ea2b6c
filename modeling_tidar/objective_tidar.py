"""The losses of TiDAR training: the autoregressive loss of the text and the diffusion loss of the masks.

One forward reads the clean tokens and, after them, blocks of masks (arXiv 2511.08923, figure 2).
This file does not travel with a checkpoint: a trainer hands the objective and its losses to `forward`.

B sequences, S clean tokens, M blocks of K masks, T positions with a label, D channels, V vocabulary.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.utils import ModelOutput

from ..generation.drafting.draft_head import draft_head_of
from ..generation.execution.gated_linear import MaskGate, mask_gate_of
from ..generation.stock_model import CACHE, has_causal_blocks, has_states, num_cache_layers
from .masking_tidar import at_positions, blocks_with_labels, document_positions, mask_positions, training_attention_mask
from .stateful_objective import BlockStates

IGNORED = -100


def cross_entropy(draft_logits: Tensor, token_ids: Tensor, target_logits: Tensor | None = None) -> Tensor:
    """-log draft(token), [T] (arXiv 2511.08923)."""
    return nn.functional.cross_entropy(draft_logits.float(), token_ids, reduction="none")


def kl_divergence(draft_logits: Tensor, token_ids: Tensor, target_logits: Tensor) -> Tensor:
    """KL(target || draft), [T]."""
    target = target_logits.float().log_softmax(dim=-1)
    draft = draft_logits.float().log_softmax(dim=-1)
    return (target.exp() * (target - draft)).sum(dim=-1)


def total_variation(draft_logits: Tensor, token_ids: Tensor, target_logits: Tensor) -> Tensor:
    """Half the L1 distance of target and draft, [T], in [0, 1]: the probability that a sampled draft token is rejected
    (arXiv 2211.17192, corollary 3.6)."""
    return (target_logits.float().softmax(dim=-1) - draft_logits.float().softmax(dim=-1)).abs().sum(dim=-1) / 2


def negative_log_acceptance(draft_logits: Tensor, token_ids: Tensor, target_logits: Tensor) -> Tensor:
    """-log of the probability that a sampled draft token is accepted, [T] (arXiv 2602.23881). Where drafts are poor,
    its gradient does not vanish as that of `total_variation` does."""
    shared = torch.minimum(target_logits.float().softmax(dim=-1), draft_logits.float().softmax(dim=-1)).sum(dim=-1)
    return -shared.clamp(min=torch.finfo(shared.dtype).tiny).log()


DRAFT_LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "kl": kl_divergence,
    "tv": total_variation,
    "lk": negative_log_acceptance,
}


@dataclass
class TiDAROutput(ModelOutput):
    """What `forward(objective=...)` returns.

    Attributes:
        loss: (alpha * ar_loss + diffusion_loss) / (1 + alpha); only the diffusion loss if the base is frozen.
        ar_loss: mean next-token cross-entropy of the clean tokens; None if the base is frozen.
        diffusion_loss: mean loss of the masks, each for the token at its own position.
    """

    loss: Tensor | None = None
    ar_loss: Tensor | None = None
    diffusion_loss: Tensor | None = None


@dataclass(frozen=True)
class DraftObjective:
    """The training objective of a forward with labels.

    Args:
        mode: "joint" trains every token of the doubled sequence, as the paper does. "gated" runs the clean half
            without gradient and the adapter on the masks only. "head" trains only the draft head, which never predicts
            a block's first slot.
        draft_loss: "cross_entropy" on the tokens; "kl", "tv" or "lk" against the autoregressive side's distribution.
        alpha: weight of the autoregressive loss in joint mode (arXiv 2511.08923, equation 3).
        slot_decay: weight of each slot of a block relative to the slot before it, in (0, 1]; 1 in the paper. Tokens
            after a rejected one are discarded, so the first slots matter most.
        first_token: where the first block starts; 0 in the paper. If a trainer draws it from 0 to K - 1 for each step,
            every slot learns every token.
    """

    mode: str = "joint"
    draft_loss: str = "cross_entropy"
    alpha: float = 1.0
    slot_decay: float = 1.0
    first_token: int = 0

    def __post_init__(self):
        if self.mode not in ("joint", "gated", "head"):
            raise ValueError(f"`mode` must be 'joint', 'gated' or 'head', but is {self.mode!r}.")
        if self.draft_loss not in DRAFT_LOSSES:
            raise ValueError(f"`draft_loss` must be one of {sorted(DRAFT_LOSSES)}, but is {self.draft_loss!r}.")
        if self.alpha < 0:
            raise ValueError(f"`alpha` must be 0 or more, but is {self.alpha}.")
        if not 0 < self.slot_decay <= 1:
            raise ValueError(f"`slot_decay` must be above 0 and at most 1, but is {self.slot_decay}.")
        if self.first_token < 0:
            raise ValueError(f"`first_token` must be 0 or more, but is {self.first_token}.")

    def loss_of(self, model: Any, input_ids: Tensor, **kwargs: Any) -> TiDAROutput:
        """The loss of rows of text [B, S], and its parts; what else is given of them, as in `training_batch`.

        Raises:
            ValueError: no token has a label, or the model lacks the adapter or head to train.
        """
        batch = training_batch(self, model.tidar_config.draft_length, input_ids, **kwargs)
        return {"joint": joint_loss, "gated": gated_loss, "head": head_loss}[self.mode](model, self, batch)


class TrainingBatch(NamedTuple):
    """Rows of text, and their labels for both losses.

    Attributes:
        input_ids: [B, S] the clean tokens.
        document_ids: [B, S] the document of each token; -1 marks padding.
        ar_labels: [B, S] labels of the autoregressive loss, -100 for none.
        draft_labels: [B, S] labels of the masks, each at its own position.
        blocks: [B, M] how many clean tokens each block of masks sees; S marks a padding block.
        num_labels: the number of labels in a whole training step, if this batch is part of one.
    """

    input_ids: Tensor
    document_ids: Tensor
    ar_labels: Tensor
    draft_labels: Tensor
    blocks: Tensor
    draft_length: int
    num_labels: Tensor | int | None = None

    @property
    def mask_positions(self) -> Tensor:
        """The position of each mask, [B, M*K]."""
        return mask_positions(self.draft_length, self.blocks)


def training_batch(
    objective: DraftObjective,
    draft_length: int,
    input_ids: Tensor,
    document_ids: Tensor | None = None,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> TrainingBatch:
    """A batch of rows [B, S]; `document_ids`, `labels` and `attention_mask` are [B, S] too.

    Raises:
        ValueError: no token has a label.
    """
    if document_ids is None:
        document_ids = torch.zeros_like(input_ids)
    if attention_mask is not None:
        document_ids = document_ids.masked_fill(attention_mask == 0, -1)
    labels = (input_ids if labels is None else labels).masked_fill(document_ids == -1, IGNORED)
    # No token precedes a document's first one, so nothing predicts it.
    starts_document = document_ids != nn.functional.pad(document_ids, (1, 0), value=-1)[:, :-1]
    ar_labels = labels.masked_fill(starts_document, IGNORED)
    draft_labels = labels if objective.draft_loss == "cross_entropy" else ar_labels
    first = min(objective.first_token, input_ids.shape[1] - 1)
    blocks = blocks_with_labels(draft_labels != IGNORED, draft_length, first)
    if not blocks.shape[1]:
        raise ValueError(
            "No token of this batch has a label, so there is nothing to learn. Pass labels that are not all -100."
        )
    return TrainingBatch(input_ids, document_ids, ar_labels, draft_labels, blocks, draft_length, num_items_in_batch)


def joint_loss(model: Any, objective: DraftObjective, batch: TrainingBatch) -> TiDAROutput:
    """Both losses, weighted by `alpha` (arXiv 2511.08923, equation 3)."""
    clean_states, mask_states = doubled_states(model, batch)
    diffusion_loss = draft_loss(model, objective, batch, clean_states, mask_states)
    next_labels = batch.ar_labels[:, 1:]
    predicting = (next_labels != IGNORED).nonzero(as_tuple=True)
    losses = cross_entropy(model.lm_head_logits(clean_states[predicting]), next_labels[predicting])
    ar_loss = losses.sum() / (batch.num_labels if batch.num_labels is not None else max(len(losses), 1))
    loss = (objective.alpha * ar_loss + diffusion_loss) / (1 + objective.alpha)
    return TiDAROutput(loss=loss, ar_loss=ar_loss, diffusion_loss=diffusion_loss)


def gated_loss(model: Any, objective: DraftObjective, batch: TrainingBatch) -> TiDAROutput:
    """The diffusion loss of the masks. Only masks pass through the gated adapter.

    Slot 1 has a loss, although decoding puts the model's own next token there, because later slots read its states.
    Without that loss, slot 2 of a first adapter was right 42% of the time after 260 steps of 4 rows.
    """
    gate = mask_gate_of(model)
    if gate is None:
        raise ValueError(
            "`mode='gated'` needs a gated adapter (a PEFT LoRA with `alora_invocation_tokens`), but the model has "
            "none. Add one with `wavedraft.training.gated_adapter_config`, or train with `mode='joint'`."
        )
    # Checkpointed layers take no cache, so the clean half runs together with the masks.
    is_checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    states = doubled_states if is_checkpointing else cached_states
    clean_states, mask_states = states(model, batch)
    loss = draft_loss(model, objective, batch, clean_states, mask_states)
    if is_checkpointing and loss.requires_grad:
        open_in_backward(gate, loss, mask_states.shape[1])
    return TiDAROutput(loss=loss, diffusion_loss=loss)


def open_in_backward(gate: MaskGate, loss: Tensor, num_masks: int) -> None:
    """Opens a gate again while `loss` is differentiated: gradient checkpointing runs the layers once more."""

    def close() -> None:
        gate.num_masks = 0

    def reopen(gradient: Tensor) -> None:
        gate.num_masks = num_masks
        torch.autograd.Variable._execution_engine.queue_callback(close)

    loss.register_hook(reopen)


def head_loss(model: Any, objective: DraftObjective, batch: TrainingBatch) -> TiDAROutput:
    """The diffusion loss of the masks after the draft head. Only the head learns."""
    if draft_head_of(model) is None:
        raise ValueError(
            "`mode='head'` needs a draft head, but the model has none. Add one with "
            "`wavedraft.generation.draft_head.new_draft_head`, or train in another mode."
        )
    states = doubled_states if mask_gate_of(model) is None and not has_states(model.config) else cached_states
    with torch.no_grad():
        clean_states, mask_states = states(model, batch)
    loss = draft_loss(model, objective, batch, clean_states, mask_states)
    return TiDAROutput(loss=loss, diffusion_loss=loss)


def draft_loss(
    model: Any, objective: DraftObjective, batch: TrainingBatch, clean_states: Tensor, mask_states: Tensor
) -> Tensor:
    """Weighted mean loss of the masks on their positions' labels, or the batch's part of a training step's mean.

    Args:
        clean_states: [B, S, D] last hidden states of the clean tokens.
        mask_states: [B, M*K, D] last hidden states of the masks.
    """
    positions = batch.mask_positions
    labels = at_positions(batch.draft_labels, positions, after_end=IGNORED)
    slots = torch.arange(positions.shape[1], device=labels.device) % batch.draft_length
    if objective.mode == "head":
        labels = labels.masked_fill(slots == 0, IGNORED)
    rows, masks = (labels != IGNORED).nonzero(as_tuple=True)
    target_logits = None
    if objective.draft_loss != "cross_entropy":
        with torch.no_grad():
            target_logits = model.lm_head_logits(clean_states[rows, positions[rows, masks] - 1])
    states = corrected_by_head(model, batch, mask_states[rows, masks], rows, positions[rows, masks], slots[masks])
    draft_logits = model.lm_head_logits(states)
    losses = DRAFT_LOSSES[objective.draft_loss](draft_logits, labels[rows, masks], target_logits)
    weight_of_slot = objective.slot_decay ** torch.arange(batch.draft_length, device=masks.device)
    weights = (weight_of_slot / weight_of_slot.mean())[slots[masks]]
    total = weights.sum().clamp(min=1e-9) if batch.num_labels is None else batch.num_labels
    return (losses * weights).sum() / total


def corrected_by_head(
    model: Any, batch: TrainingBatch, states: Tensor, rows: Tensor, positions: Tensor, slots: Tensor
) -> Tensor:
    """Mask states [N, D] after the model's draft head, if it has one.

    Args:
        rows, positions, slots: [N] each mask's sequence, its position there, and its slot in its block.
    """
    head = draft_head_of(model)
    if head is None:
        return states
    before = (positions - 1).clamp(min=0)
    previous = model.get_input_embeddings()(batch.input_ids[rows, before]).detach()
    # A block's first token is never drafted, and no token precedes a document's first one.
    is_same_document = batch.document_ids[rows, before] == batch.document_ids[rows, positions]
    is_corrected = (slots > 0) & is_same_document
    return torch.where(is_corrected[:, None], head(states, previous), states)


def doubled_states(model: Any, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
    """Last hidden states of the clean tokens [B, S, D] and of the masks [B, M*K, D], from one forward of both."""
    if has_states(model.config):
        raise ValueError(
            f"A {model.config.model_type!r} model has layers that keep a state, which a forward of text and masks "
            "together cannot fork. Teach a gated adapter (`mode='gated'`), without `gradient_checkpointing`."
        )
    sequence_length, gate, positions = batch.input_ids.shape[1], mask_gate_of(model), batch.mask_positions
    clean_positions = document_positions(batch.document_ids)
    mask = mask_of_half(model, batch, "both")
    mask_ids = torch.full_like(positions, model.tidar_config.mask_embedding_id)
    with gate.open(positions.shape[1]) if gate else nullcontext():
        states = decoder_states(
            model,
            input_ids=torch.cat([batch.input_ids, mask_ids], dim=1),
            attention_mask=mask,
            position_ids=torch.cat([clean_positions, at_positions(clean_positions, positions, 0)], dim=1),
            use_cache=False,
        )
    return states[:, :sequence_length], states[:, sequence_length:]


def mask_of_half(model: Any, batch: TrainingBatch, half: str) -> Any:
    is_causal = has_causal_blocks(model.config.tidar_config)
    about = model.config, batch.draft_length, batch.blocks, batch.document_ids
    return training_attention_mask(*about, dtype=model.dtype, half=half, is_causal=is_causal)


def cached_states(model: Any, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
    """The same states, but the clean tokens run first, without gradient and adapter."""
    gate, positions = mask_gate_of(model), batch.mask_positions
    clean_mask, mask = (mask_of_half(model, batch, half) for half in ("clean", "masks"))
    clean_positions = document_positions(batch.document_ids)
    cache = DynamicCache()
    states = BlockStates(model, batch) if has_states(model.config) else None
    if states is not None:
        cache.layers = [DynamicLayer() for _ in range(num_cache_layers(model))]
    with torch.no_grad(), states.kept() if states else nullcontext():
        clean_states = decoder_states(
            model,
            input_ids=batch.input_ids,
            attention_mask=clean_mask,
            position_ids=clean_positions,
            cache=cache,
            use_cache=True,
        )
    with gate.open(positions.shape[1]) if gate else nullcontext(), states.read() if states else nullcontext():
        mask_states = decoder_states(
            model,
            input_ids=torch.full_like(positions, model.tidar_config.mask_embedding_id),
            attention_mask=mask,
            position_ids=at_positions(clean_positions, positions, 0),
            cache=cache,
            use_cache=True,
        )
    return clean_states, mask_states


def decoder_states(model: Any, cache: DynamicCache | None = None, **inputs: Any) -> Tensor:
    """The lm_head's input, [B, T, D]."""
    return model.base_model(**{CACHE: cache}, **inputs)[0]
