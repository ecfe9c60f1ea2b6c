"""A recurrent-depth model in the form of a stock decoder: one forward at full depth, over a stock cache.

TiDAR's drafts thus work as on a stock decoder. Initial states are functions of only their positions (with seed 0), so
a token's logits depend only on its prefix.
B rows, T tokens (the last n of them masks), S slots of the cache, E channels, V vocabulary.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from wavedraft.generation.execution.gated_linear import MaskGate
from wavedraft.generation.recurrent.draws_recurrent import state_hashes
from wavedraft.generation.stock_model import CACHE, one_cache
from wavedraft.modeling_recurrent.cache_recurrent import Window
from wavedraft.modeling_recurrent.looped_recurrent import RecurrentDepthLM
from wavedraft.modeling_recurrent.windows_recurrent import check_positions, positions_of
from wavedraft.modeling_tidar import modeling_tidar
from wavedraft.modeling_tidar.modeling_tidar import tidar_class

if TYPE_CHECKING:
    Looped = RecurrentDepthLM
else:
    Looped = object

_stock_forms: dict[type, type] = {}


def drafting_model(
    plain: RecurrentDepthLM, draft_length: int = 8, mask_embedding_id: int = 0, mask_recurrences: int | None = None
) -> Any:
    """A model that drafts with masks, with a copy of a plain model's weights.

    Args:
        draft_length: K, the tokens of a draft.
        mask_embedding_id: the row of the embedding table for masks.
        mask_recurrences: the number of core steps of masks; None: all.
    """
    if mask_recurrences is not None and not 1 <= mask_recurrences <= plain.config.mean_recurrence:
        raise ValueError(
            f"`mask_recurrences` must be between 1 and {plain.config.mean_recurrence} (the checkpoint's "
            f"`mean_recurrence`), but is {mask_recurrences}."
        )
    config = copy.deepcopy(plain.config)
    config.tidar_config = {
        "draft_length": draft_length,
        "mask_token_id": config.vocab_size,
        "mask_embedding_id": mask_embedding_id,
    }
    with patch.object(modeling_tidar, "refuse_undraftable"):  # the product has no masks for a recurrent depth
        model: Any = tidar_class(stock_decoder_class(type(plain)))._from_config(config, dtype=plain.dtype)
    model.load_state_dict(plain.state_dict())
    model.mask_recurrences = mask_recurrences
    return model.eval()


def stock_decoder_class(plain_class: type[RecurrentDepthLM]) -> type[RecurrentDepthLM]:
    """The stock decoder class for the same checkpoints, created once."""
    if plain_class not in _stock_forms:
        members = {"__module__": __name__, "__doc__": StockDecoder.__doc__}
        _stock_forms[plain_class] = type(plain_class.__name__, (StockDecoder, plain_class), members)
    return _stock_forms[plain_class]


class StockDecoder(Looped):
    """The stock form of a recurrent-depth class, first in its bases: see `stock_decoder_class`.

    Attributes:
        mask_recurrences: the number of core steps of masks; None: all. Clean tokens always take all.
        has_position_table: all positions, including masks', must be below `config.block_size`.
    """

    base_model_prefix = "decoder"
    mask_recurrences: int | None = None
    has_position_table = True
    # Steps then have an ordinary attention mask, in which `num_masks_of` finds the masks.
    _supports_attention_backend = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.decoder = Decoder(self)

    @property
    def num_cache_layers(self) -> int:
        """The number of layers of a stock cache that one forward fills."""
        config = self.config
        num_around = config.n_layers_in_prelude + config.n_layers_in_coda
        return num_around + config.mean_recurrence * config.n_layers_in_recurrent_block

    def decoder_states(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, T, E] input states of the lm_head.

        In training (`model.train()` with gradients), only the last `mean_backprop_depth` core steps have a gradient.

        Args:
            attention_mask: [B, S] of zeros and ones, or a whole mask in the form of the attention implementation.
        """
        depth = self.config.mean_recurrence
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = positions_of(attention_mask, embeds, cache)
        check_positions(self.config, position_ids, cache)
        mask = create_causal_mask(self.config, embeds, attention_mask, cache, position_ids)
        every: Any = None if cache is None else EveryRecurrence(cache, self.config)
        window = Window(self.rotary_at(position_ids, embeds.dtype), mask, self._attention_function(), every)
        seeds = torch.zeros(1, dtype=torch.long, device=embeds.device)
        hashes = state_hashes(seeds, position_ids).expand(embeds.shape[:2])

        input_embeds = self.prelude(None, window, inputs_embeds=embeds)
        states = self.initial_states(input_embeds, hashes=hashes)
        num_masks = num_masks_of(mask) if self.mask_recurrences else 0
        num_clean = embeds.shape[1] - num_masks
        end = min(depth, self.mask_recurrences or depth) if num_masks else depth
        states = self._recur_to(end, states, input_embeds, window)
        if end < depth and num_clean:
            clean, own_embeds = states[:, :num_clean], input_embeds[:, :num_clean]
            with gates_closed(self):
                clean = self._recur_to(depth, clean, own_embeds, self._of_clean(window, position_ids, num_clean), end)
            states = torch.cat([clean, states[:, num_clean:]], dim=1)
        return self.coda_states(states, window)

    def _recur_to(
        self, depth: int, states: torch.Tensor, embeds: torch.Tensor, window: Window, done: int = 0
    ) -> torch.Tensor:
        is_truncated = self.training and torch.is_grad_enabled()
        for recurrence in range(done + 1, depth + 1):
            has_gradient = not is_truncated or recurrence > depth - self.config.mean_backprop_depth
            with torch.set_grad_enabled(torch.is_grad_enabled() and has_gradient):
                states = self.core_step(states, embeds, window, recurrence)
        return states

    def _of_clean(self, window: Window, position_ids: torch.Tensor, num_clean: int) -> Window:
        """The window of only the clean tokens of a forward, which see no masks."""
        mask = window.attention_mask[:, :, :num_clean]
        if window.cache is None:
            mask = mask[..., :num_clean]
        rotary = self.rotary_at(position_ids[:, :num_clean], self.dtype)
        return replace(window, rotary=rotary, attention_mask=mask)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits at full depth, and the loss of `labels` (not shifted).

        `use_cache` without `cache` (or `past_key_values`, its older name) creates a `DynamicCache`.
        """
        cache = one_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache()
        (states,) = self.decoder(input_ids, attention_mask, position_ids, cache, inputs_embeds)
        logits = self.lm_head(slice_logits_to_keep(states, logits_to_keep)).float()
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def write_repository(self, folder: Any) -> None:
        """Writes nothing: the product loads an experiment's weights as the plain model's."""

    # transformers' own `generate`, without the plain class's policies.

    _prepare_generation_config = GenerationMixin._prepare_generation_config
    _sample = GenerationMixin._sample
    _valid_auto_compile_criteria = GenerationMixin._valid_auto_compile_criteria

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        """Creates a cache without a fixed number of layers, as the config's number is too small."""
        if (kind := generation_config.cache_implementation) not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation` must be left out for drafts of a recurrent-depth model, which stores keys "
                f"and values of every recurrence in a growing cache, but is {kind!r}."
            )
        given = model_kwargs.get(CACHE)
        if given is not None and type(given) is not DynamicCache:
            raise ValueError(
                f"`{CACHE}` must be a `DynamicCache` for drafts of a recurrent-depth model, but is a "
                f"{type(given).__name__}. Leave it out, or pass the cache that an earlier call returned."
            )
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache:
            model_kwargs[CACHE] = DynamicCache()


class Decoder(nn.Module):
    """Everything below the lm_head as one module, as in a stock class."""

    def __init__(self, model: StockDecoder):
        super().__init__()
        self.model = (model,)  # in a tuple, so the parent is not registered as a submodule

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
    ) -> tuple[torch.Tensor]:
        """States [B, T, E], the first output of a stock decoder."""
        cache = one_cache(cache, past_key_values) if use_cache else None
        return (self.model[0].decoder_states(input_ids, attention_mask, position_ids, cache, inputs_embeds),)


class EveryRecurrence:
    """A stock cache with the interface of a recurrent-depth cache. Each recurrence of a core layer is a cache layer,
    after the layers of prelude and coda, so a call may stop at any depth."""

    def __init__(self, cache: Cache, config: Any):
        self.cache = cache
        self.num_before, self.num_core = config.n_layers_in_prelude, config.n_layers_in_recurrent_block
        self.num_around = self.num_before + config.n_layers_in_coda

    def write_and_read(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, recurrence: int, window: Window
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `RecurrentCache.write_and_read`."""
        place = layer - self.num_before
        if place >= self.num_core:
            layer -= self.num_core
        elif place >= 0:
            layer = self.num_around + (recurrence - 1) * self.num_core + place
        return self.cache.update(keys, values, layer)


def num_masks_of(mask: Any) -> int:
    """The number of masks at the end of a forward, read from its attention mask [B, 1, T, S].

    The masks of a block see one another; a token never sees the next token. So the first query that sees the next
    position is the first mask. (A block of one mask drafts nothing, and counts as a token.)

    Raises:
        ValueError: the attention mask is not a tensor.
    """
    if mask is None:
        return 0
    if not isinstance(mask, torch.Tensor):
        raise ValueError(
            "`attn_implementation` must be 'sdpa' or 'eager' with `mask_recurrences`, but the attention mask is a "
            f"{type(mask).__name__}. Load the model with one of the two."
        )
    num_queries, num_slots = mask.shape[-2:]
    is_seen = (mask if mask.dtype == torch.bool else mask == 0).any(dim=0)[0]  # [T, S]
    sees_next = is_seen.diagonal(num_slots - num_queries + 1)
    (masks,) = sees_next.nonzero(as_tuple=True)
    return num_queries - int(masks[0]) if len(masks) else 0


@contextmanager
def gates_closed(model: nn.Module) -> Iterator[None]:
    """Closes a gated adapter's gate for clean tokens, inside a forward that also has masks."""
    found = (
        gate
        for module in model.modules()
        for gate in (getattr(module, "gate", None), *(getattr(module, "lora_variant", None) or {}).values())
    )
    gates = {gate: gate.num_masks for gate in found if isinstance(gate, MaskGate)}
    for gate in gates:
        gate.num_masks = 0
    try:
        yield
    finally:
        for gate, num_masks in gates.items():
            gate.num_masks = num_masks
