"""Ouro, a looped language model without input injection (arXiv 2510.25741), in the family's three parts.

    e = embeddings      s_0 = e      s_i = norm(layers(s_{i-1})), i = 1..4      logits = head(s_4)

The core never reads the tokens again, so a state belongs to the token it started from. The exact wavefront works,
since it restarts where a token changes; diffusion forcing does not.
B rows, T tokens, R core steps, E channels, H heads, D head width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_recurrent import Window
from .configuration_ouro import OuroConfig
from .looped_recurrent import GroupedHeads, RecurrentDepthLM, RecurrentRMSNorm
from .rotary_recurrent import SplitHalfRotary


class OuroAttention(GroupedHeads):
    """Causal attention with grouped key-value heads."""

    def __init__(self, config: OuroConfig, layer_idx: int):
        super().__init__(config, layer_idx, config.num_attention_heads)
        query_width, key_width, _ = self.widths
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, window: Window, recurrence: int) -> torch.Tensor:
        """[B, T, E] to [B, T, E]."""
        query, key, value = (project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.mix(query, key, value, window, recurrence))


class OuroMLP(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: OuroConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., E] to [..., E]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class OuroBlock(GradientCheckpointingLayer):
    """A layer with norms before and after each half: x += n2(attn(n1(x))); x += n4(mlp(n3(x)))."""

    def __init__(self, config: OuroConfig, layer_idx: int):
        super().__init__()
        self.self_attn = OuroAttention(config, layer_idx)
        self.mlp = OuroMLP(config)
        self.input_layernorm = RecurrentRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm_2 = RecurrentRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RecurrentRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm_2 = RecurrentRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, window: Window, recurrence: int) -> torch.Tensor:
        """[B, T, E] to [B, T, E]."""
        mixed = self.self_attn(self.input_layernorm(hidden_states), window, recurrence)
        hidden_states = hidden_states + self.input_layernorm_2(mixed)
        mixed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.post_attention_layernorm_2(mixed)


class OuroForCausalLM(RecurrentDepthLM, GenerationMixin):
    """Ouro at its fixed depth, `total_ut_steps`. Training uses only the loss at that depth."""

    config_class = OuroConfig
    base_model_prefix = "model"
    reinjects_input = False
    has_random_depth = False
    _no_split_modules = ("OuroBlock",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers reads a plain dict)

    def __init__(self, config: OuroConfig):
        super().__init__(config)
        gate = nn.Linear(config.hidden_size, 1)
        gate.requires_grad_(False)  # training does not use it: nothing waits for its gradient
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(OuroBlock(config, i) for i in range(config.num_hidden_layers)),
                "norm": RecurrentRMSNorm(config.hidden_size, config.rms_norm_eps),
                "early_exit_gate": gate,
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary_emb = SplitHalfRotary(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model["embed_tokens"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model["embed_tokens"] = value

    def initial_states(
        self,
        input_embeds: torch.Tensor,
        init_scale: float = 1.0,
        generator: torch.Generator | None = None,
        hashes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """s_0 = e: the embeddings themselves. There is nothing to scale or draw."""
        return input_embeds

    def prelude(
        self, input_ids: torch.Tensor | None, window: Window, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """e: the embeddings of [B, T] ids, [B, T, E]."""
        embeds = self.model["embed_tokens"](input_ids) if inputs_embeds is None else inputs_embeds
        return embeds.to(window.device)

    def core_step(
        self, latent_states: torch.Tensor, input_embeds: torch.Tensor, window: Window, recurrence: int = 1
    ) -> torch.Tensor:
        """s_i = norm(layers(s_{i-1})), [B, T, E]; the embeddings are not used."""
        for block in self.model["layers"]:
            latent_states = block(latent_states, window, recurrence)
        return self.model["norm"](latent_states).to(window.device)

    def exit_of(
        self, num_recurrences: int, exit_at_step: int | None = None, exit_threshold: float | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """As the released code: tokens are predicted from the states of one step, or of their first step at which the
        exit gate's cumulative probability reaches a threshold. All steps are run: later tokens attend to them.

        Args:
            exit_at_step: counted from 0; default: the config's `early_exit_step`.
            exit_threshold: default: the config's `early_exit_threshold`. From 1 up all steps are taken.

        Raises:
            ValueError: the step is not run, both are given, or one of them in training, which takes all steps.
        """
        if self.training and torch.is_grad_enabled():
            if exit_at_step is not None or exit_threshold is not None:
                raise ValueError("`exit_at_step` and `exit_threshold` must be left out in training. Call `eval` first.")
            return None
        step = self.config.early_exit_step if exit_at_step is None else exit_at_step
        if step is not None and exit_threshold is not None:
            raise ValueError(
                f"`exit_threshold` must be left out where tokens exit at one step (`exit_at_step`, or the config's "
                f"`early_exit_step`, is {step}), but is {exit_threshold}. Leave one of the two out."
            )
        if step is not None:
            if not 0 <= step < num_recurrences:
                raise ValueError(
                    f"`exit_at_step` must be from 0 to {num_recurrences - 1}, the last of the core steps that are run "
                    f"(`num_recurrences`), but is {step}."
                )
            return lambda states: states[:, :, step]
        threshold = self.config.early_exit_threshold if exit_threshold is None else exit_threshold
        if threshold is None or threshold >= 1:
            return None
        return lambda states: at_exit(states, self.model["early_exit_gate"](states)[..., 0], threshold)

    def coda_states(self, latent_states: torch.Tensor, window: Window) -> torch.Tensor:
        """The states themselves, which `core_step` has normed."""
        return latent_states

    def rotary_at(self, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The `rotary` of `rotate_halves` at positions [B, T]."""
        return self.rotary_emb(position_ids, dtype).to(position_ids.device)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RecurrentRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, SplitHalfRotary):
            init.copy_(module.inverse_frequencies, module.frequencies()[0])


def at_exit(states: torch.Tensor, gates: torch.Tensor, threshold: float) -> torch.Tensor:
    """Of states [B, T, R, E] after each core step, those [B, T, E] of each token's first step at which its cumulative
    probability to exit reaches the threshold, or of the last.

    `gates` [B, T, R]: step i is the exit with probability sigmoid(gate i), if no step before it was.
    """
    leaves = gates.sigmoid()
    goes_on = (1 - leaves[..., :-1]).cumprod(dim=-1)
    chances = torch.cat([leaves[..., :1], leaves[..., 1:-1] * goes_on[..., :-1], goes_on[..., -1:]], dim=-1)
    has_left = chances.cumsum(dim=-1) >= threshold
    has_left[..., -1] = True
    step = has_left.int().argmax(dim=-1)  # the first
    return states.gather(2, step[..., None, None].expand(-1, -1, 1, states.shape[-1]))[:, :, 0]
