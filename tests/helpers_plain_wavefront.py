"""The published diffusion-forcing sampler as a plain loop: keys and values in dictionaries, one entry per token.

Written from a description of the authors' code, step by step, without corrections. Greedy, with initial states of
zeros. T tokens, E channels, H heads, D head width.
"""

import math

import torch
from torch.nn.functional import linear, silu

from helpers_plain_recurrent import heads_of, rms_norm


class PlainRaven:
    """A Huginn model with a cache of dictionaries: slot -> position -> [H, D] key and value.

    Each layer has its own slot. With `num_slots`, the core's layers share that number of slots in turn, from the
    second slot on.
    """

    def __init__(self, weights: dict, config: dict, num_slots: int | None):
        self.weights, self.config, self.num_slots = weights, config, num_slots
        self.kv: dict = {}

    def layer(self, prefix: str, x: torch.Tensor, positions: list[int], slot) -> torch.Tensor:
        w, eps = lambda name: self.weights[prefix + name], self.config["norm_eps"]
        width = self.config["n_embd"] // self.config["n_heads"]
        qkv = linear(rms_norm(x, w("norm_1.weight"), eps), w("attn.Wqkv.weight"))
        query, key, value = (heads_of(part, width) for part in qkv.chunk(3, -1))  # [H, T, D]
        if self.config["qk_bias"]:
            query, key = (
                heads + bias.transpose(0, 1) for heads, bias in zip((query, key), w("attn.qk_bias"), strict=True)
            )
        query, key = self.turned(query, positions), self.turned(key, positions)
        own = self.kv.setdefault(slot, {})
        for i, position in enumerate(positions):
            own[position] = key[:, i], value[:, i]
        mixed = []
        for i, position in enumerate(positions):
            seen = [own[p] for p in sorted(own) if p <= position]
            keys, values = (torch.stack(each, 1) for each in zip(*seen, strict=True))  # [H, S, D]
            shares = (keys @ query[:, i, :, None] / math.sqrt(width)).softmax(1)
            mixed.append((shares * values).sum(1).flatten())
        x = rms_norm(x + linear(torch.stack(mixed), w("attn.proj.weight")), w("norm_2.weight"), eps)
        gate, up = linear(rms_norm(x, w("norm_3.weight"), eps), w("mlp.fc.weight")).chunk(2, -1)
        return rms_norm(x + linear(silu(gate) * up, w("mlp.proj.weight")), w("norm_4.weight"), eps)

    def turned(self, heads: torch.Tensor, positions: list[int]) -> torch.Tensor:
        width = heads.shape[-1]
        rates = self.config["rope_base"] ** -(torch.arange(0, width, 2).double() / width)
        angles = torch.outer(torch.tensor(positions).double(), rates).to(heads.dtype)
        a, b = heads[..., 0::2], heads[..., 1::2]
        return torch.stack([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).flatten(-2)

    def prelude(self, ids: list[int], positions: list[int]) -> torch.Tensor:
        x = self.weights["transformer.wte.weight"][ids] * math.sqrt(self.config["n_embd"])
        for i in range(self.config["n_layers_in_prelude"]):
            x = self.layer(f"transformer.prelude.{i}.", x, positions, ("prelude", i))
        return x

    def core(self, states: torch.Tensor, embeds: torch.Tensor, positions: list[int], recurrence: int) -> torch.Tensor:
        num_layers = self.config["n_layers_in_recurrent_block"]
        x = linear(torch.cat([states, embeds], -1), self.weights["transformer.adapter.weight"])
        for i in range(num_layers):
            number = recurrence * num_layers + i
            slot = number if self.num_slots is None else number % self.num_slots
            x = self.layer(f"transformer.core_block.{i}.", x, positions, slot)
        return x

    def coda(self, states: torch.Tensor, positions: list[int]) -> torch.Tensor:
        norm = lambda x: rms_norm(x, self.weights["transformer.ln_f.weight"], self.config["norm_eps"])  # noqa: E731
        x = norm(states)
        for i in range(self.config["n_layers_in_coda"]):
            x = self.layer(f"transformer.coda.{i}.", x, positions, ("coda", i))
        return linear(norm(x), self.weights["lm_head.weight"])

    def forget_from(self, length: int) -> None:
        self.kv = {slot: {p: kv for p, kv in own.items() if p < length} for slot, own in self.kv.items()}


def published_run(
    raven: PlainRaven,
    prompt: list[int],
    num_new: int,
    *,
    num_recurrences: int,
    inner_recurrence: int,
    exit_threshold: float,
    embedding_ema: float,
    state_noise: float,
    noise_schedule: str,
    max_wavefront: int,
    freeze_criterion: str,
    eos_token_ids: tuple[int, ...] = (),
    max_steps: int = 4096,
) -> dict:
    """The tokens and counts of the published code, for a headway of one."""
    zero = raven.weights["transformer.wte.weight"].new_zeros(1, raven.config["n_embd"])
    positions = list(range(len(prompt)))
    embeds = raven.prelude(prompt, positions)
    states = torch.zeros_like(embeds)
    for recurrence in range(num_recurrences):
        states = raven.core(states, embeds, positions, recurrence)
    first = int(raven.coda(states, positions)[-1].argmax())

    frozen, text = [*prompt, first], [*prompt, first]
    counts = dict.fromkeys(range(len(text)), num_recurrences)
    stood: dict[int, int] = {}
    start, states, passes, computed, step = len(prompt), zero, 1, len(prompt), 0
    old_embeds: dict[int, torch.Tensor] = {}
    kept, kept_from, older, older_from, velocity = zero[:0], start, zero[:0], start, zero[:0]
    seen = 0  # frozen tokens searched for the end
    while len(frozen) - len(prompt) < num_new and len(text) <= raven.config["block_size"]:
        raven.forget_from(start)
        positions = list(range(start, start + len(states)))
        embeds = raven.prelude([text[p] for p in positions], positions)
        before = torch.stack([old_embeds.get(p, zero[0]) for p in positions])
        if step == 0:
            before = embeds
        embeds = (1 - embedding_ema) * embeds + embedding_ema * before
        old_embeds = dict(zip(positions, embeds, strict=True))
        if state_noise:
            tried = torch.tensor([counts.get(p, 0) for p in positions])[:, None]
            share = state_noise / (1 + tried) if noise_schedule != "constant" else torch.tensor(state_noise)
            states = states * ((1 - share).sqrt() if noise_schedule == "sqrt" else 1 - share).to(states)
        for recurrence in range(inner_recurrence):
            states = raven.core(states, embeds, positions, recurrence)
            passes, computed = passes + 1, computed + len(positions)
            counts |= {p: counts.get(p, 0) + 1 for p in positions}
        new = raven.coda(states, positions)[len(frozen) - 1 - start :].argmax(-1).tolist()

        old_text, text = text, frozen + new
        for p, (one, other) in enumerate(zip(old_text, text, strict=False)):
            stood[p] = stood.get(p, 0) + (one == other)
        states = torch.cat([states, zero])[:max_wavefront]
        text = text[: start + max_wavefront]

        # Stored states are indexed from their step's start, although its frozen positions were then removed.
        last, here = None, states[: len(positions)]
        compared = kept[start - kept_from :]
        compared, here = compared[: len(here)], here[: len(compared)]
        if freeze_criterion == "latent-difference":
            change = (here - compared).norm(dim=-1) / here.norm(dim=-1)
        elif freeze_criterion == "latent-acceleration-1":
            moved = here - compared
            num = min(len(moved), len(velocity))
            change = (moved[:num] - velocity[:num]).norm(dim=-1) / here[:num].norm(dim=-1)
            velocity = moved
        elif freeze_criterion == "latent-acceleration-2":
            oldest = older[start - older_from :]
            num = min(len(here), len(oldest)) if step > 1 else 0
            bend = here[:num] - 2 * compared[:num] + oldest[:num]
            change = bend.norm(dim=-1) / (here[:num].norm(dim=-1) + 1e-6)
        if freeze_criterion.startswith("latent"):
            settled = (change < exit_threshold).nonzero().flatten().tolist()
            last = settled[-1] if settled else None
        elif freeze_criterion == "token-stability":
            stable = [p for p, num in stood.items() if num > num_recurrences // inner_recurrence]
            last = max(stable) - start if stable else None
        elif step > num_recurrences // inner_recurrence:
            last = 1
        if last is not None:
            frozen, states = text[: start + last + 1], states[last:]
        if freeze_criterion.startswith("latent"):
            looked_at = frozen[seen:] if last is not None else []
            seen = len(frozen) if last is not None else seen
        else:
            looked_at = frozen[-1:]
        if (step > num_recurrences and set(looked_at) & set(eos_token_ids)) or step > max_steps:
            break
        older, older_from = kept, kept_from
        kept, kept_from = states, start
        start += last or 0
        step += 1
    return {
        "tokens": frozen[len(prompt) :],
        "num_steps": step,
        "num_core_passes": passes,
        "num_positions": computed,
        "recurrences": [counts.get(p, 0) for p in range(len(prompt), len(frozen))],
    }
