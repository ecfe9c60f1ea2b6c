"""Where a TiDAR step's time goes at batch 1, and what share of it is not the model; what drafts add to a prefill.

    python benchmarks/profile_step.py models/SmolLM2-135M-Instruct-TiDAR --adapter adapters/smollm2-135m-instruct-gated

Counted by timers around functions (the prefill taken off), or, with --prefill, by the first token's time beside a stock
model's, in turns, medians:

* engine: all of the decode outside the network (masks built, drafts chosen and verified, the text), and inside it the
  keys and values stored.
* draft head: choosing candidates, and each token of a draft after the one before it.
* products: linear layers (the lm_head too) and attention. adapter: its products at the mask tokens.
* rest: what is left of the network: norms, rotations, activations, residuals and the calls that bring them about.

The network of a compiled step cannot be looked into: products, adapter and rest are one figure there.
"""

import argparse
import json
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_recurrent import Stopwatch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

from wavedraft import TiDARForCausalLM
from wavedraft.generation.drafting import draft_cache
from wavedraft.generation.drafting.draft_head import DraftChain
from wavedraft.generation.execution import gated_linear
from wavedraft.generation.execution.packed_linear import PackedLinear
from wavedraft.generation.kept_with_model import kept_with
from wavedraft.training import prompt_ids, read_prompts

PACKED = {"packed_weights": True}
COMPILED = {"cache_implementation": "static", "compile_config": CompileConfig(mode="default", dynamic=False)}
MODES = {
    "no drafts": {"draft_length": 0},
    "K=4 B=1": {"draft_length": 4, "num_branches": 1},
    "K=8 B=3": {"draft_length": 8, "num_branches": 3},
    "K=8 B=8": {"draft_length": 8},
    "auto": {"num_branches": "auto"},
}
MODES |= {f"{name} packed": keywords | PACKED for name, keywords in MODES.items()}
MODES["auto compiled packed"] = MODES["auto packed"] | {"draft_length": 4} | COMPILED
MODES["K=4 B=1 compiled"] = MODES["K=4 B=1"] | COMPILED
MODES["K=4 B=1 compiled packed"] = MODES["K=4 B=1 packed"] | COMPILED
SHARES = ("engine", "draft head", "products", "adapter", "rest")


