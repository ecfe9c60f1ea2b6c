"""Every model of the family as a plain loop over torch operations, written from its definition: no cache, no layers.

`weights` and `config` are a checkpoint's original tensors and config.json. One row: T tokens, E channels, V vocabulary.
"""

import math
from functools import partial

import torch
from torch.nn.functional import linear, silu


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def causal_attention(query, key, value):
    """[H, T, D] queries; keys and values may have fewer heads."""
    groups, length = query.shape[0] // key.shape[0], query.shape[1]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(torch.ones(length, length).tril() == 0, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


def split_half_rotary(heads, theta, scale=lambda frequencies: frequencies):
    """Rotates channel d with channel d + D/2."""
    length, width = heads.shape[1:]
    frequencies = scale(theta ** -(torch.arange(0, width, 2) / width))
    angles = torch.outer(torch.arange(length).float(), frequencies)
    a, b = heads[..., : width // 2], heads[..., width // 2 :]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def llama3_scaling(frequencies, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings, **_):
    """Scales long wavelengths by `factor`, keeps short ones, and interpolates between."""
    wavelengths = 2 * math.pi / frequencies
    share = (original_max_position_embeddings / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    share = share.clamp(0, 1)
    return (1 - share) * frequencies / factor + share * frequencies


def paired_rotary(heads, theta):
    """Rotates channel 2d with channel 2d + 1."""
    width = heads.shape[-1]
    angles = torch.outer(torch.arange(heads.shape[1]).float(), theta ** -(torch.arange(0, width, 2) / width))
    a, b = heads[..., 0::2], heads[..., 1::2]
    return torch.stack([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).flatten(-2)


def heads_of(x, width):
    return x.unflatten(-1, (-1, width)).transpose(0, 1)


def raven_attention(x, w, config, turn):
    """Attention with the names of Huginn and its retrofits; `w` returns a layer's weight by name, or None."""
    width, num_key_value = config["head_dim"], config.get("num_key_value_heads", config["n_heads"])
    sizes = [config["n_heads"] * width, num_key_value * width, num_key_value * width]
    query, key, value = linear(x, w("attn.Wqkv.weight")).split(sizes, -1)
    if w("attn.q_norm.weight") is not None:
        query = rms_norm(query, w("attn.q_norm.weight"), config["norm_eps"])
        key = rms_norm(key, w("attn.k_norm.weight"), config["norm_eps"])
    query, key, value = heads_of(query, width), heads_of(key, width), heads_of(value, width)
    if w("attn.qk_bias") is not None:
        query, key = query + w("attn.qk_bias")[0].transpose(0, 1), key + w("attn.qk_bias")[1].transpose(0, 1)
    return linear(causal_attention(turn(query), turn(key), value), w("attn.proj.weight"))


def raven_mlp(x, w):
    gate, up = linear(x, w("mlp.fc.weight")).chunk(2, -1)
    return linear(silu(gate) * up, w("mlp.proj.weight"))


def raven_layer(form, x, w, config, turn):
    norm = lambda number, y: rms_norm(y, w(f"norm_{number}.weight"), config["norm_eps"])  # noqa: E731
    if form == "sandwich":
        x = norm(2, x + raven_attention(norm(1, x), w, config, turn))
        return norm(4, x + raven_mlp(norm(3, x), w))
    if form == "pre-norm":
        x = x + raven_attention(norm(1, x), w, config, turn)
        return x + raven_mlp(norm(2, x), w)
    x = x + norm(1, raven_attention(x, w, config, turn))
    return x + norm(2, raven_mlp(x, w))


def raven_logits(weights, config, form, ids, num_recurrences, initial_states=None, num_detached=0):
    """[T, V] of Huginn ("sandwich") or a retrofit ("pre-norm", "post-norm"). Initial states default to zeros.

    The first `num_detached` recurrences have no gradient.
    """
    if form == "sandwich":
        turn = partial(paired_rotary, theta=config["rope_base"])
    else:
        scaling = config.get("rope_scaling")
        scale = partial(llama3_scaling, **scaling) if scaling else (lambda frequencies: frequencies)
        turn = partial(split_half_rotary, theta=config["rope_theta"], scale=scale)

    def layers(part, x):
        for i in range(config[f"n_layers_in_{part}"]):
            prefix = f"transformer.{part.replace('recurrent', 'core')}.{i}."
            x = raven_layer(form, x, lambda key, prefix=prefix: weights.get(prefix + key), config, turn)
        return x

    norm = partial(rms_norm, weight=weights["transformer.ln_f.weight"], eps=config["norm_eps"])
    scale = config["init_values"]["embed_scale"]
    embeds = layers("prelude", scale * weights["transformer.wte.weight"][ids])
    states = torch.zeros_like(embeds) if initial_states is None else initial_states
    for i in range(num_recurrences):
        before = states.detach() if i == num_detached else states
        states = layers(
            "recurrent_block", linear(torch.cat([before, embeds], -1), weights["transformer.adapter.weight"])
        )
    hidden = layers("coda", norm(states) if form == "sandwich" else states)
    return linear(norm(hidden), weights["lm_head.weight"])


def ouro_logits(weights, config, ids, num_recurrences):
    """[T, V] of Ouro: all layers, then the norm, repeatedly. The head reads the last norm's output."""
    width, eps = config["head_dim"], config["rms_norm_eps"]
    turn = partial(split_half_rotary, theta=config["rope_theta"])
    states = weights["model.embed_tokens.weight"][ids]
    for _ in range(num_recurrences):
        for i in range(config["num_hidden_layers"]):
            w = lambda key, i=i: weights[f"model.layers.{i}.{key}.weight"]  # noqa: E731
            x = rms_norm(states, w("input_layernorm"), eps)
            query, key, value = (heads_of(linear(x, w(f"self_attn.{name}_proj")), width) for name in "qkv")
            x = linear(causal_attention(turn(query), turn(key), value), w("self_attn.o_proj"))
            states = states + rms_norm(x, w("input_layernorm_2"), eps)
            x = rms_norm(states, w("post_attention_layernorm"), eps)
            x = linear(silu(linear(x, w("mlp.gate_proj"))) * linear(x, w("mlp.up_proj")), w("mlp.down_proj"))
            states = states + rms_norm(x, w("post_attention_layernorm_2"), eps)
        states = rms_norm(states, weights["model.norm.weight"], eps)
    return linear(states, weights["lm_head.weight"])
