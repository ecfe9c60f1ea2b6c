"""The blocks of models that were given a recurrence after their pretraining (arXiv 2511.07384): Llama's and OLMo-2's.

They share Huginn's adapter and the names of its weights, but keep their own layers: no norms of the residual stream,
grouped key-value heads, split-half rotary positions. B rows, T tokens, E channels, H heads, D head width.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_recurrent import Window
from .configuration_recurrent import RecurrentDepthConfig
from .looped_recurrent import GroupedHeads, RecurrentMLP, RecurrentRMSNorm


class GroupedAttention(GroupedHeads):
    """Causal attention with grouped key-value heads, queries and keys normed over all their heads where asked for."""

    def __init__(self, config: RecurrentDepthConfig, layer_idx: int, has_qk_norm: bool):
        super().__init__(config, layer_idx, config.n_heads)
        self.Wqkv = nn.Linear(config.n_embd, sum(self.widths), bias=config.bias)
        self.q_norm = RecurrentRMSNorm(self.widths[0], config.norm_eps) if has_qk_norm else nn.Identity()
        self.k_norm = RecurrentRMSNorm(self.widths[1], config.norm_eps) if has_qk_norm else nn.Identity()
        self.proj = nn.Linear(self.widths[0], config.n_embd, bias=config.bias)

    def forward(self, hidden_states: torch.Tensor, window: Window, recurrence: int) -> torch.Tensor:
        """[B, T, E] to [B, T, E]."""
        query, key, value = self.Wqkv(hidden_states).split(self.widths, dim=-1)
        return self.proj(self.mix(self.q_norm(query), self.k_norm(key), value, window, recurrence))


class PreNormBlock(GradientCheckpointingLayer):
    """Llama's layer: x += attn(n1(x)); x += mlp(n2(x))."""

    def __init__(self, config: RecurrentDepthConfig, layer_idx: int):
        super().__init__()
        self.norm_1 = RecurrentRMSNorm(config.n_embd, config.norm_eps)
        self.attn = GroupedAttention(config, layer_idx, has_qk_norm=False)
        self.norm_2 = RecurrentRMSNorm(config.n_embd, config.norm_eps)
        self.mlp = RecurrentMLP(config, config.bias)

    def forward(self, hidden_states: torch.Tensor, window: Window, recurrence: int = 1) -> torch.Tensor:
        """[B, T, E] to [B, T, E]."""
        hidden_states = hidden_states + self.attn(self.norm_1(hidden_states), window, recurrence)
        return hidden_states + self.mlp(self.norm_2(hidden_states))


class PostNormBlock(GradientCheckpointingLayer):
    """OLMo-2's layer: x += n1(attn(x)); x += n2(mlp(x)), queries and keys normed."""

    def __init__(self, config: RecurrentDepthConfig, layer_idx: int):
        super().__init__()
        self.attn = GroupedAttention(config, layer_idx, has_qk_norm=True)
        self.norm_1 = RecurrentRMSNorm(config.n_embd, config.norm_eps)
        self.mlp = RecurrentMLP(config, config.bias)
        self.norm_2 = RecurrentRMSNorm(config.n_embd, config.norm_eps)

    def forward(self, hidden_states: torch.Tensor, window: Window, recurrence: int = 1) -> torch.Tensor:
        """[B, T, E] to [B, T, E]."""
        hidden_states = hidden_states + self.norm_1(self.attn(hidden_states, window, recurrence))
        return hidden_states + self.norm_2(self.mlp(hidden_states))
