"""Tiny random models of text and images, stock and drafting, and inputs with an image."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from helpers_tidar import SHAPE
from wavedraft import TiDARForCausalLM

TEXT = {name: value for name, value in SHAPE.items() if name not in ("bos_token_id", "eos_token_id")}
EYE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 4}
IMAGE = 57
BOTH, ROPE = ["sliding_attention", "full_attention"], {"rope_type": "default", "rope_theta": 1e4}
QWEN_EYE = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32,
    "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3, "fullatt_block_indexes": [0],
    "window_size": 16, "tokens_per_second": 2,
}  # fmt: skip
QWEN_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": 58, "vision_start_token_id": 59, "vision_end_token_id": 60,
}  # fmt: skip
COMPOSITES = {
    "gemma3": {
        "text_config": TEXT | {"head_dim": 8, "sliding_window": 9, "layer_types": BOTH},
        "vision_config": EYE | {"image_size": 16, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4, "image_token_index": IMAGE, "image_token_id": IMAGE,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "head_dim": 8, "sliding_window": None},
        "vision_config": EYE | {"image_size": 16, "model_type": "pixtral", "head_dim": 8},
        "image_token_index": IMAGE, "image_token_id": IMAGE, "spatial_merge_size": 2,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
        "vision_config": QWEN_EYE,
        **QWEN_TOKENS,
    },
    "qwen2_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
        "vision_config": QWEN_EYE | {"hidden_size": 32, "embed_dim": 32, "mlp_ratio": 2},
        **QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": TEXT | {
            "head_dim": 8, "rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
        },
        "vision_config": QWEN_EYE | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **QWEN_TOKENS,
    },
    "qwen3_5": {
        "text_config": TEXT | {
            "head_dim": 8, "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": ROPE | {
                "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 1.0,
            },
        },
        "vision_config": QWEN_EYE | {"num_position_embeddings": 16},
        **QWEN_TOKENS,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": EYE | {"image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"},
        "image_token_index": IMAGE, "image_token_id": IMAGE, "vision_feature_layer": -1, "image_seq_length": 4,
    },
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": EYE | {"image_size": [16, 16], "patch_size": [4, 4], "model_type": "internvl_vision"},
        "image_token_id": IMAGE, "image_seq_length": 4,
    },
}  # fmt: skip
TEXT_ONLY = {
    "aya_vision": {
        "text_config": TEXT | {"model_type": "cohere2", "layer_types": BOTH, "sliding_window": 9},
        "vision_config": EYE | {"image_size": 16, "model_type": "siglip_vision_model"},
        "image_token_index": IMAGE, "image_token_id": IMAGE,
    },
    "cohere2_vision": {
        "text_config": TEXT | {"model_type": "cohere2", "layer_types": BOTH, "sliding_window": 9},
        "vision_config": EYE | {"image_size": 16, "model_type": "siglip_vision_model"},
        "image_token_id": IMAGE, "alignment_intermediate_size": 64,
    },
    "idefics3": {
        "text_config": TEXT | {"model_type": "llama"}, "vision_config": EYE | {"image_size": 16},
        "image_token_id": IMAGE,
    },
    "smolvlm": {
        "text_config": TEXT | {"model_type": "llama"}, "vision_config": EYE | {"image_size": 16},
        "image_token_id": IMAGE,
    },
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
}  # fmt: skip
for dense in ("qwen3_vl", "qwen3_5"):
    COMPOSITES[f"{dense}_moe"] = COMPOSITES[dense] | {"text_config": COMPOSITES[dense]["text_config"] | EXPERTS}
QUICK = {"gemma3", "qwen2_5_vl"}  # the others are of the slow tests
EVERY_COMPOSITE = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in COMPOSITES]
QWEN = {name for name, values in COMPOSITES.items() if "video_token_id" in values}


def tiny_stock_composite(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **copy.deepcopy((COMPOSITES | TEXT_ONLY)[family]))
    return AutoModelForImageTextToText.from_config(config).eval()


def tiny_composite(family, draft_length=4):
    stock = tiny_stock_composite(family)
    config = copy.deepcopy(stock.config)
    config.tidar_config = {"draft_length": draft_length, "mask_token_id": 61, "mask_embedding_id": 3}
    model = TiDARForCausalLM.from_config(config).eval()
    model.load_state_dict(stock.state_dict())
    for one in (stock, model):
        one.generation_config.pad_token_id, one.generation_config.eos_token_id = 0, None
    return stock, model


def with_image(family, seed=0):
    """A prompt with an image in it, as the family's processor makes it."""
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.randint(1, 57, (1, 5), generator=generator) for _ in range(2))
    ids = torch.cat([before, torch.full((1, 4), IMAGE), after], dim=1)
    pixels = torch.rand(1, 3, 16, 16, generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "gemma3":
        return given | {"pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}
    if family == "mistral3":
        return given | {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 16]])}
    if family not in QWEN:
        return given | {"pixel_values": pixels}
    ids = torch.cat([before, torch.tensor([[59]]), torch.full((1, 4), IMAGE), torch.tensor([[60]]), after], dim=1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    patches = torch.rand(16, 3 * 4 * 4, generator=generator)
    return given | {
        "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).int()
    }  # fmt: skip


TYPES = ("token_type_ids", "mm_token_type_ids")


def followed_by(given, ids):
    """The inputs with more ids of text at the end."""
    found, num_more = dict(given), ids.shape[1]
    found["input_ids"] = torch.cat([given["input_ids"], ids], dim=1)
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    for name in TYPES:
        if name in given:
            found[name] = torch.nn.functional.pad(given[name], (0, num_more))
    return found


def ragged(family):
    """Two rows of different lengths, an image in each, padded on the left."""
    longer, shorter = followed_by(with_image(family), torch.tensor([[5, 6, 7]])), with_image(family, seed=2)
    shape = shorter["input_ids"].shape
    shorter = {
        name: torch.nn.functional.pad(one, (3, 0)) if one.shape == shape else one for name, one in shorter.items()
    }
    return {name: torch.cat([longer[name], shorter[name]]) for name in longer}


def second_turn(family, sequences):
    """What follows a first turn of `with_image`: all ids so far, a second prompt, and its image alone."""
    first, second = with_image(family), with_image(family, seed=2)
    given = second | {"input_ids": torch.cat([sequences, second["input_ids"]], dim=1)}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    for name in TYPES:
        if name in first:
            num_new = sequences.shape[1] - first[name].shape[1]
            given[name] = torch.cat([torch.nn.functional.pad(first[name], (0, num_new)), second[name]], dim=1)
    return given
