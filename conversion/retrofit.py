"""Makes a recurrent-depth checkpoint out of a stock one: its layers become prelude, core and coda (arXiv 2511.07384).

The first layers are the prelude, the last ones the coda, and those before the coda the core. Layers between prelude and
core are dropped. The adapter, which joins the core's state with the prelude's output, begins as [0 | identity]: the
core reads the prelude's output alone. So the new model computes the same at every depth, and with all layers dealt out
it is the source. Training then teaches the adapter to read the state.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..modeling_recurrent import RecurrentDepthConfig, RecurrentDepthForCausalLM
from .checkpoint_files import Checkpoint, make_room_for_own_options
from .quiet_transformers import quiet_transformers
from .source_folder import side_files

FORMS = {"llama": "pre-norm", "mistral": "pre-norm", "olmo2": "post-norm"}  # by `model_type`
MEAN_RECURRENCE, MEAN_BACKPROP_DEPTH = 8, 4
NUM_TEXTS, LENGTH = 4, 48  # that the source writes, to compare depth 1 on
TOLERANCE = 1e-3  # of the largest logit: fused products sum in another order
NORMS = {
    "pre-norm": {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"},
    "post-norm": {"post_attention_layernorm": "norm_1", "post_feedforward_layernorm": "norm_2"},
}


@dataclass(frozen=True)
class DepthOne:
    """How near the new model is to its source at depth 1, on texts that the source wrote.

    Attributes:
        max_abs_difference: between their logits.
        share_same: of next tokens that both find likeliest.
        source_perplexity, perplexity: of the texts.
        num_dropped: layers of the source that the new model lacks.
    """

    max_abs_difference: float
    share_same: float
    source_perplexity: float
    perplexity: float
    num_dropped: int


def check_layout(layout: tuple[int, int, int], config: PreTrainedConfig) -> str:
    """The `block_form` of a source that can be retrofitted with so many layers of prelude, core and coda.

    Raises:
        ValueError: the source has another form, or fewer layers.
    """
    if config.model_type not in FORMS:
        raise ValueError(
            f"`recurrent` must be left out for a {config.model_type!r} model: layers of {', '.join(FORMS)} can become "
            f"a core, and its layers have another form. Choose a source of one of these."
        )
    if any(getattr(config, name, None) for name in ("attention_bias", "mlp_bias", "sliding_window")):
        raise ValueError(
            "`recurrent` must be left out for a model with `attention_bias`, `mlp_bias` or `sliding_window`: "
            "recurrent-depth layers have none. Choose a source without."
        )
    num_layers = config.num_hidden_layers
    if min(layout) < 1 or sum(layout) > num_layers:
        raise ValueError(
            f"`recurrent` must be three numbers from 1 up (layers of prelude, core and coda) with a sum of at most "
            f"{num_layers}, the layers of the source, but is {layout}."
        )
    return FORMS[config.model_type]


def dealt_layers(layout: tuple[int, int, int], num_layers: int) -> dict[int, str]:
    """Where each layer of the source goes, by its number. Those between prelude and core go nowhere."""
    num_prelude, num_core, num_coda = layout
    places = {i: f"prelude.{i}" for i in range(num_prelude)}
    first_of_coda = num_layers - num_coda
    places |= {first_of_coda - num_core + i: f"core_block.{i}" for i in range(num_core)}
    return places | {first_of_coda + i: f"coda.{i}" for i in range(num_coda)}


def retrofitted_config(source: Any, layout: tuple[int, int, int], block_form: str) -> RecurrentDepthConfig:
    """The config of the new model."""
    num_prelude, num_core, num_coda = layout
    return RecurrentDepthConfig(
        n_embd=source.hidden_size,
        n_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads,
        n_layers_in_prelude=num_prelude,
        n_layers_in_recurrent_block=num_core,
        n_layers_in_coda=num_coda,
        intermediate_size=source.intermediate_size,
        vocab_size=source.vocab_size,
        block_size=source.max_position_embeddings,
        norm_eps=source.rms_norm_eps,
        rope_parameters=source.rope_parameters,
        block_form=block_form,
        qk_bias=False,
        tie_embeddings=source.tie_word_embeddings,
        init_values={"embed_scale": 1.0},
        mean_recurrence=MEAN_RECURRENCE,
        mean_backprop_depth=MEAN_BACKPROP_DEPTH,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
        dtype=source.dtype,
    )


def retrofitted_weights(
    weights: dict[str, torch.Tensor], layout: tuple[int, int, int], block_form: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the new model, from those of the source."""
    yield "transformer.wte.weight", weights["model.embed_tokens.weight"]
    yield "transformer.ln_f.weight", weights["model.norm.weight"]
    yield "lm_head.weight", weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    numbers = [int(found[1]) for name in weights if (found := re.match(r"model\.layers\.(\d+)\.", name))]
    for number, place in dealt_layers(layout, max(numbers) + 1).items():
        layer = {name.removeprefix(f"model.layers.{number}."): tensor for name, tensor in weights.items()
                 if name.startswith(f"model.layers.{number}.")}  # fmt: skip
        new = f"transformer.{place}"
        queries_keys_values = [layer[f"self_attn.{part}_proj.weight"] for part in "qkv"]
        yield f"{new}.attn.Wqkv.weight", torch.cat(queries_keys_values)
        yield f"{new}.attn.proj.weight", layer["self_attn.o_proj.weight"]
        yield f"{new}.mlp.fc.weight", torch.cat([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]])
        yield f"{new}.mlp.proj.weight", layer["mlp.down_proj.weight"]
        for old_name, name in NORMS[block_form].items():
            yield f"{new}.{name}.weight", layer[f"{old_name}.weight"]
        for norm in ("q_norm", "k_norm"):
            if f"self_attn.{norm}.weight" in layer:
                yield f"{new}.attn.{norm}.weight", layer[f"self_attn.{norm}.weight"]
    width = weights["model.norm.weight"].shape[0]
    like = weights["model.embed_tokens.weight"]
    yield "transformer.adapter.weight", torch.cat([torch.zeros(width, width), torch.eye(width)], dim=1).to(like.dtype)


