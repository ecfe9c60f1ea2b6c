"""A recurrent-depth language model: prelude, a core of shared weights run many times, coda (Huginn, arXiv 2502.05171).

    e   = prelude(tokens)                        s_0 ~ truncated normal, or zeros
    s_i = core_step(s_{i-1}, e), i = 1..r        logits = coda(s_r)

Each part is callable alone on a `Window` of tokens; `forward` runs them in this order and so does every decoder.
B rows, T tokens, E channels, H heads, D head width, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep

from .cache_recurrent import Packing, RecurrentCache, Window
from .configuration_recurrent import RecurrentDepthConfig
from .generation_recurrent import RecurrentGenerationMixin


def rotary_table(config: RecurrentDepthConfig, device: torch.device | str | None = None) -> torch.Tensor:
    """Cosines and sines of every position, [1, positions, 1, D/2, 2] in fp32: the checkpoint's `freqs_cis`."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    positions = torch.arange(config.block_size, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / config.rope_base**exponents)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None]


def paired_rotary(rotary: torch.Tensor) -> torch.Tensor:
    """[..., D/2, 2] cosines and sines as `rotate_pairs` takes them: cosines, then sines signed for their channel.

    [B, T, 1, D/2, 2] to [2, B, T, 1, 1, D], the two single axes standing for query or key, and for the heads.
    """
    cos, sin = rotary.unbind(-1)
    signed = torch.stack([-sin, sin], dim=-1).flatten(-2)
    return torch.stack([cos.repeat_interleave(2, dim=-1), signed])[:, :, :, None]


def rotate_pairs(heads: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate adjacent pairs (even channel real, odd imaginary) of [B, T, 2, H, D] in fp32."""
    cos, sin = rotary
    precise = heads.float()
    swapped = precise.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(precise * cos, swapped, sin).to(heads.dtype)


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


class RecurrentAttention(nn.Module):
    """Causal multi-head attention with a bias on queries and keys before the rotation."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: RecurrentDepthConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.Wqkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, config.n_heads, config.head_dim)) if config.qk_bias else None
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, hidden_states: torch.Tensor, window: Window, recurrence: int) -> torch.Tensor:
        """[B, T, E] to [B, T, E], storing keys and values in the window's cache if it has one."""
        rows, length = hidden_states.shape[:2]
        qkv = self.Wqkv(hidden_states).view(rows, length, 3, -1, self.head_dim)
        query_key, value = qkv[:, :, :2], qkv[:, :, 2]  # [B, T, 2, H, D], [B, T, H, D]
        if self.qk_bias is not None:
            query_key = query_key + self.qk_bias[:, 0]
        query_key = rotate_pairs(query_key, window.rotary)
        query, key = (heads.transpose(1, 2) for heads in query_key.unbind(2))  # [B, H, T, D]
        value = value.transpose(1, 2)
        if window.cache is not None:
            key, value = window.cache.write_and_read(key, value, self.layer_idx, recurrence, window)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, _ = attend(self, query, key, value, window.attention_mask, scaling=self.scaling, dropout=0.0)
        return self.proj(mixed.reshape(rows, length, -1))


class RecurrentMLP(nn.Module):
    """Gated MLP: proj(silu(g) * u), g and u the halves of one projection."""

    def __init__(self, config: RecurrentDepthConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=config.bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., E] to [..., E]."""
        gate, up = self.fc(hidden_states).chunk(2, dim=-1)
        return self.proj(nn.functional.silu(gate) * up)


class SandwichBlock(GradientCheckpointingLayer):
    """A layer that norms its residual stream too: x = n2(x + attn(n1(x))); x = n4(x + mlp(n3(x)))."""

    def __init__(self, config: RecurrentDepthConfig, layer_idx: int):
        super().__init__()
        self.norm_1 = RecurrentRMSNorm(config.n_embd, config.norm_eps)
        self.attn = RecurrentAttention(config, layer_idx)
        self.norm_2 = RecurrentRMSNorm(config.n_embd, config.norm_eps)
        self.norm_3 = RecurrentRMSNorm(config.n_embd, config.norm_eps)
        self.mlp = RecurrentMLP(config)
        self.norm_4 = RecurrentRMSNorm(config.n_embd, config.norm_eps)

    def forward(self, hidden_states: torch.Tensor, window: Window, recurrence: int = 1) -> torch.Tensor:
        """[B, T, E] to [B, T, E]."""
        hidden_states = self.norm_2(hidden_states + self.attn(self.norm_1(hidden_states), window, recurrence))
        return self.norm_4(hidden_states + self.mlp(self.norm_3(hidden_states)))


class RecurrentDepthPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, initialise and dispatch the model."""

    config_class = RecurrentDepthConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ("SandwichBlock",)
    _skip_keys_device_placement = ("past_key_values", "window")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.init_std
        if isinstance(module, nn.Linear):
            is_output = module.out_features == self.config.n_embd and not hasattr(module, "is_adapter")
            init.trunc_normal_(
                module.weight,
                std=std / math.sqrt(2 * self.config.effective_depth) if is_output else std,
                a=-3 * std,
                b=3 * std,
            )
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        elif isinstance(module, RecurrentRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, RecurrentAttention) and module.qk_bias is not None:
            init.zeros_(module.qk_bias)
        if getattr(module, "freqs_cis", None) is not None:
            init.copy_(module.freqs_cis, rotary_table(self.config, module.freqs_cis.device))


