"""Tokens per forward on held-out prompts, by really decoding: each kind, the worst, and all.

python benchmarks/drafting.py models/SmolLM2-135M-Instruct-TiDAR --adapter adapters/smollm2-135m-instruct-gated

With `--exact tie-safe --dtype bfloat16` each prompt is decoded in that mode as well. With `--copies` each is decoded
with and without drafts copied from the text; their ratio has a 95 % interval by a bootstrap over prompts:

python benchmarks/drafting.py MODEL --adapter ADAPTER --copies --prompts benchmarks/prompts_repeats.jsonl
"""

import argparse
import json
import platform
import random
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from wavedraft import TiDARForCausalLM
from wavedraft.training import Row, prompt_ids, read_prompts

NUM_DRAWS = 2000  # of the bootstrap
COPIES = "with copies"


@dataclass
class Decoded:
    """One prompt in one mode: the tokens its decode forwards decided, their number, and whether the text is plain's."""

    num_tokens: int
    num_forwards: int
    num_tie_forwards: int
    is_identical: bool


def decode(model: Any, ids: torch.Tensor, plain: torch.Tensor, **options: Any) -> Decoded:
    options = {"draft_copies": False, "do_sample": False, "num_branches": "all"} | options
    options["return_dict_in_generate"] = True
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    is_identical = torch.equal(output.sequences, plain)
    num_tokens = output.sequences.shape[1] - ids.shape[1] - 1
    return Decoded(num_tokens, output.num_forwards, output.num_tie_forwards, is_identical)


def merged(runs: list[Decoded]) -> dict[str, float]:
    """Forwards and tokens summed over prompts; the share of identical texts."""
    num_tokens, num_forwards = sum(run.num_tokens for run in runs), sum(run.num_forwards for run in runs)
    num_tie_forwards = sum(run.num_tie_forwards for run in runs)
    return {
        "prompts": len(runs),
        "tokens": num_tokens,
        "forwards": num_forwards,
        "tie_forwards": num_tie_forwards,
        "tokens_per_forward": num_tokens / (num_forwards + num_tie_forwards),
        "identical": sum(run.is_identical for run in runs) / len(runs),
    }


def gain(without: list[Decoded], with_copies: list[Decoded]) -> tuple[float, float, float]:
    """Tokens per forward with copies over those without: of all prompts, and the ends of the 95 % interval."""

    def ratio(pairs: list[tuple[Decoded, Decoded]]) -> float:
        before, after = (merged(list(runs))["tokens_per_forward"] for runs in zip(*pairs, strict=True))
        return after / before

    pairs, draw = list(zip(without, with_copies, strict=True)), random.Random(0)
    ratios = sorted(ratio(draw.choices(pairs, k=len(pairs))) for _ in range(NUM_DRAWS))
    return ratio(pairs), ratios[NUM_DRAWS // 40], ratios[-1 - NUM_DRAWS // 40]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--prompts", default=str(Path(__file__).with_name("prompts_heldout.jsonl")))
    parser.add_argument("--prompts-per-kind", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--draft-length", type=int, help="by default the checkpoint's")
    parser.add_argument("--exact", choices=["tie-safe"], help="decode in this mode as well")
    parser.add_argument("--copies", action="store_true", help="decode with copied drafts as well")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", help="write the figures here as JSON")
    arguments = parser.parse_args()

    model = TiDARForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.adapter:
        model.load_adapter(arguments.adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    kinds: dict[str, list[Row]] = {}
    for row in read_prompts(arguments.prompts):
        kinds.setdefault(row.kind or "all", []).append(row)
    chosen = [(kind, prompt) for kind, prompts in kinds.items() for prompt in prompts[: arguments.prompts_per_kind]]
    common = {"max_new_tokens": arguments.max_new_tokens, "draft_length": arguments.draft_length}
    modes: dict[str, dict[str, Any]] = {"": {}} | (
        {arguments.exact: {"exact": arguments.exact}} if arguments.exact else {}
    )
    modes |= {COPIES: {"draft_copies": True}} if arguments.copies else {}
    runs: dict[str, dict[str, list[Decoded]]] = {mode: {kind: [] for kind in kinds} for mode in modes}
    for kind, prompt in track(chosen, description="Decoding"):
        ids = prompt_ids(prompt, tokenizer)[None].to(model.device)
        mask = torch.ones_like(ids)
        plain = model.generate(ids, attention_mask=mask, do_sample=False, **common | {"draft_length": 0})
        for mode, options in modes.items():
            runs[mode][kind].append(decode(model, ids, plain, **common, **options))

    figures: dict[str, dict[str, float]] = {}
    for mode, of_kinds in runs.items():
        of_kinds = of_kinds | {"all": [run for of_kind in of_kinds.values() for run in of_kind]}
        figures |= {f"{kind} {mode}".strip(): merged(of_kind) for kind, of_kind in of_kinds.items()}
    columns = ["kind", "prompts", "tokens", "forwards", "tie forwards", "tokens per forward", "identical to plain"]
    table = Table(*columns, box=None)
    for kind, row in figures.items():
        cells = [row[name] for name in ("prompts", "tokens", "forwards", "tie_forwards")]
        table.add_row(kind, *map(str, cells), f"{row['tokens_per_forward']:.2f}", f"{row['identical']:.0%}")
    Console().print(table)
    for kind in (*kinds, "all") if arguments.copies else ():
        without, copied = ([run for name, of_kind in runs[mode].items() if kind in (name, "all") for run in of_kind]
                           for mode in ("", COPIES))  # fmt: skip
        mean, low, high = gain(without, copied)
        figures[f"{kind} {COPIES}"] |= {"gain": mean, "low": low, "high": high}
        print(f"{kind}: copies bring {mean:.2f} times the tokens per forward ({low:.2f} to {high:.2f})")
    worst = min(kinds, key=lambda kind: figures[kind]["tokens_per_forward"])
    print(f"worst: {worst}, {figures[worst]['tokens_per_forward']:.2f} tokens per forward")
    if arguments.output:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
        about = {"date": date.today().isoformat(), "device": device, "torch": torch.__version__, **vars(arguments)}
        Path(arguments.output).write_text(json.dumps({"about": about, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
