"""What each policy of a retrofitted model saves, and how much of full depth's text it keeps: for retrofit.py."""

from pathlib import Path
from typing import Any

import torch

from wavedraft import RecurrentDepthForCausalLM

ROWS: dict[str, dict[str, Any]] = {
    "full depth": {"policy": "autoregressive"},
    "full depth, last keys alone": {"policy": "autoregressive", "kv_cache": "latest-only"},
    **{f"depth {depth}": {"policy": "autoregressive", "num_recurrences": depth} for depth in (4, 2, 1)},
    "exact": {"policy": "exact"},
    "self-speculative": {"policy": "self-speculative"},
    "self-speculative, drafts at depth 1": {"policy": "self-speculative", "draft_recurrences": (1,)},
    "adaptive": {"policy": "adaptive"},
    **{f"diffusion forcing, r'={inner}": {"policy": "diffusion-forcing", "inner_recurrence": inner}
       for inner in (1, 2, 4)},
}  # fmt: skip


def decoded(model: Any, prompts: list[torch.Tensor], num_new: int, options: dict[str, Any]) -> dict[str, Any]:
    """New tokens after each prompt, and core passes after the reading of the prompts."""
    keywords = {"init_scale": 0.0, "do_sample": False, "max_new_tokens": num_new, **options}
    texts, num_passes = [], 0
    for ids in prompts:
        output = model.generate(
            ids[None], attention_mask=torch.ones_like(ids)[None], return_dict_in_generate=True, **keywords
        )
        texts.append(output.sequences[0, len(ids) :].tolist())
        num_passes += output.num_core_passes
    return {"texts": texts, "passes": num_passes}


def by_each_policy(folder: Path, prompts: list[torch.Tensor], num_new: int) -> dict[str, dict[str, float]]:
    """Core passes a token, tokens per forward of full depth, and texts and tokens that are full depth's, in float32."""
    model = RecurrentDepthForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lines: dict[str, dict[str, float]] = {}
    truth: list[list[int]] = []
    for name, options in ROWS.items():
        found = decoded(model, prompts, num_new, options)
        truth = truth or found["texts"]
        passes = found["passes"] / max(1, sum(len(text) - 1 for text in found["texts"]))
        pairs = list(zip(truth, found["texts"], strict=True))
        num_equal = sum(sum(map(int.__eq__, *pair)) for pair in pairs)
        lines[name] = {"passes": passes, "per_forward": model.config.mean_recurrence / passes,
                       "texts": sum(one == other for one, other in pairs),
                       "tokens": num_equal / sum(map(len, truth))}  # fmt: skip
        print(f"{name}: {lines[name]}", flush=True)
    return lines