class RecurrentDepthForCausalLM(RecurrentGenerationMixin, RecurrentDepthPreTrainedModel, GenerationMixin):
    """Huginn: sandwich blocks, the prelude's output injected at every recurrence, one final norm used twice."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012 (transformers reads a plain dict)

    _keys_to_ignore_on_load_missing = ("freqs_cis",)  # older files lack it; it is recomputed

    reinjects_input = True  # the core sees the tokens at every recurrence, so a state survives a change of its token

    def __init__(self, config: RecurrentDepthConfig):
        super().__init__(config)
        num_prelude, num_core = config.n_layers_in_prelude, config.n_layers_in_recurrent_block
        layers = [SandwichBlock(config, i) for i in range(num_prelude + num_core + config.n_layers_in_coda)]
        adapter = nn.Linear(2 * config.n_embd, config.n_embd, bias=config.bias)
        adapter.is_adapter = True
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "prelude": nn.ModuleList(layers[:num_prelude]),
                "adapter": adapter,
                "core_block": nn.ModuleList(layers[num_prelude : num_prelude + num_core]),
                "coda": nn.ModuleList(layers[num_prelude + num_core :]),
                "ln_f": RecurrentRMSNorm(config.n_embd, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.register_buffer("freqs_cis", rotary_table(config), persistent=True)
        self.post_init()

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Move or cast the model, its rotary table staying fp32: positions beyond 256 have no bf16."""
        super()._apply(fn, recurse)
        if self.freqs_cis.dtype != torch.float32:
            self.freqs_cis = rotary_table(self.config, self.freqs_cis.device)
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.transformer["wte"] = value

    # The three parts.

    def initial_states(
        self, input_embeds: torch.Tensor, init_scale: float = 1.0, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """s_0 for [B, T, E] prelude outputs: truncated normal times `init_scale` (0: zeros)."""
        if init_scale == 0:
            return torch.zeros_like(input_embeds)
        drawn = torch.empty(input_embeds.shape, dtype=torch.float32, device=input_embeds.device)
        nn.init.trunc_normal_(drawn, std=1.0, a=-3.0, b=3.0, generator=generator)
        return (drawn * (init_scale * self.config.init_std * self.config.embed_scale)).to(input_embeds.dtype)

    def prelude(
        self, input_ids: torch.Tensor | None, window: Window, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """e = P(tokens): [B, T] ids (or their [B, T, E] embeddings, not yet scaled) to [B, T, E]."""
        if inputs_embeds is None:
            inputs_embeds = self.transformer["wte"](input_ids)
        hidden_states = inputs_embeds * self.config.embed_scale
        for block in self.transformer["prelude"]:
            hidden_states = block(hidden_states, window)
        return hidden_states

    def core_step(
        self, latent_states: torch.Tensor, input_embeds: torch.Tensor, window: Window, recurrence: int = 1
    ) -> torch.Tensor:
        """s_i = R(s_{i-1}, e), both [B, T, E]; `recurrence` is i, from 1. (A packed window has one for each token.)"""
        hidden_states = self.transformer["adapter"](torch.cat([latent_states, input_embeds], dim=-1))
        for block in self.transformer["core_block"]:
            hidden_states = block(hidden_states, window, recurrence)
        return hidden_states

    def coda(self, latent_states: torch.Tensor, window: Window, logits_to_keep: int | torch.Tensor = 0) -> torch.Tensor:
        """fp32 logits [B, kept, V] of states at any depth, [B, T, E]; `logits_to_keep` as in transformers."""
        hidden_states = self.transformer["ln_f"](latent_states)
        for block in self.transformer["coda"]:
            hidden_states = block(hidden_states, window)
        hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep)
        return self.lm_head(self.transformer["ln_f"](hidden_states)).float()

    # Windows: which tokens a call works on.

    def padded_window(
        self,
        input_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: RecurrentCache | None,
    ) -> Window:
        """The next T columns of every row, [B, T, ...] giving the shape; padding is told by a 2D (or a 4D) mask."""
        length = input_embeds.shape[1]
        start = cache.get_seq_length() if cache is not None else 0
        mask = create_causal_mask(self.config, input_embeds, attention_mask, cache, position_ids)
        if cache is not None:
            cache.reserve(start + length)
        rotary = paired_rotary(self.freqs_cis[0, position_ids])
        return Window(rotary, mask, cache, slice(start, start + length), start + length)

    def window_at(self, starts: list[int], length: int, cache: RecurrentCache) -> Window:
        """`length` tokens of each cache row from position starts[row] on; rows are unpadded: column is position."""
        device = self.freqs_cis.device
        position_ids = torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
        kv_length = max(starts) + length
        cache.reserve(kv_length)
        positions = position_ids.clamp(max=self.config.block_size - 1)  # filling may lie beyond
        rotary = paired_rotary(self.freqs_cis[0, positions])
        if min(starts) == max(starts):
            mask = self._mask(len(starts), length, kv_length, causal_mask_function, q_offset=starts[0])
            return Window(rotary, mask, cache, slice(starts[0], kv_length), kv_length)
        mask = self._mask(len(starts), length, kv_length, lambda row, head, q, column: column <= position_ids[row, q])
        rows = torch.arange(len(starts), device=device)[:, None]
        return Window(rotary, mask, cache, (rows, position_ids), kv_length)

    def packed_window(
        self, rows: list[int], positions: list[int], cache: RecurrentCache, recurrences: list[int] | None = None
    ) -> Window:
        """N single tokens, [N, 1] in every call: token n stands at positions[n] of cache row rows[n].

        With `recurrences` the window is for one `core_step`, in which token n has recurrence recurrences[n].
        """
        device = self.freqs_cis.device
        index = torch.tensor([rows, positions], device=device)[:, :, None]  # [2, N, 1]
        kv_length = max(positions) + 1
        cache.reserve(kv_length)
        mask = None
        if min(positions) < max(positions):
            mask = self._mask(len(rows), 1, kv_length, lambda row, head, q, column: column <= index[1][row, q])
        rotary = paired_rotary(self.freqs_cis[0, index[1]])
        packing = Packing.of(rows, recurrences, cache.stored_recurrences, device)
        return Window(rotary, mask, cache, (index[0], index[1]), kv_length, packing)

    def _mask(self, num_rows: int, length: int, kv_length: int, mask_function: Callable, q_offset: int = 0) -> Any:
        implementation = self.config._attn_implementation
        if "flash" in implementation and mask_function is not causal_mask_function:
            raise ValueError(
                f"`attn_implementation` must be 'sdpa', 'eager' or 'flex_attention' to decode rows of different length "
                f"or depth in one call, but is {implementation!r}, which knows no masks. "
                f"Call `model.set_attn_implementation('sdpa')`, or give one row at a time."
            )
        mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=num_rows,
            q_length=length,
            kv_length=kv_length,
            q_offset=q_offset,
            mask_function=mask_function,
            attention_mask=None,
            allow_is_causal_skip=mask_function is causal_mask_function,
            dtype=self.dtype,
            device=self.freqs_cis.device,
            config=self.config,
            use_vmap=False,
        )
        if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:  # else every layer would turn it into numbers
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, -torch.inf)
        return mask

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        num_recurrences: int | None = None,
        init_scale: float = 1.0,
        generator: torch.Generator | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits after `num_recurrences` core steps (the config's `mean_recurrence` where absent).

        `init_scale` and `generator` draw the initial states; 0 makes the forward deterministic. `use_cache` without
        `past_key_values` makes a cache of every recurrence. Hidden states are [prelude output, s_0, s_1, ... s_r].
        """
        num_recurrences = self.config.mean_recurrence if num_recurrences is None else num_recurrences
        if num_recurrences < 1:
            raise ValueError(
                f"`num_recurrences` must be at least 1 (core passes a token gets), but is {num_recurrences}."
            )
        embeds = self.transformer["wte"](input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = RecurrentCache.every_recurrence(
                self.config, *embeds.shape[:2], num_recurrences, embeds.dtype, embeds.device
            )
        if position_ids is None:
            position_ids = positions_of(attention_mask, embeds, past_key_values)
        self._check_positions(position_ids, past_key_values)
        window = self.padded_window(embeds, attention_mask, position_ids, past_key_values)

        input_embeds = self.prelude(None, window, inputs_embeds=embeds)
        latent_states = self.initial_states(input_embeds, init_scale, generator)
        trajectory = [input_embeds, latent_states]
        for recurrence in range(1, num_recurrences + 1):
            latent_states = self.core_step(latent_states, input_embeds, window, recurrence)
            if output_hidden_states:
                trajectory.append(latent_states)
        logits = self.coda(latent_states, window, logits_to_keep)

        if past_key_values is not None:
            past_key_values.lengths = [window.kv_length] * past_key_values.batch_size
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=tuple(trajectory) if output_hidden_states else None,
        )

    def _check_positions(self, position_ids: torch.Tensor, cache: RecurrentCache | None) -> None:
        past = cache.get_seq_length() if cache is not None else 0
        if past + position_ids.shape[1] > self.config.block_size and position_ids.max() >= self.config.block_size:
            raise ValueError(
                f"Positions must be below {self.config.block_size}, the length this checkpoint was trained for "
                f"(`config.block_size`), but reach {int(position_ids.max())}. Shorten the input."
            )


def positions_of(
    attention_mask: torch.Tensor | None, embeds: torch.Tensor, cache: RecurrentCache | None
) -> torch.Tensor:
    """Position of each of the next T tokens: columns from the left, padding not counted. [B, T] or [1, T]."""
    length = embeds.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    start = cache.get_seq_length() if cache is not None else 0
    return torch.arange(start, start + length, device=embeds.device)[None]