def write_retrofitted(checkpoint: Checkpoint, new: Path, layout: tuple[int, int, int]) -> None:
    """Writes the new checkpoint into the folder `new`, with the source's tokenizer and our code."""
    block_form = check_layout(layout, checkpoint.config)
    config = retrofitted_config(checkpoint.config, layout, block_form)
    with quiet_transformers():
        source = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype="auto")
        weights = dict(source.state_dict())
        model = RecurrentDepthForCausalLM(config).to(source.dtype)
        model.load_state_dict(dict(retrofitted_weights(weights, layout, block_form)))
        for name in side_files(checkpoint.folder):
            (new / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.folder / name, new / name)
        make_room_for_own_options(new / "generation_config.json")
        model.generation_config = source.generation_config
        model.save_pretrained(new)


@torch.inference_mode()
def prove_depth_one(source_folder: Path, folder: Path, layout: tuple[int, int, int]) -> DepthOne:
    """Compares the new model at depth 1 with its source, in float32, on texts that the source writes.

    Raises:
        ValueError: logits are not finite; or they differ although every layer of the source is in the new model.
    """
    with quiet_transformers():
        source = AutoModelForCausalLM.from_pretrained(source_folder, dtype=torch.float32).eval()
        model = RecurrentDepthForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.randint(source.config.vocab_size, (NUM_TEXTS, 1), generator=torch.Generator().manual_seed(0))
        length = min(LENGTH, model.config.block_size)
        for _ in range(length - 1):  # each greedily after its first token; without a cache, since it is short
            ids = torch.cat([ids, source(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
        before, after = source(ids).logits, model(ids, num_recurrences=1, init_scale=0.0).logits
    if not before.isfinite().all():
        raise ValueError(f"{source_folder} gives logits that are not finite: its weights are damaged. Get it again.")
    difference = (before - after).abs().max().item()
    num_dropped = source.config.num_hidden_layers - sum(layout)
    if not num_dropped and difference > TOLERANCE * before.abs().max().item():
        raise ValueError(
            f"The new model's logits at depth 1 differ from those of {source_folder} by up to {difference}, although "
            f"it has all its layers. A key in its config.json changes the model. Report the key."
        )
    perplexity_before, perplexity_after = (
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()
        for logits in (before, after)
    )
    share_same = (before.argmax(-1) == after.argmax(-1)).float().mean().item()
    return DepthOne(difference, share_same, perplexity_before, perplexity_after, num_dropped)
