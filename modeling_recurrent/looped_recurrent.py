"""The base of all recurrent-depth models: windows of tokens, and a forward in three parts.

    e   = prelude(tokens)                        s_0 = initial_states(e)
    s_i = core_step(s_{i-1}, e), i = 1..r        logits = coda(s_r)

Each part can be called alone on a `Window`. `forward` and all decoders run them in this order.
B rows, T tokens, E channels, H heads, D head width, V vocabulary.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils import can_return_tuple

from ..generation.recurrent.draws_recurrent import state_hashes
from ..generation.stock_model import CACHE, has_loaded_adapter, one_cache
from ..hub.hub_repository import HubRepository, keep_own_options, point_config_at
from .cache_recurrent import RecurrentCache, Window
from .generation_recurrent import RecurrentGenerationMixin
from .rotary_recurrent import rotate_halves
from .static_recurrent import StaticParts, StaticRecurrentCache
from .windows_recurrent import RecurrentWindows, attend, check_positions, positions_of

OF_THE_LOSS = {"num_items_in_batch", "ignore_index", "shift_labels"}
OF_GENERATE = {"tokenizer"}  # it hands its own to every forward


class GroupedHeads(nn.Module):
    """Attention with grouped key-value heads and split-half rotary positions: Llama's, OLMo-2's, Ouro's.

    Attributes:
        widths: of a token's queries, keys and values, over all heads.
    """

    is_causal = True

    def __init__(self, config: Any, layer_idx: int, num_heads: int):
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None  # the config sets them
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = num_heads // config.num_key_value_heads
        key_width = config.num_key_value_heads * config.head_dim
        self.widths = [num_heads * config.head_dim, key_width, key_width]

    def mix(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: Window, recurrence: int
    ) -> torch.Tensor:
        """[B, T, widths] to [B, T, H * D], storing keys and values in the window's cache if it has one."""
        window = window.on(query.device)
        query, key, value = (
            heads.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # [B, H, T, D]
            for heads in (query, key, value)
        )
        query, key = rotate_halves(query, window.rotary), rotate_halves(key, window.rotary)
        return attend(self, query, key, value, window, recurrence)


class RecurrentRMSNorm(nn.Module):
    """Root-mean-square norm in fp32, cast back before its weight is applied."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., E] to [..., E]."""
        precise = hidden_states.float()
        squares = (precise * precise).sum(dim=-1, keepdim=True)
        scale = (squares / precise.shape[-1] + self.eps).rsqrt()
        return (precise * scale).to(hidden_states.dtype) * self.weight


