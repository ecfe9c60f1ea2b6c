"""What every recurrent-depth model shares: windows of tokens, and a forward over three parts.

    e   = prelude(tokens)                        s_0 = initial_states(e)
    s_i = core_step(s_{i-1}, e), i = 1..r        logits = coda(s_r)

Each part is callable alone on a `Window`; `forward` runs them in this order and so does every decoder.
B rows, T tokens, E channels, H heads, D head width, V vocabulary.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.utils import can_return_tuple

from ..generation.recurrent.draws_recurrent import state_hashes
from ..generation.stock_model import CACHE, attend_by, attention_of, device_of, has_loaded_adapter, one_cache
from ..hub.hub_repository import HubRepository, keep_own_options, point_config_at
from .cache_recurrent import Packing, RecurrentCache, Window
from .generation_recurrent import RecurrentGenerationMixin
from .rotary_recurrent import rotate_halves
from .static_recurrent import StaticParts, StaticRecurrentCache

# On a CPU a token rounds otherwise beside others than alone: products of one to three tokens sum in another order than
# of more; attention of a number of queries that is no multiple of 4, or of keys that is none of 16, in another than of
# others, and of more than 192 keys until there are 384. A wavefront filled up to such multiples gives each row the bits
# it has alone, in float32. (Measured on products of 24 to 5280 channels and up to 2048 tokens, by one and two threads.)
FILL, FILL_KEYS, MANY_KEYS, FILL_MANY_KEYS = 4, 16, 192, 512


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: Window, recurrence: int
) -> torch.Tensor:
    """[B, H, T, D] queries over their own and the cached keys and values ([B, key-value heads, T, D]) to [B, T, H * D].

    `module` has the `config`, the `layer_idx` (counted through prelude, core and coda) and the `scaling`.
    """
    function, mask = window.attention_function, window.attention_mask
    options = {"scaling": module.scaling, "dropout": 0.0}
    packing = window.packing
    if packing is not None:
        assert window.cache is not None
        window.cache.write_packed(key, value, module.layer_idx, window)
        read = [window.cache.read_run(module.layer_idx, run, window.kv_length) for run in packing.runs]
        if mask is None or isinstance(mask, torch.Tensor):  # run by run, so that what is read is not copied
            masks = [mask if mask is None else mask[run.tokens] for run in packing.runs]
            runs = zip(packing.runs, read, masks, strict=True)
            mixed = [function(module, query[run.tokens], *seen, own, **options)[0] for run, seen, own in runs]
            return torch.cat(mixed).flatten(2)
        key, value = (torch.cat(tensors) for tensors in zip(*read, strict=True))  # a BlockMask is of all tokens
    elif window.cache is not None:
        key, value = window.cache.write_and_read(key, value, module.layer_idx, recurrence, window)
    mixed, weights = function(module, query, key, value, mask, **options)
    if window.attentions is not None:
        window.attentions[module.layer_idx] = weights
    return mixed.flatten(2)


class GroupedHeads(nn.Module):
    """What attention with grouped key-value heads and split-half rotary positions shares: Llama's, OLMo-2's, Ouro's.

    Attributes:
        widths: of a token's queries, keys and values, all heads side by side.
    """

    is_causal = True

    def __init__(self, config: Any, layer_idx: int, num_heads: int):
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None  # the config fills them
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


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the implementation named "eager", which also returns its weights."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


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
    """Gated MLP: proj(silu(g) * u), g and u the halves of one projection."""

    def __init__(self, config: Any, bias: bool = False):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., E] to [..., E]."""
        gate, up = self.fc(hidden_states).chunk(2, dim=-1)
        return self.proj(nn.functional.silu(gate) * up)


def sample_depth(mean_recurrence: int, generator: torch.Generator, sigma: float = 0.5) -> int:
    """1 + Poisson(rate), the rate log-normal with mean `mean_recurrence`: mostly less, at times far more.

    The generator stands on the CPU, so that drawing waits for no device.
    """
    mean = math.log(mean_recurrence) - sigma**2 / 2
    rate = torch.empty(1).log_normal_(mean, sigma, generator=generator)
    return 1 + int(torch.poisson(rate, generator=generator))


