"""Where a decode step's time goes, and what share of it is not the model: one line a policy.

    python benchmarks/profile_recurrent.py                                                   (the shipped model)
    python benchmarks/profile_recurrent.py --random 1024 --num-new 8 --prompt-length 16     (110M random weights)

Counted by timers around functions, behind the first token, in turns, medians of `--repeats`:

* engine: all that is outside the model's prelude, core steps and coda: windows, masks and rotations of positions,
  states drawn and moved, embeddings averaged, tokens chosen, what freezes, the text, the cache's bookkeeping, and
  transformers' own loop where it is plain decoding.
* products: inside the three parts, the linear layers and attention.
* norms: inside them, the norms.
* rest: what is left of the three parts: rotations, activations, residuals, keys and values stored, and the calls that
  bring all this about.

A timer costs what it measures a little (about 1 us a call), which is counted as the model's.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from bench_recurrent import PARTS, ROWS, SHIPPED, Run, Stopwatch, options_of, random_model, read_prompts, time_parts
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from wavedraft.modeling_recurrent import RecurrentDepthForCausalLM

POLICIES = (
    "full-depth AR, shared cache",
    "full-depth AR",
    "diffusion forcing, r'=2",
    "diffusion forcing, r'=4",
    "exact",
)


def time_layers(model: nn.Module, stopwatch: Stopwatch) -> None:
    """Times the model's linear layers, its attention and its norms."""
    attention = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation] = stopwatch.timed("products", attention)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = stopwatch.timed("products", module.forward)
        elif type(module).__name__.endswith("RMSNorm"):
            module.forward = stopwatch.timed("norms", module.forward)


def shares_of(run: Run) -> dict[str, float]:
    """Shares of a run's time that add up to one."""
    parts = {name: run.parts.get(name, 0.0) / run.seconds for name in (*PARTS, "products", "norms")}
    model = sum(parts[name] for name in PARTS)
    shares = {"engine": 1 - model, "products": parts["products"], "norms": parts["norms"]}
    return {**shares, "rest": model - parts["products"] - parts["norms"]}


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED), help="folder or Hub name of a recurrent-depth checkpoint")
    parser.add_argument("--random", type=int, help="instead of a checkpoint: random weights of this width")
    parser.add_argument("--prompts", default=str(SHIPPED / "prompts.txt"), help="text file, one prompt a line")
    parser.add_argument("--prompt-length", type=int, default=64, help="of random prompts")
    parser.add_argument("--num-new", type=int, default=32)
    parser.add_argument("--num-recurrences", type=int, help="full depth; the checkpoint's where absent, 32 at random")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", help="write the numbers here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.random is None:
        model = RecurrentDepthForCausalLM.from_pretrained(arguments.model)
    else:
        model = random_model(arguments.random, arguments.num_recurrences or 32)
    model = model.eval().to(arguments.device, getattr(torch, arguments.dtype))
    model.generation_config.eos_token_id = None
    depth = arguments.num_recurrences or model.config.mean_recurrence
    stopwatch = Stopwatch(model.device, arguments.clock)
    time_layers(model, stopwatch)
    time_parts(model, stopwatch)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters / 1e6:.1f} M parameters, {arguments.dtype}, {arguments.device}, depth {depth}")
    print(f"{'batch, policy':38}{'ms/step':>9}{'engine':>8}{'products':>10}{'norms':>7}{'rest':>6}")
    results: list[dict[str, Any]] = []
    for batch in arguments.batch:
        prompts = read_prompts(arguments, model, batch)
        runs: dict[str, list[Run]] = {name: [] for name in POLICIES}
        for _ in range(arguments.repeats):
            for name, own in runs.items():
                own.append(Run(model, stopwatch, prompts, arguments.num_new, options_of(ROWS[name], depth)))
        for name, own in runs.items():
            every = [shares_of(run) for run in own]
            shares = {share: statistics.median(one[share] for one in every) for share in every[0]}
            ms = 1e3 * statistics.median(run.seconds for run in own) / own[0].output.num_steps
            results.append({"batch": batch, "policy": name, "ms_per_step": ms, **shares})
            columns = "".join(f"{shares[share]:{width}.1%}" for share, width in zip(shares, (8, 10, 7, 6), strict=True))
            print(f"{batch:3}, {name:33}{ms:9.2f}{columns}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
