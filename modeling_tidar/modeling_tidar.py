"""A TiDAR model: any stock decoder of transformers that also drafts (arXiv 2511.08923).

`TiDARQwen3ForCausalLM` is `Qwen3ForCausalLM` with the mixin below as first base. Config, `model_type` and state-dict
names stay stock, so the folder also loads as the stock model.

B sequences, S tokens, D channels, V vocabulary.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import logging

from ..generation.drafting.draft_head import (
    HEAD_FILE,
    attach_draft_head,
    drop_head,
    head_taught_with,
    load_draft_head,
)
from ..generation.drafting.draftable import refuse_undraftable
from ..generation.drafting.options_tidar import ACCEPTANCE
from ..generation.execution.gated_linear import active_adapters, is_gated, mask_gate_of, some_numbers_of
from ..generation.stock_model import (
    BIDIRECTIONAL,
    can_choose_experts,
    file_if_there,
    has_loaded_adapter,
    lm_head_logits,
)
from ..hub.hub_repository import HubRepository, keep_own_options, point_config_at
from .configuration_tidar import TiDARConfig
from .generation_tidar import HUB_KEYWORDS, TiDARGenerationMixin, generate

logger = logging.get_logger(__name__)
PREFIX = "TiDAR"
OPTIONS = "generation_config.json"
NUMBERS = "some_numbers"  # of an adapter's weights when it was loaded, kept with its PEFT config
UNTAUGHT = (
    "This TiDAR model is in training mode. Its drafts are taught only by the loss of `forward(objective=...)`, for "
    "which `wavedraft.training.TiDARTrainer` asks. Labels alone, as from Trainer or TRL's SFTTrainer, have the stock "
    "autoregressive loss. It teaches the text, and drafts then fit the text less and less."
)
_drafting_classes: dict[Any, type[PreTrainedModel]] = {}


class TiDARMixin(TiDARGenerationMixin, HubRepository):
    """Adds drafting to a stock `...ForCausalLM` class. Without `objective`, `forward` is the stock one."""

    stock_class: type[PreTrainedModel]
    card_kind = "tidar"
    adapter_card_kind = "adapter"
    has_objective = False  # whether a trainer said that it passes one to every forward

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        refuse_undraftable(self.stock_class, config)
        config.tidar_config = TiDARConfig.from_model_config(config).to_dict()
        super().__init__(config, *args, **kwargs)
        refuse_undraftable(self.stock_class, config, self)
        keep_own_options(self.generation_config)

    @property
    def tidar_config(self) -> TiDARConfig:
        return TiDARConfig.from_model_config(self.config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        objective: Any = None,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock forward; with an `objective`, the TiDAR loss of `input_ids` [B, S] for `labels` [B, S].

        Labels without an objective have the stock autoregressive loss. A warning says so once in training mode.
        `mask_token_id` in `input_ids` reads the checkpoint's mask embedding.

        Args:
            objective: a `DraftObjective`. It brings its losses along, which do not travel with a checkpoint.
            document_ids: [B, S], with an objective: each token's document in a packed row. By default a row is one
                document, and `attention_mask` [B, S] marks its padding.

        Returns:
            The stock output, or `TiDAROutput`.
        """
        if objective is not None:
            if self.training:
                record_acceptance(self, None, *active_adapters(self)[:1])  # it is of the weights before this step
            stock_names = list(inspect.signature(self.stock_class.forward).parameters)[2:]  # after self, input_ids
            by_name = dict(zip(stock_names, args, strict=False))
            given = {name: value for name, value in kwargs.items() if value is not None}  # PEFT passes every keyword
            return objective.loss_of(self, input_ids, document_ids=document_ids, **by_name, **given)
        if document_ids is not None:
            raise ValueError("`document_ids` must be left out without an `objective`, which alone reads them.")
        if self.training and kwargs.get("labels") is not None and not torch.compiler.is_compiling():
            self.warn_of_stock_loss()
            record_acceptance(self, None, *active_adapters(self)[:1])
        if input_ids is not None:
            tidar = self.tidar_config
            input_ids = input_ids.masked_fill(input_ids == tidar.mask_token_id, tidar.mask_embedding_id)
            kept, length = kwargs.get("logits_to_keep"), input_ids.shape[1]
            if isinstance(kept, int) and 0 < kept < length:
                # torch multiplies a slice and a frozen lm_head in batches, ten times slower on a CPU. An index copies.
                kwargs["logits_to_keep"] = torch.arange(length - kept, length, device=input_ids.device)
        return super().forward(input_ids, *args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """As stock; warns once, before any step, that not every trainer's loss teaches drafts.

        TRL replaces `forward` by its own, which would not warn.
        """
        if mode:
            self.warn_of_stock_loss()
        return super().train(mode)

    def warn_of_stock_loss(self) -> None:
        """Warns once a process, but not if this model's trainer passes an objective."""
        if not self.has_objective:
            logger.warning_once(UNTAUGHT)

    def lm_head_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [..., V] of last hidden states [..., D], as in the stock forward."""
        return lm_head_logits(self, hidden_states)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As stock; also loads a draft head beside the weights."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.tidar_config.draft_head and head_taught_with(model, None) is None:
            head = load_draft_head(model, pretrained_model_name_or_path, "config.json", **hub_keywords(kwargs))
            if head is not None:
                attach_draft_head(model, head)
            else:
                logger.warning(
                    f"{pretrained_model_name_or_path} lacks its draft head, {HEAD_FILE}, and drafts without one."
                )
        return loaded

    def load_adapter(self, peft_model_id: Any = None, adapter_name: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As stock; also loads the draft head beside the adapter, and the record of how often its drafts stand.

        Raises:
            ValueError: the adapter is of another base or kind, or its layers cannot be gated.
        """
        options = {} if peft_model_id is None else adapter_options(peft_model_id, **hub_keywords(kwargs))
        own = self.tidar_config.block_attention or BIDIRECTIONAL
        if "mask_embedding_id" in options and (taught := options.get("block_attention") or BIDIRECTIONAL) != own:
            raise ValueError(
                f"{peft_model_id} was taught with {taught} blocks, not {own} ones. Convert with `--block-attention`."
            )
        name = adapter_name or "default"
        loaded_before = name in getattr(self, "peft_config", {})
        try:
            loaded = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        except RuntimeError as error:
            if not loaded_before:
                self.delete_adapter(name)
            raise ValueError(
                f"{peft_model_id} must be an adapter of this {type(self).__name__}, but its weights have other sizes. "
                "Load it with the base that its adapter_config.json names (`base_model_name_or_path`)."
            ) from error
        except ValueError as error:
            if "variant" not in str(error) or loaded_before:
                raise
            if has_loaded_adapter(self):
                self.delete_adapter(name)
            raise ValueError(
                f"{peft_model_id} cannot be gated in this {type(self).__name__}: PEFT has no gate for its layers. Load "
                "the base without quantization, or quantized by bitsandbytes, torchao, HQQ or GPTQ."
            ) from error
        adapter = self.peft_config[name]
        drop_head(self, adapter)  # of the adapter that a hot swap replaces
        if "mask_embedding_id" in options and adapter.alora_invocation_tokens:
            adapter.alora_invocation_tokens = [self.tidar_config.mask_token_id]  # the vocabulary may have grown since
        record_acceptance(self, options.get(ACCEPTANCE), adapter)
        mask_gate_of(self)  # also where PEFT itself has no gate (HQQ, GPTQ)
        if peft_model_id is not None:
            if (head := load_draft_head(self, peft_model_id, **hub_keywords(kwargs))) is not None:
                attach_draft_head(self, head, adapter)
            vars(adapter)[NUMBERS] = some_numbers_of(self, name)
        return loaded

    def options_of_adapters(self) -> dict[str, Any]:
        """The record of how often drafts stand with the active adapters."""
        forget_swapped(self)
        adapters = active_adapters(self)
        if any(ACCEPTANCE in vars(adapter) for adapter in adapters):
            return {ACCEPTANCE: acceptance_of(self)}
        if any(is_gated(adapter, self) and adapter.inference_mode for adapter in adapters):
            logger.warning_once(
                "PEFT has loaded this adapter, and reads neither a draft head nor a record of how often drafts stand, "
                "which may lie beside the adapter. `model.load_adapter(folder)` reads both, `draft_head=folder` a head."
            )
        return {}

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As stock. An input-only mask id moves to the end of the new vocabulary. If the masks' embedding is cut off,
        masks read the last row that is left: the text stays, and drafts must be taught anew."""
        gated = [adapter for adapter in getattr(self, "peft_config", {}).values() if is_gated(adapter, self)]
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        tidar, last_row = dict(self.config.tidar_config), self.config.get_text_config().vocab_size - 1
        row = tidar.get("mask_embedding_id", tidar["mask_token_id"])
        if row > last_row:
            logger.warning(
                f"The vocabulary ends at {last_row} now, before the masks' embedding {row}: masks read row {last_row}. "
                "The text is the same, but drafts are poor until they are taught again (`wavedraft train`)."
            )
            tidar["mask_embedding_id"] = last_row
            record_acceptance(self, None)
        self.config.tidar_config = TiDARConfig.from_dict(tidar, last_row + 1).to_dict()
        for adapter in gated:
            adapter.alora_invocation_tokens = [self.tidar_config.mask_token_id]
        return embeddings

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """As stock, but keeps this class's `generate`: a repository's custom_generate/ is for stock models."""
        super().adjust_generation_fn(*args, **kwargs)
        self.__dict__.pop("generate", None)

    @classmethod
    def write_code(cls, folder: Path, origin: Path | None = None) -> None:
        """Writes the code a checkpoint needs to draft without wavedraft. The config keeps the stock architecture."""
        cls.files.write_code(cls, folder)
        cls.files.write_custom_generate(generate, folder, origin)
        point_config_at(cls, folder, architecture=cls.stock_class.__name__)

    def write_repository(self, folder: Path) -> None:
        """Writes all files beside the weights, or beside an adapter's."""
        if not has_loaded_adapter(self):
            save_draft_head(self, folder)
            return super().write_repository(folder)
        forget_swapped(self)
        save_draft_head(self, folder, self.peft_config[self.active_adapters()[0]])
        origin = self.files.origin_of(self)
        write_adapter_code(folder, self.tidar_config, origin, acceptance_of(self))
        self.files.write_card(self, folder, folder.name, origin=origin)


def save_draft_head(model: Any, folder: Path, adapter: Any = None) -> None:
    """Writes a model's own head beside its weights, or an adapter's beside the adapter, if there is one."""
    if (head := head_taught_with(model, adapter)) is not None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
        partial = folder / f"{HEAD_FILE}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(folder / HEAD_FILE)
    elif (folder / HEAD_FILE).is_file():
        logger.warning(
            f"{folder / HEAD_FILE} is of an earlier save: this model has no draft head. Delete it, or an adapter saved "
            "here is loaded with it."
        )


def write_adapter_code(
    folder: Path, taught: TiDARConfig, origin: Path | None = None, record: dict[str, Any] | None = None
) -> None:
    """Writes, beside a gated adapter, its options and the code for a stock model to draft.

    Args:
        taught: the config that the adapter was trained with.
        origin: the folder of its model.
        record: how often its drafts stand (`draft_acceptance`).
    """
    HubRepository.files.write_custom_generate(generate, folder, origin, taught.to_dict())
    path = folder / OPTIONS
    options = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    options |= {"draft_length": taught.draft_length, "mask_embedding_id": taught.mask_embedding_id}
    options |= {"block_attention": taught.block_attention} if taught.block_attention else {}
    options |= {ACCEPTANCE: record} if record else {}
    path.write_text(json.dumps(options, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def adapter_options(name_or_path: Any, **hub: Any) -> dict[str, Any]:
    """The options beside an adapter, which `write_adapter_code` wrote; none beside another's."""
    path = file_if_there(str(name_or_path), OPTIONS, may_be_offline=True, **hub)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def forget_swapped(model: Any) -> None:
    """Drops the head and the record of an adapter whose weights PEFT has replaced since (`hotswap_adapter`)."""
    for name, adapter in getattr(model, "peft_config", {}).items():
        taught, now = vars(adapter).get(NUMBERS), some_numbers_of(model, name)
        if taught and now and not torch.allclose(torch.tensor(now), torch.tensor(taught), rtol=0.05, atol=1e-3):
            del vars(adapter)[NUMBERS]
            drop_head(model, adapter)
            record_acceptance(model, None, adapter)
            logger.warning(
                f"The weights of the adapter {name!r} are others now: its draft head and the record of how often its "
                "drafts stand are dropped. `load_adapter(folder, hotswap=True)` reads those of the new one."
            )


def acceptance_of(model: Any) -> dict[str, Any] | None:
    """The record of how often drafts stand: an active adapter's own (None: unknown), or else the model's."""
    places = [*map(vars, active_adapters(model)), vars(model.generation_config)]
    return next((place[ACCEPTANCE] for place in places if ACCEPTANCE in place), None)


def record_acceptance(model: Any, record: dict[str, Any] | None, adapter: Any = None) -> None:
    """Notes how often drafts stand with an adapter, given by its PEFT config, or by default with the model itself; None
    where that is not known."""
    place = vars(model.generation_config if adapter is None else adapter)
    place.pop(ACCEPTANCE, None)
    if record is not None or adapter is not None:
        place[ACCEPTANCE] = record


def hub_keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `from_pretrained` that say how to find a file."""
    return {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}


def tidar_class(stock_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The drafting class of a stock `...ForCausalLM` class of transformers; made once."""
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
    members["_can_set_experts_implementation_cached_value"] = can_choose_experts(stock_class)
    members["forward"] = forward_with_signature_of(stock_class)
    # The stock class's weights are named and initialized by transformers' rules, which pass over custom code.
    members["is_custom_code"] = classmethod(lambda cls: False)
    name = PREFIX + stock_class.__name__
    # Some checkpoints name a tensor differently from the model (GPT-NeoX's head). transformers looks that up by class.
    if (renamings := get_checkpoint_conversion_mapping(stock_class.__name__)) is not None:
        register_checkpoint_conversion_mapping(name, renamings, overwrite=True)
    return type(name, (TiDARMixin, stock_class, GenerationMixin), members)


def forward_with_signature_of(stock_class: type[PreTrainedModel]) -> Any:
    """The mixin's forward with the stock signature and our two keywords, which Trainer and `generate` read."""

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
    """`TiDARQwen3ForCausalLM` and others, so that `auto_map` can name the class of any family (PEP 562)."""
    stock_class = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not (isinstance(stock_class, type) and issubclass(stock_class, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return tidar_class(stock_class)
