"""Tiny random models of text and images, stock and drafting, and inputs with an image."""

import copy

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
        "image_token_id": IMAGE, "video_token_id": 58, "vision_start_token_id": 59, "vision_end_token_id": 60,
    },
}  # fmt: skip


def tiny_composite(family, draft_length=4):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **copy.deepcopy(COMPOSITES[family]))
    stock = AutoModelForImageTextToText.from_config(config).eval()
    config = copy.deepcopy(config)
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
    ids = torch.cat([before, torch.tensor([[59]]), torch.full((1, 4), IMAGE), torch.tensor([[60]]), after], dim=1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    patches = torch.rand(16, 3 * 4 * 4, generator=generator)
    return given | {
        "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).int()
    }  # fmt: skip
