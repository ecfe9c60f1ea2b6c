"""Seconds beside a stock model: drafts of several lengths and branches, `auto`, compiled steps, packed weights.

python benchmarks/branches.py models/SmolLM2-135M-Instruct-TiDAR --adapter adapters/smollm2-135m-instruct-gated

All modes in one process, each prompt in every mode before the next prompt, in an order that turns. Processor time is
given beside wall time: on a shared machine it is the steadier of the two (with one thread; set OMP_NUM_THREADS=1).
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

from wavedraft import TiDARForCausalLM
from wavedraft.training import prompt_ids, read_prompts

COMPILED = {"cache_implementation": "static", "compile_config": CompileConfig(mode="default", dynamic=False)}
MODES = {
    "stock": {},
    "plain": {"draft_length": 0},
    "K=8 B=8": {"draft_length": 8},
    **{f"K=8 B={branches}": {"draft_length": 8, "num_branches": branches} for branches in (1, 2, 3)},
    **{f"K=4 B={branches}": {"draft_length": 4, "num_branches": branches} for branches in (1, 2, 3, 4)},
    **{f"K=2 B={branches}": {"draft_length": 2, "num_branches": branches} for branches in (1, 2)},
    "auto": {"num_branches": "auto"},
    **{f"K={k} B=1 compiled": {"draft_length": k, "num_branches": 1, **COMPILED} for k in (2, 4, 8)},
    "K=4 auto compiled": {"draft_length": 4, "num_branches": "auto", **COMPILED},
}
PACKED = ("plain", "K=4 B=1", "auto", "K=4 B=1 compiled", "K=4 auto compiled")
MODES |= {f"{mode} packed": {**MODES[mode], "packed_weights": True} for mode in PACKED}


@dataclass
class Total:
    """Sums over the prompts of one mode; the prefill is timed with the rest."""

    num_tokens: int = 0
    num_forwards: int = 0
    wall_seconds: float = 0.0
    processor_seconds: float = 0.0
    num_identical: int = 0


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, its wall seconds and its processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--prompts", default=str(Path(__file__).with_name("prompts_heldout.jsonl")))
    parser.add_argument("--num-prompts", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", help="write the figures here as JSON")
    arguments = parser.parse_args()

    model = TiDARForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.adapter:
        model.load_adapter(arguments.adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompts = [prompt_ids(row, tokenizer)[None].to(model.device) for row in read_prompts(arguments.prompts)]
    stock = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=model.dtype).eval().to(model.device)
    model.generation_config.eos_token_id = stock.generation_config.eos_token_id = None  # texts of one length
    common = {"do_sample": False, "max_new_tokens": arguments.max_new_tokens}

    def generate(ids: torch.Tensor, mode: str, **changes: Any) -> Any:
        options = {**common, **MODES[mode], **changes}
        of = stock if mode == "stock" else model
        return of.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options)

    for mode in arguments.modes:  # warms up; measures the costs `auto` goes by; compiles every shape
        for ids in prompts[: arguments.num_prompts if "compiled" in mode else 1]:
            generate(ids, mode)
    totals = {mode: Total() for mode in arguments.modes}
    for place, ids in enumerate(prompts[: arguments.num_prompts]):
        plain = generate(ids, "stock").sequences
        turn = place % len(arguments.modes)
        for mode in arguments.modes[turn:] + arguments.modes[:turn]:
            output, wall, processor = timed(lambda ids=ids, mode=mode: generate(ids, mode))
            total = totals[mode]
            total.num_tokens += output.sequences.shape[1] - ids.shape[1]
            total.num_forwards += getattr(output, "num_forwards", None) or arguments.max_new_tokens - 1
            total.wall_seconds += wall
            total.processor_seconds += processor
            total.num_identical += torch.equal(output.sequences, plain)
            print(f"{place} {mode}: {wall:.2f} s, processor {processor:.2f} s", flush=True)

    columns = ["mode", "tokens per forward", "tokens/s", "wall, to stock", "processor, to stock", "identical"]
    table = Table(*columns, box=None)
    base = totals.get("stock", totals[arguments.modes[0]])
    for mode, total in totals.items():
        cells = [
            f"{(total.num_tokens - arguments.num_prompts) / total.num_forwards:.2f}",
            f"{total.num_tokens / total.wall_seconds:.1f}",
            f"{base.wall_seconds / total.wall_seconds:.2f}x",
            f"{base.processor_seconds / total.processor_seconds:.2f}x",
            f"{total.num_identical / arguments.num_prompts:.0%}",
        ]
        table.add_row(mode, *cells)
    Console().print(table)
    if arguments.output:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
        about = {"date": date.today().isoformat(), "device": device, "torch": torch.__version__, **vars(arguments)}
        figures = {mode: asdict(total) for mode, total in totals.items()}
        Path(arguments.output).write_text(json.dumps({"about": about, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
