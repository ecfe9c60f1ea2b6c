"""A TiDAR model: any stock decoder of transformers that also drafts (arXiv 2511.08923).

The class is made for the checkpoint at hand: `TiDARQwen3ForCausalLM` is `Qwen3ForCausalLM` with the mixin below in
front. Config, `model_type` and state-dict names stay stock, so the same folder is also the stock model.

B sequences, S tokens, K drafted tokens, V vocabulary.
"""

import inspect
import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import ModelOutput, logging

from ..generation.cache_name import CACHE
from ..generation.drafting.draft_head import HEAD_FILE, draft_head_of, load_draft_head, save_draft_head
from ..generation.drafting.structured_mask import attention_windows
from ..generation.execution.mask_gate import MaskGate
from ..generation.stock_model import lm_head_logits
from ..hub.hub_repository import HubRepository, origin_folder
from ..hub.model_card import write_card
from ..hub.travelling_code import write_custom_generate, write_travelling_code
from .configuration_tidar import TiDARConfig
from .generation_tidar import HUB_KEYWORDS, TiDARGenerationMixin, generate
from .losses_tidar import DRAFT_LOSSES, IGNORED, cross_entropy
from .masking_tidar import (
    at_positions,
    blocks_with_labels,
    document_positions,
    mask_positions,
    training_attention_mask,
)

logger = logging.get_logger(__name__)
PREFIX = "TiDAR"
_drafting_classes: dict[Any, type[PreTrainedModel]] = {}


@dataclass
class TiDAROutput(ModelOutput):
    """What `forward(objective=...)` returns.

    Attributes:
        loss: (alpha * ar_loss + diffusion_loss) / (1 + alpha); the diffusion loss alone where the base is frozen.
        ar_loss: mean next-token cross-entropy of the clean tokens; None in gated mode, which does not compute it.
        diffusion_loss: mean loss of the masks, each on the token of its own position.
    """

    loss: torch.Tensor | None = None
    ar_loss: torch.Tensor | None = None
    diffusion_loss: torch.Tensor | None = None


@dataclass(frozen=True)
class DraftObjective:
    """What a forward with labels teaches.

    Args:
        mode: "joint" trains every token of the doubled sequence (the paper's); "gated" runs the clean half without
            gradient and opens the adapter's gate for the masks only; "head" runs both without and trains the draft
            head, which is not asked for a block's first slot.
        draft_loss: "cross_entropy" on the tokens; "kl" or "tv" against the autoregressive side's distribution.
        alpha: weight of the autoregressive loss in joint mode (arXiv 2511.08923, equation 3).
        slot_decay: each slot of a block weighs this much of the one before it, in (0, 1]. A token behind a rejected one
            is worth nothing, so the first slots decide what a draft is worth; 1 weighs all alike, as the paper does.
        first_token: where the first block begins, 0 in the paper. A trainer that draws it anew for each step, from 0 to
            K - 1, has every token learnt in every slot.
        num_recurrences: core steps of a recurrent-depth model, for text and masks alike; by default all of them.
    """

    mode: str = "joint"
    draft_loss: str = "cross_entropy"
    alpha: float = 1.0
    slot_decay: float = 1.0
    first_token: int = 0
    num_recurrences: int | None = None

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