class RecurrentMLP(nn.Module):
    """Gated MLP: proj(silu(g) * u), where g and u are halves of one projection."""

    def __init__(self, config: Any, bias: bool = False):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., E] to [..., E]."""
        gate, up = self.fc(hidden_states).chunk(2, dim=-1)
        return self.proj(nn.functional.silu(gate) * up)


def sample_depth(mean_recurrence: int, generator: torch.Generator, sigma: float = 0.5) -> int:
    """1 + Poisson(rate), the rate log-normal with mean `mean_recurrence`: mostly below it, sometimes far above.

    The generator is on the CPU, so drawing waits for no device.
    """
    mean = math.log(mean_recurrence) - sigma**2 / 2
    rate = torch.empty(1).log_normal_(mean, sigma, generator=generator)
    return 1 + int(torch.poisson(rate, generator=generator))


class DepthSampler:
    """The depths of one training run. The same seed gives the same sequence, so all ranks draw equal depths.

    The global generators are not used. To resume a run, save `generator.get_state()` with the checkpoint.
    """

    def __init__(self, mean_recurrence: int, seed: int = 0):
        self.mean_recurrence = mean_recurrence
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> int:
        """Core steps of the next training forward."""
        return sample_depth(self.mean_recurrence, self.generator)


class RecurrentDepthLM(HubRepository, RecurrentGenerationMixin, RecurrentWindows, PreTrainedModel, GenerationMixin):
    """A model that the decoders can run. A subclass must have these, and nothing else:

    * `prelude`, `initial_states`, `core_step` and `coda_states`, as above, and `rotary_at`; attention through `attend`.
      Each returns its result on the window's device, wherever its layers are.
    * `reinjects_input`: the core reads the tokens at every recurrence, so a state stays valid if earlier tokens change.
      Diffusion forcing needs this. The exact wavefront does not: it restarts such positions.
    * `has_random_depth`: training draws the depth of each forward, as the model's own training did.
    * in its config: `n_layers_in_prelude`, `n_layers_in_recurrent_block` and `n_layers_in_coda` (layers that keep keys
      and values), `n_embd`, `num_key_value_heads`, `head_dim`, `block_size`, `vocab_size`, `mean_recurrence` and
      `mean_backprop_depth`, under these names or by `attribute_map`.
    """

    card_kind = "recurrent"
    reinjects_input = True
    has_random_depth = True
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ("cache", "past_key_values", "window")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # transformers looks for its attention interface in the model class's own file; here the layers' files call it.
    _can_set_attn_implementation_cached_value = True
    _supports_attention_backend = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.gradient_checkpointing = False
        keep_own_options(self.generation_config)
        self.depth_sampler = DepthSampler(config.mean_recurrence)

    @classmethod
    def write_code(cls, folder: Path, origin: Path | None = None) -> None:
        """Writes the code a checkpoint needs to load and decode where wavedraft is not installed."""
        cls.files.write_code(cls, folder)
        # `transformers serve` and others look for `architectures[0]` in transformers, which has none of these classes;
        # its auto class finds ours through `auto_map`.
        point_config_at(cls, folder, architecture="AutoModelForCausalLM", config_class=cls.config_class)

    def write_repository(self, folder: Path) -> None:
        """Writes our files beside the weights, but none beside an adapter's weights."""
        if not has_loaded_adapter(self):
            super().write_repository(folder)

    # The three parts.

    def initial_states(
        self,
        input_embeds: torch.Tensor,
        init_scale: float = 1.0,
        generator: torch.Generator | None = None,
        hashes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """s_0 for [B, T, E] prelude outputs, drawn by the generator, or each from its own hash of [B, T] `hashes`."""
        raise NotImplementedError

    def prelude(
        self, input_ids: torch.Tensor | None, window: Window, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """e: [B, T] ids (or their [B, T, E] embeddings) to [B, T, E]."""
        raise NotImplementedError

    def core_step(
        self, latent_states: torch.Tensor, input_embeds: torch.Tensor, window: Window, recurrence: int = 1
    ) -> torch.Tensor:
        """s_i from s_{i-1} and e, [B, T, E]; `recurrence` is i, from 1. (A packed window has one for each token.)"""
        raise NotImplementedError

    def coda(self, latent_states: torch.Tensor, window: Window, logits_to_keep: int | torch.Tensor = 0) -> torch.Tensor:
        """fp32 logits [B, kept, V] of states at any depth, [B, T, E]; `logits_to_keep` as in transformers."""
        states = self.coda_states(latent_states, window)
        return self.lm_head(slice_logits_to_keep(states, logits_to_keep)).to(window.device).float()

    def coda_states(self, latent_states: torch.Tensor, window: Window) -> torch.Tensor:
        """The lm_head's input in `coda`, [B, T, E]."""
        raise NotImplementedError

    def exit_of(
        self, num_recurrences: int, exit_at_step: int | None = None, exit_threshold: float | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What chooses, of states [B, T, R, E] after each core step, those [B, T, E] that tokens are predicted from.
        None for the last.

        Raises:
            ValueError: an exit is asked for, and this model has no gate.
        """
        if exit_at_step is not None or exit_threshold is not None:
            raise ValueError(
                f"`exit_at_step` and `exit_threshold` must be left out, since {type(self).__name__} has no exit gate. "
                f"Use `num_recurrences`, or `policy='adaptive'`."
            )
        return None

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: RecurrentCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        num_recurrences: int | None = None,
        num_backprop: int | None = None,
        init_scale: float = 1.0,
        generator: torch.Generator | None = None,
        state_seeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: RecurrentCache | None = None,
        exit_at_step: int | None = None,
        exit_threshold: float | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits after `num_recurrences` core steps, and the loss of `labels` (not shifted).

        By default `num_recurrences` is the config's `mean_recurrence`. In training (`model.train()`, gradients on)
        `self.depth_sampler` draws it, and the last `num_backprop` core steps (the config's `mean_backprop_depth`)
        carry a gradient. `init_scale` scales the initial states. The generator draws them (in training the global one
        by default). Without one they depend on their positions and on [B] `state_seeds`, by default 0. `use_cache`
        without `cache` (or `past_key_values`) makes one of every recurrence. Hidden states are [prelude output, s_0,
        ... s_r]; attentions [B, H, T, S] are those of each layer's last recurrence. For exits see `exit_of`.
        """
        refuse_unread(self, kwargs)
        cache = one_cache(cache, past_key_values)
        wants_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        is_training = self.training and torch.is_grad_enabled()
        depths = num_recurrences, _ = depths_of(self, num_recurrences, num_backprop, is_training)
        find_exit = self.exit_of(num_recurrences, exit_at_step, exit_threshold)
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None and not (is_training and self.gradient_checkpointing):
            cache = cache_for(self.config, embeds, num_recurrences)
        position_ids = positions_of(attention_mask, embeds, cache) if position_ids is None else position_ids
        parts, window = parts_and_window(self, embeds, attention_mask, position_ids, cache, bool(wants_attentions))
        input_embeds = parts.prelude(None, window, inputs_embeds=embeds)
        has_hashes = generator is None and init_scale and (state_seeds is not None or not is_training)
        hashes = hashes_at(position_ids, embeds, state_seeds) if has_hashes else None
        latent_states = self.initial_states(input_embeds, init_scale, generator, hashes)
        trajectory = [input_embeds, latent_states]
        latent_states = recurred(parts, trajectory, window, *depths, bool(wants_states), find_exit)
        logits = parts.coda(latent_states, window, logits_to_keep)
        if cache is not None:
            cache.lengths = [window.kv_length] * cache.batch_size
            cache.note_depth(num_recurrences)
        return CausalLMOutputWithPast(
            loss=None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs),
            logits=logits,
            hidden_states=tuple(trajectory) if wants_states else None,
            attentions=tuple(window.attentions[i] for i in sorted(window.attentions)) if wants_attentions else None,
            **{CACHE: cache},
        )


def parts_and_window(
    model: Any,
    embeds: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor,
    cache: Any,
    wants_attentions: bool,
) -> tuple[Any, Any]:
    """The parts that a forward calls, and their window: the model's own, or static ones for one token."""
    check_positions(model.config, position_ids, cache)
    if is_next_token(cache, embeds, attention_mask) and not wants_attentions:
        parts = StaticParts(model, cache.compiled)
        return parts, parts.window_behind(attention_mask, position_ids, cache)
    return model, model.padded_window(embeds, attention_mask, position_ids, cache, wants_attentions)


def recurred(
    parts: Any,
    trajectory: list[torch.Tensor],
    window: Window,
    num_recurrences: int,
    num_backprop: int,
    keeps_states: bool,
    find_exit: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The states s_r after core steps from `trajectory`, [e, s_0]. `keeps_states` adds each s_i to it.

    With `find_exit` (`exit_of`), the states that tokens exit with.
    """
    input_embeds, latent_states = trajectory
    keeps_states = keeps_states or find_exit is not None
    if not keeps_states and not torch.is_grad_enabled():
        return parts.core_steps(latent_states, input_embeds, window, num_recurrences)
    for recurrence in range(1, num_recurrences + 1):
        with torch.set_grad_enabled(torch.is_grad_enabled() and recurrence > num_recurrences - num_backprop):
            latent_states = parts.core_step(latent_states, input_embeds, window, recurrence)
        if keeps_states:
            trajectory.append(latent_states)
    return latent_states if find_exit is None else find_exit(torch.stack(trajectory[2:], dim=2))


def cache_for(config: Any, embeds: torch.Tensor, num_recurrences: int) -> RecurrentCache:
    """An empty cache with room for [B, T, E] embeddings, of every recurrence."""
    batch_size, length = embeds.shape[:2]
    return RecurrentCache.every_recurrence(config, batch_size, length, num_recurrences, embeds.dtype, embeds.device)


def refuse_unread(model: Any, given: dict[str, Any]) -> None:
    """Raises ValueError for a keyword that neither a forward nor its loss reads."""
    if unread := [name for name in given if name not in OF_THE_LOSS | OF_GENERATE and given[name] is not None]:
        raise ValueError(
            f"`{unread[0]}` must be left out: the forward of {type(model).__name__} does not read it. Core passes are "
            f"counted by `num_recurrences`."
        )


def depths_of(model: Any, num_recurrences: int | None, num_backprop: int | None, is_training: bool) -> tuple[int, int]:
    """The core steps of a forward, and how many of the last carry a gradient.

    Raises:
        ValueError: one of them is below 1.
    """
    if num_recurrences is None:
        is_drawn = is_training and model.has_random_depth
        num_recurrences = model.depth_sampler.draw() if is_drawn else model.config.mean_recurrence
    if num_backprop is None:
        num_backprop = model.config.mean_backprop_depth if is_training else num_recurrences
    for name, count in (("num_recurrences", num_recurrences), ("num_backprop", num_backprop)):
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1 (core passes of a token), but is {count}.")
    return num_recurrences, num_backprop


def hashes_at(position_ids: torch.Tensor, embeds: torch.Tensor, state_seeds: torch.Tensor | None) -> torch.Tensor:
    """Hashes [B, T] of positions and row seeds [B], which determine initial states."""
    seeds = torch.zeros(1, dtype=torch.long, device=embeds.device) if state_seeds is None else state_seeds
    return state_hashes(seeds, position_ids).expand(embeds.shape[:2])


def is_next_token(cache: RecurrentCache | None, embeds: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Whether a forward continues a static cache by one token per row."""
    has_mask = attention_mask is None or attention_mask.dim() == 2
    continues_cache = isinstance(cache, StaticRecurrentCache) and bool(cache.get_seq_length()) and embeds.shape[1] == 1
    return continues_cache and has_mask and not torch.is_grad_enabled()
