"""Huginn, a recurrent-depth language model (arXiv 2502.05171), and the models retrofitted with its recurrence.

    e   = prelude(tokens)                        s_0 ~ truncated normal, or zeros
    s_i = core_step(s_{i-1}, e), i = 1..r        logits = coda(s_r)

B rows, T tokens, E channels, H heads, D head width, V vocabulary.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from ..generation.recurrent.draws_recurrent import CUT, normal_at
from .cache_recurrent import Window
from .checkpoint_recurrent import block_form_of, check_is_served, config_fields, weight_names
from .configuration_recurrent import RecurrentDepthConfig
from .looped_recurrent import GroupedHeads, RecurrentDepthLM, RecurrentMLP, RecurrentRMSNorm
from .rotary_recurrent import SplitHalfRotary, paired_rotary, rotary_table, rotate_pairs
from .windows_recurrent import attend


class RecurrentAttention(nn.Module):
    """Causal multi-head attention with a bias on queries and keys before the rotation."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: RecurrentDepthConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        assert config.head_dim is not None  # the config sets it
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.Wqkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # `config.bias` is only for the adapter
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, config.n_heads, config.head_dim)) if config.qk_bias else None
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, hidden_states: torch.Tensor, window: Window, recurrence: int) -> torch.Tensor:
        """[B, T, E] to [B, T, E], storing keys and values in the window's cache if it has one."""
        window = window.on(hidden_states.device)
        rows, length = hidden_states.shape[:2]
        qkv = self.Wqkv(hidden_states).view(rows, length, 3, -1, self.head_dim)
        query_key, value = qkv[:, :, :2], qkv[:, :, 2]  # [B, T, 2, H, D], [B, T, H, D]
        if self.qk_bias is not None:
            query_key = query_key + self.qk_bias[:, 0]
        query_key = rotate_pairs(query_key, window.rotary)
        query, key = (heads.transpose(1, 2) for heads in query_key.unbind(2))  # [B, H, T, D]
        value = value.transpose(1, 2)
        return self.proj(attend(self, query, key, value, window, recurrence))


class SandwichBlock(GradientCheckpointingLayer):
    """A layer that also norms its residual stream: x = n2(x + attn(n1(x))); x = n4(x + mlp(n3(x)))."""

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


# The blocks of pretrained models that were retrofitted with a recurrence (arXiv 2511.07384). They have Huginn's adapter
# and weight names, but their own layers: no norms of the residual stream, grouped key-value heads, split-half rotary
# positions.


class GroupedAttention(GroupedHeads):
    """Causal attention with grouped key-value heads. `has_qk_norm` norms queries and keys over all heads."""

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
    """OLMo-2's layer: x += n1(attn(x)); x += n2(mlp(x)), with normed queries and keys."""

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


BLOCKS = {"sandwich": SandwichBlock, "pre-norm": PreNormBlock, "post-norm": PostNormBlock}