class TiDARMixin(TiDARGenerationMixin, HubRepository):
    """Drafting, in front of a stock `...ForCausalLM` class. Without `objective`, `forward` is the stock one."""

    stock_class: type[PreTrainedModel]
    card_kind = "tidar"

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        TiDARConfig.from_model_config(config)
        attention_windows(config)
        super().__init__(config, *args, **kwargs)
        # A generation config that claims to come from the model config loses the options we keep in it on loading.
        self.generation_config._from_model_config = False

    @property
    def tidar_config(self) -> TiDARConfig:
        return TiDARConfig.from_model_config(self.config)

    # -- forward and the training loss

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *args: Any,
        objective: DraftObjective | None = None,
        document_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock forward; with an `objective`, the TiDAR loss of `input_ids` [B, S] under `labels` [B, S].

        `mask_token_id` in `input_ids` reads the checkpoint's mask embedding.

        Args:
            objective: what to teach; None leaves the forward stock.
            document_ids: [B, S] with an objective: which document of a packed row each token belongs to. By
                default a row is one document and `attention_mask` [B, S] marks its padding.

        Returns:
            The stock output, or `TiDAROutput`.
        """
        if objective is not None:
            assert input_ids is not None
            given = {name: value for name, value in kwargs.items() if value is not None}  # PEFT names them all
            return self._objective_forward(input_ids, objective, document_ids, *args, **given)
        if input_ids is not None:
            tidar = self.tidar_config
            input_ids = input_ids.masked_fill(input_ids == tidar.mask_token_id, tidar.mask_embedding_id)
            kept, length = kwargs.get("logits_to_keep"), input_ids.shape[1]
            if isinstance(kept, int) and 0 < kept < length:
                # Of a slice torch makes a batched product where the lm_head is frozen, as `load_adapter` leaves it: ten
                # times as slow on a CPU. An index copies the few rows.
                kwargs["logits_to_keep"] = torch.arange(length - kept, length, device=input_ids.device)
        return super().forward(input_ids, *args, **kwargs)

    def _objective_forward(
        self,
        input_ids: torch.Tensor,
        objective: DraftObjective,
        document_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> TiDAROutput:
        if document_ids is None:
            document_ids = torch.zeros_like(input_ids)
        if attention_mask is not None:
            document_ids = document_ids.masked_fill(attention_mask == 0, -1)
        labels = (input_ids if labels is None else labels).masked_fill(document_ids == -1, IGNORED)
        # Nothing in its own document predicts a first token.
        starts_document = document_ids != nn.functional.pad(document_ids, (1, 0), value=-1)[:, :-1]
        ar_labels = labels.masked_fill(starts_document, IGNORED)
        draft_labels = labels if objective.draft_loss == "cross_entropy" else ar_labels
        first = min(objective.first_token, input_ids.shape[1] - 1)
        blocks = blocks_with_labels(draft_labels != IGNORED, self.tidar_config.draft_length, first)
        if not blocks.shape[1]:
            raise ValueError(
                "No token of this batch has a label, so there is nothing to learn. Give labels that are not all -100."
            )
        if objective.mode == "head":
            return self._head_loss(input_ids, document_ids, blocks, draft_labels, objective, num_items_in_batch)
        if objective.mode == "joint":
            return self._joint_loss(
                input_ids, document_ids, blocks, draft_labels, ar_labels, objective, num_items_in_batch
            )
        return self._gated_loss(input_ids, document_ids, blocks, draft_labels, objective, num_items_in_batch)

    def _joint_loss(
        self, input_ids, document_ids, blocks, draft_labels, ar_labels, objective, num_items_in_batch
    ) -> TiDAROutput:
        clean_states, mask_states = self._doubled_states(objective, input_ids, document_ids, blocks)
        diffusion_loss = self._draft_loss(
            objective, mask_states, blocks, clean_states, input_ids, document_ids, draft_labels, num_items_in_batch
        )
        predicting = (ar_labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        losses = cross_entropy(self.lm_head_logits(clean_states[predicting]), ar_labels[:, 1:][predicting])
        ar_loss = losses.sum() / (num_items_in_batch if num_items_in_batch is not None else max(len(losses), 1))
        loss = (objective.alpha * ar_loss + diffusion_loss) / (1 + objective.alpha)
        return TiDAROutput(loss=loss, ar_loss=ar_loss, diffusion_loss=diffusion_loss)

    def _gated_loss(self, input_ids, document_ids, blocks, draft_labels, objective, num_items_in_batch) -> TiDAROutput:
        """Slot 1 teaches too, though decoding puts the model's own next token there: the slots behind it read its
        states. Without its loss, slot 2 of a first adapter was right 42% of the time after 260 steps of 4 rows.
        """
        gate = MaskGate.of(self)
        if gate is None:
            raise ValueError(
                "`mode='gated'` needs a gated adapter (a PEFT LoRA with `alora_invocation_tokens`), but the model has "
                "none. Add one with `wavedraft.training.gated_adapter_config`, or train with `mode='joint'`."
            )
        # Checkpointed layers take no cache: the clean half is then run together with the masks.
        is_checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.modules())
        if is_checkpointing and self.tidar_config.mask_recurrences is not None:
            raise ValueError(
                "Activation checkpointing must be off for a gated adapter whose masks leave the core early "
                f"(`tidar_config.mask_recurrences` is {self.tidar_config.mask_recurrences}): core steps that are run "
                "again would not know whether masks are among their tokens. Those before the last "
                "`mean_backprop_depth` keep nothing anyway."
            )
        states = self._doubled_states if is_checkpointing else self._cached_states
        clean_states, mask_states = states(objective, input_ids, document_ids, blocks)
        loss = self._draft_loss(
            objective, mask_states, blocks, clean_states, input_ids, document_ids, draft_labels, num_items_in_batch
        )
        if is_checkpointing and loss.requires_grad:
            gate.open_in_backward(loss, mask_states.shape[1])
        return TiDAROutput(loss=loss, diffusion_loss=loss)

    def _head_loss(self, input_ids, document_ids, blocks, draft_labels, objective, num_items_in_batch) -> TiDAROutput:
        if draft_head_of(self) is None:
            raise ValueError(
                "`mode='head'` needs a draft head, but the model has none. Add one with "
                "`wavedraft.generation.draft_head.new_draft_head`, or train in another mode."
            )
        states = self._doubled_states if MaskGate.of(self) is None else self._cached_states
        with torch.no_grad():
            clean_states, mask_states = states(objective, input_ids, document_ids, blocks)
        loss = self._draft_loss(
            objective, mask_states, blocks, clean_states, input_ids, document_ids, draft_labels, num_items_in_batch
        )
        return TiDAROutput(loss=loss, diffusion_loss=loss)

    def _draft_loss(
        self, objective, mask_states, blocks, clean_states, input_ids, document_ids, labels, num_items_in_batch
    ) -> torch.Tensor:
        """Weighted mean loss of the masks [B, M*K, D] on the labels [B, S] of their positions; where a trainer counts
        the labels of a whole step, this batch's part of that mean."""
        draft_length = self.tidar_config.draft_length
        positions = mask_positions(draft_length, blocks)
        labels = at_positions(labels, positions, behind_end=IGNORED)
        slots = torch.arange(positions.shape[1], device=labels.device) % draft_length
        if objective.mode == "head":
            labels = labels.masked_fill(slots == 0, IGNORED)
        rows, masks = (labels != IGNORED).nonzero(as_tuple=True)
        target_logits = None
        if objective.draft_loss != "cross_entropy":
            with torch.no_grad():
                target_logits = self.lm_head_logits(clean_states[rows, positions[rows, masks] - 1])
        states = mask_states[rows, masks]
        if (head := draft_head_of(self)) is not None:
            place = positions[rows, masks]
            before = (place - 1).clamp(min=0)
            previous = self.get_input_embeddings()(input_ids[rows, before]).detach()
            # A block's first token is never drafted, and a document's first has nothing before it.
            is_mended = (slots[masks] > 0) & (document_ids[rows, before] == document_ids[rows, place])
            states = torch.where(is_mended[:, None], head(states, previous), states)
        draft_logits = self.lm_head_logits(states)
        losses = DRAFT_LOSSES[objective.draft_loss](draft_logits, labels[rows, masks], target_logits)
        weight_of_slot = objective.slot_decay ** torch.arange(draft_length, device=masks.device)
        weights = (weight_of_slot / weight_of_slot.mean())[slots[masks]]
        total = weights.sum().clamp(min=1e-9) if num_items_in_batch is None else num_items_in_batch
        return (losses * weights).sum() / total

    def _doubled_states(self, objective, input_ids, document_ids, blocks) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states of the clean half [B, S, D] and of the masks of `blocks` [B, M], [B, M*K, D]."""
        sequence_length, tidar, gate = input_ids.shape[1], self.tidar_config, MaskGate.of(self)
        positions = mask_positions(tidar.draft_length, blocks)
        clean_positions = document_positions(document_ids)
        mask = training_attention_mask(self.config, tidar.draft_length, blocks, document_ids, dtype=self.dtype)
        with gate.open(positions.shape[1]) if gate else nullcontext():
            states = self._decoder_states(
                objective,
                num_masks=positions.shape[1],
                input_ids=torch.cat([input_ids, torch.full_like(positions, tidar.mask_embedding_id)], dim=1),
                attention_mask=mask,
                position_ids=torch.cat([clean_positions, at_positions(clean_positions, positions, 0)], dim=1),
                use_cache=False,
            )
        return states[:, :sequence_length], states[:, sequence_length:]

    def _cached_states(self, objective, input_ids, document_ids, blocks) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, with the clean half run without a graph and the adapter: it does not learn."""
        tidar, gate = self.tidar_config, MaskGate.of(self)
        positions = mask_positions(tidar.draft_length, blocks)
        clean_mask, mask = (
            training_attention_mask(self.config, tidar.draft_length, blocks, document_ids, dtype=self.dtype, half=half)
            for half in ("clean", "masks")
        )
        clean_positions = document_positions(document_ids)
        cache = DynamicCache()
        with torch.no_grad():
            clean_states = self._decoder_states(
                objective,
                input_ids=input_ids,
                attention_mask=clean_mask,
                position_ids=clean_positions,
                cache=cache,
                use_cache=True,
            )
        assert gate is not None
        with gate.open(positions.shape[1]):
            mask_states = self._decoder_states(
                objective,
                num_masks=positions.shape[1],
                input_ids=torch.full_like(positions, tidar.mask_embedding_id),
                attention_mask=mask,
                position_ids=at_positions(clean_positions, positions, 0),
                cache=cache,
                use_cache=True,
            )
        return clean_states, mask_states

    def _decoder_states(
        self, objective: DraftObjective, num_masks: int = 0, cache: DynamicCache | None = None, **inputs: Any
    ) -> torch.Tensor:
        """What the lm_head reads, [B, T, D]; the last `num_masks` of the tokens are masks."""
        if not hasattr(self, "num_cache_layers"):
            return self.base_model(**{CACHE: cache}, **inputs)[0]
        depth = objective.num_recurrences
        return self.decoder_states(num_recurrences=depth, num_masks=num_masks, cache=cache, **inputs)

    def lm_head_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of last hidden states [..., D], exactly as the stock forward makes them."""
        return lm_head_logits(self, hidden_states)

    # -- vocabulary, loading, saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Stock, and the draft head beside the weights, if there is one."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.tidar_config.draft_head and draft_head_of(model) is None:
            found = load_draft_head(model, pretrained_model_name_or_path, "config.json", **hub_keywords(kwargs))
            if not found:
                logger.warning(f"{pretrained_model_name_or_path} lacks its draft head, {HEAD_FILE}: it drafts without.")
        return loaded

    def load_adapter(self, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Stock, and the draft head beside the adapter, if there is one."""
        loaded = super().load_adapter(peft_model_id, *args, **kwargs)
        if peft_model_id is not None:
            load_draft_head(self, peft_model_id, **hub_keywords(kwargs))
        return loaded

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Stock; an input-only mask id moves behind the new vocabulary."""
        old_size = self.config.get_text_config().vocab_size
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        new_size = self.config.get_text_config().vocab_size
        tidar = dict(self.config.tidar_config)
        if tidar["mask_token_id"] >= old_size and new_size != old_size:
            tidar["mask_token_id"] += new_size - old_size
            self.config.tidar_config = tidar
        return embeddings

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Stock, but `generate` stays this class's: the custom_generate/ of a repository is for stock models."""
        super().adjust_generation_fn(*args, **kwargs)
        self.__dict__.pop("generate", None)

    @classmethod
    def write_code(cls, folder: Path) -> None:
        """Writes the code a checkpoint needs to draft where wavedraft is not installed.

        The config keeps the stock architecture, so that the folder also loads as the stock model. The code of a
        recurrent-depth model is that of its plain class: it does not draft by masks without wavedraft.
        """
        if (plain_class := getattr(cls.stock_class, "plain_class", None)) is not None:
            return plain_class.write_code(folder)
        write_travelling_code(cls, folder, architecture=cls.stock_class.__name__)
        write_custom_generate(generate, folder)

    def write_repository(self, folder: Path) -> None:
        """Writes all that stands beside the weights, or beside those of an adapter, which alone are saved then."""
        save_draft_head(self, folder)
        if not getattr(self, "_hf_peft_config_loaded", False):
            return super().write_repository(folder)
        has_code = not hasattr(self, "num_cache_layers")
        write_adapter_code(folder, self.tidar_config, has_code)
        if has_code:
            write_card(folder, "adapter", folder.name, origin=origin_folder(self), loaded_from=self.name_or_path)


