"""What teaching to draft costs beside plain fine-tuning: the same model, the same rows, one run.

    python benchmarks/training_speed.py models/SmolLM2-135M-Instruct-TiDAR

Each way of training stands in a process of its own, so that its peak memory is its own. A clean token is a token of a
row; its masks come on top and are not counted.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from wavedraft import DraftObjective, TiDARForCausalLM
from wavedraft.training import PaddingCollator, RowEncoder, gated_adapter_config, open_rows

WAYS = {"plain fine-tuning": None, "joint": "joint", "gated": "gated"}


def train(way: str, arguments: argparse.Namespace, answer: Any) -> None:
    """A few optimizer steps, the first of them a warm-up; puts [seconds of each, clean tokens of each, MiB]."""
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    mode = WAYS[way]
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
    options = {"dtype": dtype, "attn_implementation": arguments.attn_implementation}
    model_class: Any = TiDARForCausalLM if mode else AutoModelForCausalLM
    model = model_class.from_pretrained(arguments.model, **options)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    encode = RowEncoder(tokenizer, max_length=320, draft_length=8)
    chosen = list(open_rows(arguments.rows)())[:: arguments.every]
    rows = [row for written in chosen for row in encode(written)]
    model.has_objective = mode is not None
    if mode == "gated":
        model = get_peft_model(model, gated_adapter_config(model, arguments.rank))
    model.train()
    learnt = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-5, fused=True)
    collate = PaddingCollator(tokenizer.pad_token_id or 0)
    seconds, tokens = [], []
    for step in range(arguments.steps + 1):
        batch = collate(rows[step * arguments.batch_size : (step + 1) * arguments.batch_size])
        start = time.perf_counter()
        objective = {"objective": DraftObjective(mode=mode, first_token=step % 8)} if mode else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch, **objective).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        tokens.append(int(batch["attention_mask"].sum()))
    answer.put([seconds[1:], tokens[1:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    here = Path(__file__).resolve().parent.parent
    rows = here / "adapters" / "smollm2-135m-instruct-gated" / "self_written.jsonl"
    parser.add_argument("--rows", type=Path, default=rows)
    parser.add_argument("--every", type=int, default=100, help="takes one row of so many")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--attn-implementation", default="eager", help="eager, as `train` does on a CPU; or sdpa")
    parser.add_argument("--output", choices=["text", "json"], default="text")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    measured: dict[str, dict[str, float]] = {}
    for way in WAYS:
        answer = spawn.Queue()
        process = spawn.Process(target=train, args=(way, arguments, answer))
        process.start()
        seconds, tokens, memory = answer.get()
        process.join()
        measured[way] = {"tokens_per_second": sum(tokens) / sum(seconds), "peak_mib": memory}
        measured[way]["times_plain"] = (
            measured["plain fine-tuning"]["tokens_per_second"] / measured[way]["tokens_per_second"]
        )
    if arguments.output == "json":
        print(json.dumps(measured, indent=2))
        return
    title = f"{arguments.dtype}, {arguments.attn_implementation}, {arguments.threads} thread(s), {date.today()}"
    table = Table("", "clean tokens a second", "time of plain", "peak memory (MiB)", title=title)
    for way, figures in measured.items():
        table.add_row(
            way, f"{figures['tokens_per_second']:.0f}", f"{figures['times_plain']:.2f}x", f"{figures['peak_mib']:.0f}"
        )
    Console().print(table)
    print(platform.processor() or platform.machine())


if __name__ == "__main__":
    main()
