"""Tiny drafting models, one call of `generate`, and all that its output says."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    CompileConfig,
)

from helpers_step_graph import Recording
from helpers_tidar import CountedForwards, random_prompts, tiny_tidar, with_random_head
from wavedraft.training import gated_adapter_config

CACHE = "past_key_values"
NUM_NEW = 24
# How far the rows of the embedding table lean towards one another, so that masks are right now and then.
LEANS = {"llama": 0.5, "qwen2": 0.2, "qwen3": 0.4, "mistral": 0.4, "gemma2": 0.6}
# Ids that end some rows of a family's batch early, others late or never.
ENDS = {"llama": [2, 20], "qwen2": [59, 60], "qwen3": [2, 59], "mistral": [36, 59], "gemma2": [41, 56]}
STATIC = {"cache_implementation": "static"}
CACHES = ("dynamic", "static", "compiled", "recorded")
HOWS = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "seed": 3}}
AXES: dict[str, tuple] = {
    "how": tuple(HOWS),
    "branches": (1, 2, None),
    "cache": CACHES,
    "adapter": ("bare", "gated", "head"),
    "rows": ("one", "ragged"),
}


@contextmanager
def recording_on_cpu() -> Iterator[None]:
    """Records steps on a CPU as CUDA graphs do. The one place here that reaches into the package."""
    from wavedraft.generation.step_graph import StepGraphs

    decoder = sys.modules["wavedraft.generation.drafting.decode_tidar"]
    kept = decoder.is_captured, StepGraphs.record
    decoder.is_captured, StepGraphs.record = (lambda model, config: config is not None), Recording
    try:
        yield
    finally:
        decoder.is_captured, StepGraphs.record = kept


def leaning(family: str = "llama", **changes: Any) -> Any:
    """A tiny model whose masks are right now and then."""
    model = tiny_tidar(family, **changes)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        shared = 0.2 * torch.randn(1, table.shape[1], generator=torch.Generator().manual_seed(1))
        table.copy_((1 - LEANS[family]) * table + LEANS[family] * shared)
    return model


def gated(model: Any, rank: int = 4) -> Any:
    """The model with a gated adapter of random weights."""
    peft_model = get_peft_model(model, gated_adapter_config(model, rank))
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft_model.eval()


def adapted(family: str, adapter: str, **changes: Any) -> Any:
    model = leaning(family, **changes)
    if adapter == "gated":
        return gated(model)
    return with_random_head(model, size=0.3) if adapter == "head" else model


def inputs(rows: str, family: str = "llama") -> dict[str, Any]:
    """One prompt, or three left-padded ones, whose rows end at end-of-sequence ids."""
    if rows == "one":
        return {"input_ids": random_prompts(1, 7)}
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    return {"input_ids": random_prompts(3, 7), "attention_mask": mask, "eos_token_id": ENDS[family]}


def compiled() -> dict[str, Any]:
    return STATIC | {"compile_config": CompileConfig(backend="eager", dynamic=False)}


def cache_keywords(cache: str) -> dict[str, Any]:
    return {} if cache == "dynamic" else STATIC if cache == "static" else compiled()


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def summary(tensor: torch.Tensor) -> dict[str, Any]:
    """Shape and size of a tensor's numbers, without those that are infinite."""
    flat = tensor.detach().double().flatten()
    finite = flat[flat.isfinite()]
    some = [rounded(x) for x in finite[:: max(1, len(finite) // 3)][:3].tolist()]
    size = rounded(finite.abs().sum().item())
    return {"shape": list(tensor.shape), "num_finite": len(finite), "size": size, "some": some}


def cache_summary(cache: Any, num_sure: int) -> dict[str, Any]:
    """The kind, shapes and numbers of a cache: of its first row, the first `num_sure` tokens."""
    layers = []
    for layer in cache.layers:
        told = {"keys": list(layer.keys.shape), "values": list(layer.values.shape)}
        if not getattr(layer, "is_sliding", False):
            told |= {"size": rounded(layer.values[0, :, :num_sure].double().abs().sum().item())}
        layers.append(told)
    return {"kind": type(cache).__name__, "length": int(cache.get_seq_length()), "layers": layers}


def told_of(output: Any, num_sure: int | None = None) -> dict[str, Any]:
    """All that one output says, as JSON."""
    if isinstance(output, torch.Tensor):
        return {"sequences": output.tolist()}
    told: dict[str, Any] = {"kind": type(output).__name__, "sequences": output.sequences.tolist()}
    for name in ("num_forwards", "num_prefill_forwards", "num_tie_forwards"):
        told |= {name: getattr(output, name)} if hasattr(output, name) else {}
    if getattr(output, "accepted_lengths", None) is not None:
        told["accepted_lengths"] = output.accepted_lengths.tolist()
        told["tokens_per_forward"] = [rounded(x) if x == x else None for x in output.tokens_per_forward.tolist()]
    for name in ("scores", "logits"):
        if output.get(name) is not None:
            told[name] = {"len": len(output[name])} | summary(torch.stack(output[name]))
    cache = output.get(CACHE)
    if cache is not None:
        is_one = len(output.sequences) == 1
        told["cache"] = cache_summary(cache, cache.get_seq_length() if is_one else num_sure or 0)
    return told


def ran(model: Any, is_counted: bool = True, **keywords: Any) -> dict[str, Any]:
    """One call of `generate`, and how wide the network's calls were, counted from outside. By default it drafts in the
    paper's form, so that neither the clock nor this machine's products show in what is frozen."""
    keywords = {"max_new_tokens": NUM_NEW, "return_dict_in_generate": True, "packed_weights": False} | keywords
    keywords["num_branches"] = keywords.get("num_branches") or "all"
    network = model.base_model.model if isinstance(model, PeftModel) else model
    counted = CountedForwards(network) if is_counted else None
    prompt = keywords["input_ids"] if "input_ids" in keywords else keywords["inputs_embeds"]
    told = told_of(model.generate(**keywords), prompt.shape[1])
    return told | ({"widths": counted.num_queries} if is_counted else {})
