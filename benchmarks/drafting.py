"""Tokens per forward on held-out prompts, by really decoding: each kind, the worst, and all.

python benchmarks/drafting.py models/SmolLM2-135M-Instruct-TiDAR --adapter adapters/smollm2-135m-instruct-gated
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from wavedraft import TiDARForCausalLM
from wavedraft.training import DraftingReport, measure_drafting
from wavedraft.training.dialogue import read_jsonl
from wavedraft.training.finetune import chat_prompt_ids


def merged(reports: list[DraftingReport]) -> dict[str, float]:
    """Forwards and tokens summed over prompts; the share of identical texts."""
    num_tokens, num_forwards = sum(r.num_tokens for r in reports), sum(r.num_forwards for r in reports)
    return {
        "prompts": len(reports),
        "tokens": num_tokens,
        "forwards": num_forwards,
        "tokens_per_forward": num_tokens / num_forwards,
        "identical": sum(r.identical or 0 for r in reports) / len(reports),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--prompts", default=str(Path(__file__).with_name("prompts_heldout.jsonl")))
    parser.add_argument("--prompts-per-kind", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", help="write the figures here as JSON")
    arguments = parser.parse_args()

    model = TiDARForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.adapter:
        model.load_adapter(arguments.adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    kinds: dict[str, list[str]] = {}
    for row in read_jsonl(arguments.prompts):
        kinds.setdefault(row["kind"], []).append(row["prompt"])
    chosen = [(kind, prompt) for kind, prompts in kinds.items() for prompt in prompts[: arguments.prompts_per_kind]]
    reports: dict[str, list[DraftingReport]] = {kind: [] for kind in kinds}
    for kind, prompt in track(chosen, description="Decoding"):
        ids = [chat_prompt_ids(prompt, tokenizer)]
        reports[kind].append(measure_drafting(model, ids, arguments.max_new_tokens, compare_with_plain=True))

    figures = {kind: merged(of_kind) for kind, of_kind in reports.items()}
    figures["all"] = merged([report for of_kind in reports.values() for report in of_kind])
    table = Table("kind", "prompts", "tokens", "forwards", "tokens per forward", "identical to plain", box=None)
    for kind, row in figures.items():
        cells = [row["prompts"], row["tokens"], row["forwards"], f"{row['tokens_per_forward']:.2f}"]
        table.add_row(kind, *map(str, cells), f"{row['identical']:.0%}")
    Console().print(table)
    worst = min(kinds, key=lambda kind: figures[kind]["tokens_per_forward"])
    print(f"worst: {worst}, {figures[worst]['tokens_per_forward']:.2f} tokens per forward")
    if arguments.output:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
        about = {"date": date.today().isoformat(), "device": device, "torch": torch.__version__, **vars(arguments)}
        Path(arguments.output).write_text(json.dumps({"about": about, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
