"""Proves a conversion by running both models: the converted model's logits must equal the stock model's.

T tokens of a prompt, K drafted tokens, V vocabulary, D channels.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..generation.drafting.draft_network import new_network
from ..generation.drafting.draft_step import with_masks
from ..generation.stock_model import decoder_of, is_composite, lm_head_logits, longest_in_rotary_table
from ..modeling_tidar.modeling_tidar import tidar_class
from .quiet_transformers import quiet_transformers

PROMPT_LENGTH = 16
FEWEST_LAYERS = 2
HEAD_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}  # of the largest logit; MiniCPM 3 scales before its lm_head
DRAFT_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest logit; the order of sums differs


@dataclass(frozen=True)
class Proof:
    """
    Attributes:
        max_abs_difference: between the logits of the stock and the converted model; always 0.0.
        num_layers: how many layers were run, from the first.
    """

    max_abs_difference: float
    num_layers: int


def check_keys(folder: Path, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Compares a folder's tensor headers with those the class expects. No weight is read.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape.
    """
    with quiet_transformers():
        _, info = model_class.from_pretrained(
            folder,
            config=copy.deepcopy(config),
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[kind])):
            raise ValueError(
                f"{folder} does not fit {model_class.__name__} as configured in its config.json: {len(keys)} "
                f"{kind.replace('_', ' ')}, the first is {keys[0]}. Its config and weights belong to different "
                "checkpoints, or the model needs code that is not in transformers."
            )


def prove(
    source: Path, converted: Path, stock_class: type[PreTrainedModel], stock_config: PreTrainedConfig, *, is_whole: bool
) -> Proof:
    """Runs the stock model of `source` and the drafting model of `converted` on the same ids.

    Args:
        is_whole: run all layers, in float32. If false, run and read only the first few (each kind of layer at least
            once), in the checkpoint's own dtype.

    Raises:
        ValueError: logits differ, `lm_head_logits` is not the stock head, masks change the text's logits, or
            transformers cannot run the source, or not with 2 tokens.
    """
    converted_config = type(stock_config).from_pretrained(converted)
    if not is_whole:
        num_layers = fewest_layers(stock_config.get_text_config())
        stock_config, converted_config = (of_first_layers(c, num_layers) for c in (stock_config, converted_config))
    dtype = torch.float32 if is_whole else "auto"
    text_config = stock_config.get_text_config()
    longest = longest_in_rotary_table(text_config) or getattr(text_config, "max_position_embeddings", None) or 64
    if longest < 2:
        raise ValueError(
            f"{source / 'config.json'} must allow texts of 2 tokens, one to read and one to draft, but its "
            f"`max_position_embeddings` allows {longest}. Correct it, or download config.json again."
        )
    draft_length = min(converted_config.tidar_config["draft_length"], 4, longest - 1)
    num_ids = min(PROMPT_LENGTH + draft_length, longest)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text_config.vocab_size, (1, num_ids), generator=generator)

    with quiet_transformers(), torch.inference_mode():
        stock = stock_class.from_pretrained(source, config=copy.deepcopy(stock_config), dtype=dtype)
        stock_logits = _stock_logits(stock, ids, source)
        del stock
        model_class: Any = tidar_class(stock_class)
        model = model_class.from_pretrained(converted, config=converted_config, dtype=dtype)
        logits, last_states = _logits_and_states(model, ids)
        if not stock_logits.isfinite().all():
            raise ValueError(f"{source} gives logits that are not finite: its weights are damaged. Download it again.")
        difference = (logits - stock_logits).abs().max().item()
        if difference:
            raise ValueError(
                f"The converted model's logits differ from those of {source} by up to {difference}. A key in its "
                "config.json changes the model, but its stock config class has no such field. Remove the key, or "
                f"report the architecture {stock_config.model_type!r}."
            )
        head = (lm_head_logits(model, last_states) - stock_logits).abs().max().item()
        if head > HEAD_TOLERANCE.get(dtype, 0) * stock_logits.abs().max().item():
            raise ValueError(
                f"A {stock_config.model_type!r} model cannot draft yet: its forward changes the output of its lm_head "
                f"in a way its config does not describe (logits differ by up to {head}). Report the architecture."
            )
        _prove_drafting_forward(model, ids, stock_logits, draft_length)
    return Proof(max_abs_difference=difference, num_layers=text_config.num_hidden_layers)