def write_adapter_code(folder: Path, taught: TiDARConfig, has_code: bool = True) -> None:
    """Writes beside a gated adapter what an unmodified stock model drafts with it by, and the options it was taught.

    Args:
        has_code: false for a recurrent-depth model's, which drafts with wavedraft alone.
    """
    if has_code:
        write_custom_generate(generate, folder, taught=taught.to_dict())
    path = folder / "generation_config.json"
    options = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    options |= {"draft_length": taught.draft_length, "mask_embedding_id": taught.mask_embedding_id}
    path.write_text(json.dumps(options, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def hub_keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s keywords that say how to find a file."""
    return {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}


class TiDARForCausalLM:
    """The door to drafting models: gives the class that fits a checkpoint's own architecture."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise TypeError(
            "TiDARForCausalLM has no architecture of its own: use `TiDARForCausalLM.from_pretrained(folder_or_hub_id)` "
            "or `TiDARForCausalLM.from_config(config)`."
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Loads a TiDAR checkpoint; keywords are those of transformers' `from_pretrained`. No code of the checkpoint
        is run.

        Raises:
            ValueError: the checkpoint was not converted, or its architecture cannot draft.
        """
        config = AutoConfig.from_pretrained(name_or_path, **hub_keywords(kwargs))
        TiDARConfig.from_model_config(config)
        return tidar_class(stock_class_of(config)).from_pretrained(name_or_path, *args, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> PreTrainedModel:
        """A drafting model of random weights for a stock config with a `tidar_config` in it."""
        return tidar_class(stock_class_of(config))._from_config(config, **kwargs)


def stock_class_of(config: Any) -> type[PreTrainedModel]:
    """The stock `...ForCausalLM` class of a config.

    Raises:
        ValueError: it is no decoder-only language model of transformers, or cannot take a rejected token back.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model_type!r} is an encoder-decoder: its decoder does not read its own prompt, so it cannot "
            "draft in the same forward. Use a decoder-only model, such as Llama, Mistral, Qwen3, Gemma, Phi or OLMo."
        )
    try:
        stock_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ValueError(
            f"transformers has no causal language model for the architecture {config.model_type!r}. Supported are its "
            "decoder-only models, such as Llama, Mistral, Qwen2, Qwen3, Gemma, Phi or OLMo."
        ) from None
    attention_windows(config)
    if hasattr(stock_class, "as_stock_decoder"):  # ours, of a recurrent depth
        stock_class = stock_class.as_stock_decoder()
    return stock_class