class RecurrentDepthForCausalLM(RecurrentDepthLM, GenerationMixin):
    """Huginn has sandwich blocks, injects the prelude's output at every recurrence, and uses its final norm twice.

    A model retrofitted with the recurrence (`config.block_form`) has Llama's or OLMo-2's blocks, and uses the final
    norm once, after the coda.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012 (transformers reads a plain dict)

    _keys_to_ignore_on_load_missing = ("freqs_cis",)  # older files lack it; it is recomputed

    freqs_cis: torch.Tensor

    config_class = RecurrentDepthConfig
    base_model_prefix = "transformer"
    _no_split_modules = ("SandwichBlock", "PreNormBlock", "PostNormBlock")

    def __init__(self, config: RecurrentDepthConfig):
        super().__init__(config)
        num_prelude, num_core = config.n_layers_in_prelude, config.n_layers_in_recurrent_block
        self.is_sandwiched = config.block_form in (None, "sandwich")
        check_block_form(config, self.is_sandwiched)
        block_class = BLOCKS[config.block_form or "sandwich"]
        layers = [block_class(config, i) for i in range(num_prelude + num_core + config.n_layers_in_coda)]
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
        if self.is_sandwiched:
            self.register_buffer("freqs_cis", rotary_table(config), persistent=True)
        else:
            self.rotary_emb = SplitHalfRotary(config)
        self.post_init()

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Move or cast the model. Its rotary table stays fp32: bf16 lacks many positions above 256."""
        super()._apply(fn, recurse)
        if self.is_sandwiched and self.freqs_cis.dtype != torch.float32:
            self.freqs_cis = rotary_table(self.config, self.freqs_cis.device)
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> RecurrentDepthLM:
        """Load a model of the family from a folder or Hub repository. Its config and weight names decide the class."""
        path, config = pretrained_model_name_or_path, kwargs.get("config")
        fields = config.to_dict() if isinstance(config, PreTrainedConfig) else config_fields(config or path, kwargs)
        check_is_served(model_type := fields.get("model_type"))
        if model_type not in (None, cls.config_class.model_type):
            for other in RecurrentDepthLM.__subclasses__():  # a checkpoint's code has only its own class
                if getattr(other.config_class, "model_type", None) == model_type:
                    return other.from_pretrained(path, *args, **kwargs)
        if fields.get("block_form", kwargs.get("block_form")) is None:
            names = kwargs.get("state_dict") or weight_names(path, kwargs)
            if names and (block_form := block_form_of(names)) != "sandwich":
                if isinstance(config, PreTrainedConfig):  # transformers then takes no fields as keywords
                    kwargs["config"] = copy.deepcopy(config)
                    kwargs["config"].block_form = block_form
                else:
                    kwargs["block_form"] = block_form
        return super().from_pretrained(path, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.transformer["wte"] = value

    # The three parts.

    def initial_states(
        self,
        input_embeds: torch.Tensor,
        init_scale: float = 1.0,
        generator: torch.Generator | None = None,
        hashes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """s_0 for [B, T, E] prelude outputs: truncated normal times `init_scale` (0: zeros)."""
        if init_scale == 0:
            return torch.zeros_like(input_embeds)
        if hashes is not None:
            drawn = normal_at(hashes, self.config.n_embd)
        else:
            drawn = torch.empty(input_embeds.shape, dtype=torch.float32, device=input_embeds.device)
            nn.init.trunc_normal_(drawn, std=1.0, a=-CUT, b=CUT, generator=generator)
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
        return hidden_states.to(window.device)

    def core_step(
        self, latent_states: torch.Tensor, input_embeds: torch.Tensor, window: Window, recurrence: int = 1
    ) -> torch.Tensor:
        """s_i = R(s_{i-1}, e), both [B, T, E]; `recurrence` is i, from 1. (A packed window has one for each token.)"""
        hidden_states = self.transformer["adapter"](torch.cat([latent_states, input_embeds], dim=-1))
        for block in self.transformer["core_block"]:
            hidden_states = block(hidden_states, window, recurrence)
        return hidden_states.to(window.device)

    def coda_states(self, latent_states: torch.Tensor, window: Window) -> torch.Tensor:
        """The lm_head's input for states of any depth, both [B, T, E]."""
        hidden_states = self.transformer["ln_f"](latent_states) if self.is_sandwiched else latent_states
        for block in self.transformer["coda"]:
            hidden_states = block(hidden_states, window)
        return self.transformer["ln_f"](hidden_states)

    def rotary_at(self, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The `rotary` of `rotate_pairs` or `rotate_halves` at positions [B, T]."""
        if not self.is_sandwiched:
            return self.rotary_emb(position_ids, dtype).to(position_ids.device)
        in_table = position_ids.clamp(max=self.config.block_size - 1).to(self.freqs_cis.device)  # padding may exceed it
        return paired_rotary(self.freqs_cis[0, in_table]).to(position_ids.device)

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
        elif isinstance(module, SplitHalfRotary):
            init.copy_(module.inverse_frequencies, module.frequencies()[0])
        elif module is self and self.is_sandwiched:
            init.copy_(self.freqs_cis, rotary_table(self.config, self.freqs_cis.device))


def check_block_form(config: RecurrentDepthConfig, is_sandwiched: bool) -> None:
    """Raise ValueError if the block does not fit the config's other fields."""
    if is_sandwiched and config.num_key_value_heads != config.n_heads:
        raise ValueError(
            f"`block_form` must be 'pre-norm' (Llama's) or 'post-norm' (OLMo-2's) if `num_key_value_heads` "
            f"({config.num_key_value_heads}) is not `n_heads` ({config.n_heads}), but is {config.block_form!r}. Load "
            f"the checkpoint with `from_pretrained`, which reads the form from the weights, or set the field."
        )
    if not is_sandwiched and config.qk_bias:
        raise ValueError(
            f"`qk_bias` must be false with `block_form={config.block_form!r}`, whose attention has none, but is true. "
            f"Correct config.json."
        )