class DepthSampler:
    """The depths of one training run: the same sequence wherever the seed is the same, so that all ranks keep step.

    The global generators are neither read nor moved. To resume a run where it stopped, keep
    `generator.get_state()` beside the checkpoint.
    """

    def __init__(self, mean_recurrence: int, seed: int = 0):
        self.mean_recurrence = mean_recurrence
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> int:
        """Core steps of the next training forward."""
        return sample_depth(self.mean_recurrence, self.generator)


class RecurrentDepthLM(HubRepository, RecurrentGenerationMixin, PreTrainedModel, GenerationMixin):
    """A model the decoders can serve. A model of the family is a subclass with these, and nothing more is asked of it:

    * `prelude`, `initial_states`, `core_step` and `coda_states`, as above, and `rotary_at`; attention through `attend`.
      Each gives its result on the window's device, wherever its layers are.
    * `reinjects_input`: the core sees the tokens at every recurrence, so that a state survives a change of tokens
      before it. Diffusion forcing needs it; the exact wavefront begins such positions anew and does without.
    * `has_random_depth`: training draws the depth of each forward, as the model's own training did.
    * in its config `n_layers_in_prelude`, `n_layers_in_recurrent_block` and `n_layers_in_coda` (layers that keep keys
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
        """Writes all that stands beside the weights; nothing of ours beside those of an adapter."""
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
        """s_0 for [B, T, E] prelude outputs, drawn by the generator; with [B, T] hashes, each a function of its own."""
        raise NotImplementedError

    def prelude(
        self, input_ids: torch.Tensor | None, window: Window, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """e: [B, T] ids (or their [B, T, E] embeddings) to [B, T, E]."""
        raise NotImplementedError

    def core_step(
        self, latent_states: torch.Tensor, input_embeds: torch.Tensor, window: Window, recurrence: int = 1
    ) -> torch.Tensor:
        """s_i of s_{i-1} and e, both [B, T, E]; `recurrence` is i, from 1. (A packed window has one for each token.)"""
        raise NotImplementedError

    def coda(self, latent_states: torch.Tensor, window: Window, logits_to_keep: int | torch.Tensor = 0) -> torch.Tensor:
        """fp32 logits [B, kept, V] of states at any depth, [B, T, E]; `logits_to_keep` as in transformers."""
        states = self.coda_states(latent_states, window)
        return self.lm_head(slice_logits_to_keep(states, logits_to_keep)).to(window.device).float()

    def coda_states(self, latent_states: torch.Tensor, window: Window) -> torch.Tensor:
        """What `coda` gives to the lm_head, [B, T, E]."""
        raise NotImplementedError

    def rotary_at(self, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the model's attention rotates queries and keys by at positions [B, T], for states of `dtype`."""
        raise NotImplementedError

    # Windows: which tokens a call works on.

    def padded_width(self, width: int) -> int:
        """The width a wavefront is computed at: the next power of two on an accelerator, where repeating shapes are
        worth more than the arithmetic; on the CPU, where arithmetic is what costs, `filled_width`."""
        return self.filled_width(width) if device_of(self).type == "cpu" else 1 << (width - 1).bit_length()

    def filled_width(self, width: int) -> int:
        """Tokens of a row to compute so that each comes out as it would beside others: see `FILL`."""
        return -(-width // FILL) * FILL if device_of(self).type == "cpu" else width

    def padded_window(
        self,
        input_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: RecurrentCache | None,
        keeps_attentions: bool = False,
    ) -> Window:
        """The next T columns of every row, [B, T, ...] giving the shape; padding is told by a 2D (or a 4D) mask.

        Attentions are kept by attention written out, whatever the implementation: no other holds the weights.
        """
        length = input_embeds.shape[1]
        start = cache.get_seq_length() if cache is not None else 0
        config, function = self.config, self._attention_function()
        attentions: dict[int, torch.Tensor] | None = None
        if keeps_attentions:
            config, function, attentions = copy.copy(config), eager_attention, {}
            attend_by(config, "eager")
        mask = create_causal_mask(config, input_embeds, attention_mask, cache, position_ids)
        if cache is not None:
            cache.reserve(start + length)
        rotary = self.rotary_at(position_ids, input_embeds.dtype)
        columns = slice(start, start + length)
        return Window(rotary, mask, function, cache, columns, start + length, attentions=attentions)

    def filled_window(self, starts: list[int], length: int, cache: RecurrentCache) -> Window:
        """`window_at` that reads so many columns that their number does not tell in the result: see `FILL`."""
        kv_length = max(starts) + length
        if device_of(self).type == "cpu" and attention_of(self.config) in ("sdpa", "eager"):
            multiple = FILL_KEYS if kv_length <= MANY_KEYS else FILL_MANY_KEYS
            kv_length = -(-kv_length // multiple) * multiple
        return self.window_at(starts, length, cache, kv_length)

    def window_at(self, starts: list[int], length: int, cache: RecurrentCache, kv_length: int | None = None) -> Window:
        """`length` tokens of each cache row from position starts[row] on; rows are unpadded: column is position.

        `kv_length` columns are read: those up to the last token, or more.
        """
        device = cache.device
        position_ids = torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
        kv_length = kv_length or max(starts) + length
        cache.reserve(kv_length)
        rotary = self.rotary_at(position_ids, cache.dtype)
        if min(starts) == max(starts):
            mask = self._mask(position_ids, kv_length, cache.dtype, starts[0])
            columns = slice(starts[0], starts[0] + length)
            return Window(rotary, mask, self._attention_function(), cache, columns, kv_length)
        mask = self._mask(position_ids, kv_length, cache.dtype)
        rows = torch.arange(len(starts), device=device)[:, None]
        return Window(rotary, mask, self._attention_function(), cache, (rows, position_ids), kv_length)

    def packed_window(self, rows: list[int], positions: list[int], cache: RecurrentCache) -> Window:
        """N single tokens, [N, 1] in every call: token n stands at positions[n] of cache row rows[n].

        For the prelude and the coda; `Window.at` gives that of a `core_step`.
        """
        device = cache.device
        index = torch.tensor([rows, positions], device=device)[:, :, None]  # [2, N, 1]
        kv_length = max(positions) + 1
        cache.reserve(kv_length)
        mask = self._mask(index[1], kv_length, cache.dtype) if min(positions) < max(positions) else None
        rotary = self.rotary_at(index[1], cache.dtype)
        packing = Packing.of(rows)
        return Window(rotary, mask, self._attention_function(), cache, (index[0], index[1]), kv_length, packing)

    def _attention_function(self) -> Callable:
        """Looked up once a window: a config takes its time to answer."""
        return ALL_ATTENTION_FUNCTIONS.get_interface(attention_of(self.config), eager_attention)

    def _mask(self, position_ids: torch.Tensor, kv_length: int, dtype: torch.dtype, start: int | None = None) -> Any:
        """What lets tokens at [B, T] positions see the columns up to their own; `start` where all rows begin there."""
        num_rows, length = position_ids.shape
        implementation = attention_of(self.config)
        if "flash" in implementation and start is None:
            raise ValueError(
                f"`attn_implementation` must be 'sdpa', 'eager' or 'flex_attention' to decode rows of different length "
                f"or depth in one call, but is {implementation!r}, which knows no masks. "
                f"Call `model.set_attn_implementation('sdpa')`, or give one row at a time."
            )
        if implementation in ("sdpa", "eager") and (start != 0 or kv_length > length):  # a wavefront's: by hand
            if length == 1 and start is not None:
                return None
            columns = torch.arange(kv_length, device=position_ids.device)
            is_hidden = columns > position_ids[: 1 if start is not None else None, None, :, None]
            mask = torch.zeros(is_hidden.shape, dtype=dtype, device=position_ids.device)
            return mask.masked_fill_(is_hidden, -torch.inf)
        is_seen = causal_mask_function if start is not None else lambda b, head, q, column: column <= position_ids[b, q]
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=num_rows,
            q_length=length,
            kv_length=kv_length,
            q_offset=start or 0,
            mask_function=is_seen,
            attention_mask=None,
            allow_is_causal_skip=start is not None,
            dtype=dtype,
            device=position_ids.device,
            config=self.config,
            use_vmap=False,
        )

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits after `num_recurrences` core steps, and the loss of `labels` (not shifted).

        Where `num_recurrences` is absent, it is the config's `mean_recurrence`; in training (`model.train()`,
        gradients on) `self.depth_sampler` draws it. Of a training forward's core steps the last `num_backprop`
        (the config's `mean_backprop_depth` where absent) carry a gradient; outside training all do. `init_scale` is
        that of the initial states, 0 making them zeros. In training the generator (where absent, the global one)
        draws them; outside, where none is given, they are a function of their positions and of [B] `state_seeds`
        (where absent, of 0), so that the forward is deterministic. `use_cache` without `cache` (or `past_key_values`,
        its older name) makes one of every recurrence. Hidden states are [prelude output, s_0, s_1, ... s_r]; attentions
        those of each layer, [B, H, T, S], at its last recurrence.
        """
        cache = one_cache(cache, past_key_values)
        wants_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        is_training = self.training and torch.is_grad_enabled()
        if num_recurrences is None:
            is_drawn = is_training and self.has_random_depth
            num_recurrences = self.depth_sampler.draw() if is_drawn else self.config.mean_recurrence
        if num_backprop is None:
            num_backprop = self.config.mean_backprop_depth if is_training else num_recurrences
        for name, count in (("num_recurrences", num_recurrences), ("num_backprop", num_backprop)):
            if count < 1:
                raise ValueError(f"`{name}` must be at least 1 (core passes of a token), but is {count}.")
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None and not (is_training and self.gradient_checkpointing):
            cache = RecurrentCache.every_recurrence(
                self.config, embeds.shape[0], embeds.shape[1], num_recurrences, embeds.dtype, embeds.device
            )
        if position_ids is None:
            position_ids = positions_of(attention_mask, embeds, cache)
        self._check_positions(position_ids, cache)
        parts: Any = self
        if is_next_token(cache, embeds, attention_mask) and not wants_attentions:
            parts = StaticParts(self, cache.compiled)
            window = parts.window_behind(attention_mask, position_ids, cache)
        else:
            window = self.padded_window(embeds, attention_mask, position_ids, cache, bool(wants_attentions))

        input_embeds = parts.prelude(None, window, inputs_embeds=embeds)
        hashes = None
        if generator is None and init_scale and (state_seeds is not None or not is_training):
            seeds = torch.zeros(1, dtype=torch.long, device=embeds.device) if state_seeds is None else state_seeds
            hashes = state_hashes(seeds, position_ids).expand(embeds.shape[:2])
        latent_states = self.initial_states(input_embeds, init_scale, generator, hashes)
        trajectory = [input_embeds, latent_states]
        for recurrence in range(1, num_recurrences + 1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and recurrence > num_recurrences - num_backprop):
                latent_states = parts.core_step(latent_states, input_embeds, window, recurrence)
            if wants_states:
                trajectory.append(latent_states)
        logits = parts.coda(latent_states, window, logits_to_keep)

        if cache is not None:
            cache.lengths = [window.kv_length] * cache.batch_size
            cache.note_depth(num_recurrences)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=tuple(trajectory) if wants_states else None,
            attentions=tuple(window.attentions[i] for i in sorted(window.attentions)) if wants_attentions else None,
            **{CACHE: cache},
        )

    def _check_positions(self, position_ids: torch.Tensor, cache: Cache | None) -> None:
        past = cache.get_seq_length() if cache is not None else 0
        if past + position_ids.shape[1] > self.config.block_size and position_ids.max() >= self.config.block_size:
            raise ValueError(
                f"Positions must be below {self.config.block_size}, the length this checkpoint was trained for "
                f"(`config.block_size`), but reach {int(position_ids.max())}. Shorten the input."
            )


def is_next_token(cache: RecurrentCache | None, embeds: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Whether a forward goes on from a static cache by one token a row."""
    has_mask = attention_mask is None or attention_mask.dim() == 2
    goes_on = isinstance(cache, StaticRecurrentCache) and bool(cache.get_seq_length()) and embeds.shape[1] == 1
    return goes_on and has_mask and not torch.is_grad_enabled()


def positions_of(attention_mask: torch.Tensor | None, embeds: torch.Tensor, cache: Cache | None) -> torch.Tensor:
    """Position of each of the next T tokens: columns from the left, padding not counted. [B, T] or [1, T]."""
    length = embeds.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    start = cache.get_seq_length() if cache is not None else 0
    return torch.arange(start, start + length, device=embeds.device)[None]