def _prove_drafting_forward(model: Any, ids: torch.Tensor, stock_logits: torch.Tensor, draft_length: int) -> None:
    """Checks that masks in the same forward do not change the text's logits, in a prefill and in a decode step."""
    num_prompt = ids.shape[1] - draft_length
    network = new_network(model, 1, model.config.tidar_config["mask_embedding_id"])
    with network.form.applied():
        prefill_logits, _, next_positions = network.prefill(ids[:, :num_prompt], None, draft_length)
        positions = next_positions + torch.arange(draft_length, device=next_positions.device)
        every_branch = torch.arange(1, draft_length + 1, device=positions.device)[None]
        cached = positions.new_tensor([num_prompt])
        draft_ids = ids[:, num_prompt:]
        step = with_masks(draft_ids, positions, every_branch, cached, draft_length, draft_length, network.masks)
        step_logits, _ = network(step)
    logits = torch.cat([prefill_logits, step_logits], dim=1).float()
    expected = stock_logits[:, num_prompt - 1 :].float()
    difference = (logits - expected).abs()
    if tolerance := DRAFT_TOLERANCE.get(model.dtype):
        is_equal = difference.max() <= tolerance * max(expected.abs().max().item(), 1.0)
    else:  # half precision: rounding may change a router's choice here and there
        is_equal = difference.mean() <= 0.05 * max(expected.std().item(), 1e-3)
    if not is_equal:
        raise ValueError(
            f"A {model.config.model_type!r} model of this config cannot draft: masks in the same forward change the "
            f"text's logits (by up to {difference.max().item():.3g}). Its attention does not follow the attention mask "
            "and the position ids."
        )


def _stock_logits(stock: Any, ids: torch.Tensor, source: Path) -> torch.Tensor:
    """The source's own logits. Raises ValueError where transformers cannot run it."""
    try:
        return _logits_and_states(stock, ids)[0]
    except Exception as error:  # model classes raise errors of any type
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{type(stock).__name__} cannot run as {source / 'config.json'} says ({type(error).__name__}: {reason}). "
            "Download config.json again."
        ) from error


def _logits_and_states(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [1, T, V] of a plain forward, and the last hidden states [1, T, D] they come from."""
    states: list[torch.Tensor] = []
    handle = decoder_of(model).register_forward_hook(
        lambda module, args, output: states.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    logits = model.eval()(input_ids=ids, use_cache=False).logits
    handle.remove()
    return logits, states[0]


def fewest_layers(config: PreTrainedConfig) -> int:
    """The number of first layers that include every kind of layer in the config."""
    kinds = [value for value in vars(config).values() if _is_per_layer(value, config)]
    firsts = [values.index(kind) + 1 for values in kinds for kind in values if isinstance(kind, str)]
    return min(max([FEWEST_LAYERS, *firsts]), config.num_hidden_layers)


def of_first_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """`first_layers` of the text, where a model has several parts."""
    if not is_composite(config):
        return first_layers(config, num_layers)
    text = first_layers(config.get_text_config(), num_layers)
    return type(config).from_dict(config.to_dict() | {"text_config": text.to_dict()})


def first_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The config of a model's first layers. Lists with one entry per layer are cut too."""
    values = config.to_dict()
    for key, value in values.items():
        if _is_per_layer(value, config):
            values[key] = value[:num_layers]
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = num_layers
    return type(config).from_dict(values)


def _is_per_layer(value: Any, config: PreTrainedConfig) -> bool:
    return isinstance(value, list) and len(value) == config.num_hidden_layers