def tidar_class(stock_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The drafting class over a stock `...ForCausalLM` class of transformers; made once."""
    if stock_class not in _drafting_classes:
        _drafting_classes[stock_class] = _new_drafting_class(stock_class)
    return _drafting_classes[stock_class]


def _new_drafting_class(stock_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    members = {
        "stock_class": stock_class,
        "__module__": __name__,
        "__doc__": f"{stock_class.__name__} that also drafts (TiDAR, arXiv 2511.08923).",
    }
    # transformers reads the stock class's source for these; a class made at run time has none.
    members["_can_set_attn_implementation_cached_value"] = stock_class._can_set_attn_implementation()
    members["_can_set_experts_implementation_cached_value"] = stock_class._can_set_experts_implementation()
    members["forward"] = forward_with_signature_of(stock_class)
    if hasattr(stock_class, "plain_class"):
        members["card_kind"] = "tidar-recurrent"
    name = PREFIX + stock_class.__name__
    # Some checkpoints spell a tensor otherwise than the model (GPT-NeoX's head); transformers keeps that by class name.
    if (renamings := get_checkpoint_conversion_mapping(stock_class.__name__)) is not None:
        register_checkpoint_conversion_mapping(name, renamings, overwrite=True)
    return type(name, (TiDARMixin, stock_class, GenerationMixin), members)


def forward_with_signature_of(stock_class: type[PreTrainedModel]) -> Any:
    """The mixin's forward under the stock signature and our two keywords: Trainer and `generate` read it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return TiDARMixin.forward(self, *args, **kwargs)

    stock = inspect.signature(stock_class.forward)
    parameters = {**stock.parameters}
    ours = inspect.signature(TiDARMixin.forward).parameters
    rest = [parameters.pop(name) for name, p in stock.parameters.items() if p.kind is p.VAR_KEYWORD]
    forward.__signature__ = stock.replace(  # type: ignore[attr-defined]
        parameters=[*parameters.values(), ours["objective"], ours["document_ids"], *rest]
    )
    forward.__doc__ = TiDARMixin.forward.__doc__
    return forward


def __getattr__(name: str) -> type[PreTrainedModel]:
    """`TiDARQwen3ForCausalLM` and its like, so that `auto_map` can name the class of any family (PEP 562)."""
    stock_class = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not (isinstance(stock_class, type) and issubclass(stock_class, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return tidar_class(stock_class)
