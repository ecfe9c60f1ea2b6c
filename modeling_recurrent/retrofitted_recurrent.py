"""The blocks of models that were given a recurrence after their pretraining (arXiv 2511.07384): Llama's and OLMo-2's.

They share Huginn's adapter and the names of its weights, but keep their own layers: no norms of the residual stream,
grouped key-value heads, split-half rotary positions. B rows, T tokens, E channels, H heads, D head width.
"""

import torch
from torch import nn

from .cache_recurrent import Window
from .configuration_recurrent import RecurrentDepthConfig
from .looped_recurrent import RecurrentMLP, RecurrentRMSNorm, attend
from .rotary_recurrent import rotate_halves


class GroupedAttention(nn.Module):
    """Causal attention with grouped key-value heads, queries and keys normed over all their heads where asked for."""

    is_causal = True

    def __init__(self, config: RecurrentDepthConfig, layer_idx: int, has_qk_norm: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        assert config.head_dim is not None and config.num_key_value_heads is not None  # the config fills them
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = config.n_heads // config.num_key_value_heads
        query_width, key_width = config.n_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.widths = [query_width, key_width, key_width]
        self.Wqkv = nn.Linear(config.n_embd, sum(self.widths), bias=config.bias)
        self.q_norm = RecurrentRMSNorm(query_width, config.norm_eps) if has_qk_norm else nn.Identity()
        self.k_norm = RecurrentRMSNorm(key_width, config.norm_eps) if has_qk_norm else nn.Identity()
        self.proj = nn.Linear(query_width, config.n_embd, bias=config.bias)

    def forward(self, hidden_states: torch.Tensor, window: Window, recurrence: int) -> torch.Tensor:
        """[B, T, E] to [B, T, E], storing keys and values in the window's cache if it has one."""
        flat_query, flat_key, flat_value = self.Wqkv(hidden_states).split(self.widths, dim=-1)
        query, key, value = (
            heads.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # [B, H, T, D]
            for heads in (self.q_norm(flat_query), self.k_norm(flat_key), flat_value)
        )
        query, key = rotate_halves(query, window.rotary), rotate_halves(key, window.rotary)
        return self.proj(attend(self, query, key, value, window, recurrence))


class PreNormBlock(nn.Module):
    """Llama's layer: x += attn(n1(x)); x += mlp(n2(x))."""

    def __init__(self, config: RecurrentDepthConfig, layer_idx: int):
        super().__init__()
        self.norm_1 = RecurrentRMSNorm(config.n_embd, config.norm_eps)
        self.attn = GroupedAttention(config, layer_idx, has_qk_norm=False)
        self.norm_2 = RecurrentRMSNorm(config.n_embd, config.norm_eps)
        self.mlp = RecurrentMLP(config)

    def forward(self, hidden_states: torch.Tensor, window: Window, recurrence: int = 1) -> torch.Tensor:
        """[B, T, E] to [B, T, E]."""
        hidden_states = hidden_states + self.attn(self.norm_1(hidden_states), window, recurrence)
        return hidden_states + self.mlp(self.norm_2(hidden_states))


class PostNormBlock(nn.Module):
    """OLMo-2's layer: x += n1(attn(x)); x += n2(mlp(x)), queries and keys normed."""

    def __init__(self, config: RecurrentDepthConfig, layer_idx: int):
        super().__init__()
        self.attn = GroupedAttention(config, layer_idx, has_qk_norm=True)
        self.norm_1 = RecurrentRMSNorm(config.n_embd, config.norm_eps)
        self.mlp = RecurrentMLP(config)
        self.norm_2 = RecurrentRMSNorm(config.n_embd, config.norm_eps)

    def forward(self, hidden_states: torch.Tensor, window: Window, recurrence: int = 1) -> torch.Tensor:
        """[B, T, E] to [B, T, E]."""
        hidden_states = hidden_states + self.norm_1(self.attn(hidden_states, window, recurrence))
        return hidden_states + self.norm_2(self.mlp(hidden_states))
