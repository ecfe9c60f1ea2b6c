"""A recurrent-depth model in the form of a stock decoder: one forward at full depth, over a stock cache.

So whatever works on a stock decoder works on it: transformers' own `generate`, and TiDAR's drafts. States begin as
functions of their positions alone (those of seed 0), so that a token's logits depend on nothing but its prefix.
B rows, T tokens (the last n of them masks), E channels, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from ..generation.cache_name import CACHE, one_cache
from ..generation.execution.mask_gate import MaskGate, adapted_layers
from ..generation.recurrent.draws_recurrent import state_hashes
from .cache_recurrent import Window
from .looped_recurrent import RecurrentDepthLM, positions_of

if TYPE_CHECKING:
    Looped = RecurrentDepthLM
else:
    Looped = object


class EveryRecurrence:
    """A stock cache as the window of a recurrent-depth model sees it: each recurrence of a core layer is a layer of its
    own there, behind those of prelude and coda, so that a call may stop at any depth."""

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


class StockDecoder(Looped):
    """The stock form of a recurrent-depth class, in front of it: see `stock_decoder_class`.

    Where the config holds a `tidar_config` with `mask_recurrences`, the masks of a forward leave its core after that
    many; clean tokens always go through all of them.

    Attributes:
        plain_class: the class whose stock form this is.
        has_position_table: no position may reach `config.block_size`, a mask's neither.
    """

    plain_class: type[RecurrentDepthLM]
    has_position_table = True

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.last_states = nn.Identity()  # where what the lm_head reads can be caught

    @property
    def num_cache_layers(self) -> int:
        """Layers of a stock cache that one forward fills."""
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
        num_recurrences: int | None = None,
        num_masks: int = 0,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, T, E] states that the lm_head reads.

        In training (`model.train()`, gradients on) the last `mean_backprop_depth` core steps carry a gradient.

        Args:
            attention_mask: [B, S] of zeros and ones, or a whole mask in the form of the attention implementation.
            num_recurrences: core steps; the config's `mean_recurrence` where absent.
            num_masks: n.
        """
        config = self.config
        depth = num_recurrences or config.mean_recurrence
        stops_at = min(depth, (getattr(config, "tidar_config", None) or {}).get("mask_recurrences") or depth)
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = positions_of(attention_mask, embeds, cache)
        self._check_positions(position_ids, cache)
        mask = create_causal_mask(config, embeds, attention_mask, cache, position_ids)
        every: Any = None if cache is None else EveryRecurrence(cache, config)
        window = Window(self.rotary_at(position_ids, embeds.dtype), mask, self._attention_function(), every)
        seeds = torch.zeros(1, dtype=torch.long, device=embeds.device)
        hashes = state_hashes(seeds, position_ids).expand(embeds.shape[:2])

        input_embeds = self.prelude(None, window, inputs_embeds=embeds)
        states = self.initial_states(input_embeds, hashes=hashes)
        num_clean, end = embeds.shape[1] - num_masks, stops_at if num_masks else depth
        states = self._recur_to(end, states, input_embeds, window)
        if end < depth and num_clean:
            clean, own_embeds = states[:, :num_clean], input_embeds[:, :num_clean]
            with masks_left_alone(self):
                clean = self._recur_to(depth, clean, own_embeds, self._of_clean(window, position_ids, num_clean), end)
            states = torch.cat([clean, states[:, num_clean:]], dim=1)
        return self.last_states(self.coda_states(states, window))

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
        """The window of a forward's clean tokens alone, which see no masks."""
        mask = window.attention_mask
        if not isinstance(mask, torch.Tensor):
            raise ValueError(
                "`attn_implementation` must be 'sdpa' or 'eager' where masks leave the core early "
                f"(`mask_recurrences`), but is {self.config._attn_implementation!r}, whose masks are compiled for a "
                "width. Load the model with one of them."
            )
        mask = mask[:, :, :num_clean] if window.cache is not None else mask[:, :, :num_clean, :num_clean]
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
        num_masks: int = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits at full depth, and the loss of `labels` (not shifted); the last `num_masks` of the tokens are masks.

        `use_cache` without `cache` (or `past_key_values`, its older name) makes a `DynamicCache`.
        """
        cache = one_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache()
        states = self.decoder_states(input_ids, attention_mask, position_ids, cache, inputs_embeds, num_masks=num_masks)
        logits = self.lm_head(slice_logits_to_keep(states, logits_to_keep)).float()
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    # transformers' own `generate`, where the plain class has its policies.

    _prepare_generation_config = GenerationMixin._prepare_generation_config
    _sample = GenerationMixin._sample
    _valid_auto_compile_criteria = GenerationMixin._valid_auto_compile_criteria

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        """A cache that grows by layers too: transformers counts those of the config."""
        if (kind := generation_config.cache_implementation) not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation` must be left out for the drafts of a recurrent-depth model, whose every "
                f"recurrence has keys and values of its own in a cache that grows, but is {kind!r}."
            )
        given = model_kwargs.get(CACHE)
        if given is not None and type(given) is not DynamicCache:
            raise ValueError(
                f"`{CACHE}` must be a `DynamicCache` for the drafts of a recurrent-depth model, but is a "
                f"{type(given).__name__}. Leave it out, or pass the one an earlier call returned."
            )
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache:
            model_kwargs[CACHE] = DynamicCache()


@contextmanager
def masks_left_alone(model: nn.Module) -> Iterator[None]:
    """Closes a gated adapter's gate for calls of clean tokens within a forward of masks too."""
    variants = (variant for layer in adapted_layers(model) for variant in layer.lora_variant.values())
    gates = {variant: variant.num_masks for variant in variants if isinstance(variant, MaskGate)}
    for gate in gates:
        gate.num_masks = 0
    try:
        yield
    finally:
        for gate, num_masks in gates.items():
            gate.num_masks = num_masks


_stock_forms: dict[type, type] = {}


def stock_decoder_class(plain_class: type[RecurrentDepthLM]) -> type[RecurrentDepthLM]:
    """The class of the same checkpoints, and the same name, in the form of a stock decoder; made once."""
    if plain_class not in _stock_forms:
        members = {"plain_class": plain_class, "__module__": __name__, "__doc__": StockDecoder.__doc__}
        _stock_forms[plain_class] = type(plain_class.__name__, (StockDecoder, plain_class), members)
    return _stock_forms[plain_class]