@contextmanager
def timers(model: Any, stopwatch: Stopwatch, is_packed: bool, is_compiled: bool):
    """Timers around the functions of a decode; inside compiled layers there are none.

    The lm_head is timed by hooks: its packed copy, once a decode has made it.
    """
    head = kept_with(model).copies[model.lm_head] if is_packed else model.lm_head
    places = [(type(model.model), "forward", "decoder")]
    places += [(DraftChain, "__init__", "draft head"), (DraftChain, "logits_after", "draft head")]
    if not is_compiled:
        places += [
            (draft_cache.DraftCacheLayer, "update", "cache"),
            (nn.functional, "scaled_dot_product_attention", "products"),
            (gated_linear, "product", "adapter"),
            (gated_linear, "packed_product", "adapter"),
        ]
    kept = [(place, name, getattr(place, name)) for place, name, _ in places]
    # A packed layer reads a single token in float32 by its plain weight, which counts as rest.
    products = [(nn.Linear, "forward"), (PackedLinear, "both")]
    kept += [(linear, name, getattr(linear, name)) for linear, name in products]
    for place, name, called in places:
        setattr(place, name, stopwatch.timed(called, getattr(place, name)))
    starts: list[float] = []
    hooks = [
        head.register_forward_pre_hook(lambda *args: starts.append(stopwatch.now())),
        head.register_forward_hook(lambda *args: stopwatch.add("head", stopwatch.now() - starts.pop())),
    ]
    if not is_compiled:
        for linear, name in products:
            plain = getattr(linear, name)
            setattr(linear, name, without(head, plain, stopwatch.timed("products", plain)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for place, name, function in kept:
            setattr(place, name, function)


def without(head: nn.Module, plain: Any, timed: Any) -> Any:
    """The timed product of every layer but the lm_head."""
    return lambda self, x: plain(self, x) if self is head else timed(self, x)


def step_of(model: Any, ids: torch.Tensor, keywords: dict[str, Any], num_new: int) -> dict[str, float]:
    """Milliseconds of a step, and shares of it, the prefill taken off."""
    is_packed, is_compiled = "packed_weights" in keywords, "compile_config" in keywords
    runs = []
    for length in (1, num_new):
        stopwatch = Stopwatch(model.device, "wall")
        with timers(model, stopwatch, is_packed, is_compiled):
            begin = time.perf_counter()
            output = generate(model, ids, keywords, length)
            stopwatch.seconds["all"] = time.perf_counter() - begin
        runs.append((stopwatch.seconds, getattr(output, "num_forwards", length)))
    (first, num_first), (whole, num_whole) = runs
    seconds = {name: whole[name] - first.get(name, 0.0) for name in whole}
    network = seconds["decoder"] + seconds["head"] - seconds.get("cache", 0.0)
    products = seconds.get("products", 0.0) + seconds["head"]
    head = seconds.get("draft head", 0.0)
    parts = {"engine": seconds["all"] - network - head, "draft head": head, "products": products}
    parts["adapter"] = seconds.get("adapter", 0.0)
    parts["rest"] = network - parts["products"] - parts["adapter"]
    shares = {name: part / seconds["all"] for name, part in parts.items()}
    return {"ms": 1e3 * seconds["all"] / (num_whole - num_first), **shares}


def generate(model: Any, ids: torch.Tensor, keywords: dict[str, Any], num_new: int) -> Any:
    options = {"do_sample": False, "max_new_tokens": num_new, "return_dict_in_generate": True, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options, **keywords)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--prompts", default=str(Path(__file__).with_name("prompts_heldout.jsonl")))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--num-new", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prefill", type=int, nargs="+", help="lengths of prompts: times the first token alone")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", help="write the numbers here too")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    model = TiDARForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    if arguments.adapter:
        model.load_adapter(arguments.adapter)
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = [prompt_ids(row, tokenizer) for row in read_prompts(arguments.prompts)]
    with torch.no_grad():
        if arguments.prefill:
            stock = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
            stock.generation_config.eos_token_id = None
            results, table = prefills(arguments, model, stock, torch.cat(texts * 20)[None])
        else:
            results, table = steps(arguments, model, texts[0][None])
    Console().print(table)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "results": results}, indent=1) + "\n")


def steps(arguments: Any, model: Any, ids: torch.Tensor) -> tuple[Any, Table]:
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in arguments.modes}
    for mode in arguments.modes:
        generate(model, ids, MODES[mode], arguments.num_new)
    for _ in range(arguments.repeats):
        for mode, own in found.items():
            own.append(step_of(model, ids, MODES[mode], arguments.num_new))
    table = Table("step", "ms", *SHARES, box=None)
    results = {}
    for mode, own in found.items():
        results[mode] = {name: median(one[name] for one in own) for name in own[0]}
        is_compiled = "compiled" in mode
        shares = [f"{results[mode][name]:.1%}" for name in SHARES]
        network = 1 - results[mode]["engine"] - results[mode]["draft head"]
        cells = [*shares[:2], *((f"network {network:.1%}", "", "") if is_compiled else shares[2:])]
        table.add_row(mode, f"{results[mode]['ms']:.1f}", *cells)
    return results, table


def prefills(arguments: Any, model: Any, stock: Any, text: torch.Tensor) -> tuple[Any, Table]:
    table = Table("prompt tokens", "stock ms", *arguments.modes, box=None)
    results = []
    for length in arguments.prefill:
        ids = text[:, :length]
        modes = {"stock": (stock, {}), **{mode: (model, MODES[mode]) for mode in arguments.modes}}
        seconds: dict[str, list[float]] = {mode: [] for mode in modes}
        for turn in range(arguments.repeats + 1):
            for mode, (of, keywords) in modes.items():
                begin = time.perf_counter()
                generate(of, ids, keywords, 1)
                if turn:  # the first warms up
                    seconds[mode].append(time.perf_counter() - begin)
        middle = {mode: median(taken) for mode, taken in seconds.items()}
        results.append({"prompt_tokens": length, **middle})
        ratios = [f"{middle[mode] / middle['stock']:.2f}x" for mode in arguments.modes]
        table.add_row(str(length), f"{1e3 * middle['stock']:.0f}", *ratios)
    return results, table


if __name__ == "__main__":
    main()
