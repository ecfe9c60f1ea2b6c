"""Measures drafts over a recurrent depth: tokens per forward and per core pass, compared with the model's own decoders.

    python experiments/recurrent_drafts/drafting_recurrent.py checkpoints/austen-recurrent-6m runs/austen-drafts \\
        --prompts checkpoints/austen-recurrent-6m/prompts.txt

A forward of the drafting model takes the core passes of full depth. A hook counts core passes and their positions,
without those of the prompts. Float32, one row at a time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from stock_recurrent import drafting_model
from wavedraft import RecurrentDepthForCausalLM
from wavedraft.conversion.mask_token import mask_embedding_id


class CorePasses:
    """Counts core steps and their tokens with a hook."""

    def __init__(self, model: Any):
        self.widths: list[int] = []
        model.transformer["adapter"].register_forward_hook(
            lambda module, args, output: self.widths.append(args[0].shape[0] * args[0].shape[1])
        )


def load(name: str, draft_length: int, mask_recurrences: int | None = None) -> tuple[Any, Any]:
    """Two float32 models of a recurrent-depth checkpoint: the plain model, and one that drafts with masks."""
    plain = RecurrentDepthForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    config = plain.config
    row, _ = mask_embedding_id(
        AutoTokenizer.from_pretrained(name), config.vocab_size, [config.eos_token_id], lambda row: False
    )
    return plain, drafting_model(plain, draft_length, row, mask_recurrences)


def drafted(model: Any, rows: list[torch.Tensor], passes: CorePasses, plain: list[list[int]] | None, **options: Any):
    """Totals over the prompts."""
    num_tokens = num_forwards = num_passes = num_positions = num_identical = 0
    depth = model.config.mean_recurrence
    for place, ids in enumerate(rows):
        passes.widths.clear()
        output = model.generate(ids, return_dict_in_generate=True, **options)
        text = output.sequences[0, ids.shape[1] :].tolist()
        num_tokens += len(text) - 1
        num_forwards += output.num_forwards
        num_passes += len(passes.widths) - depth  # the first `depth` passes read the prompt
        num_positions += sum(passes.widths[depth:])
        num_identical += plain is not None and text == plain[place]
    return {
        "tokens": num_tokens,
        "tokens_per_forward": num_tokens / num_forwards,
        "core_passes_per_token": num_passes / num_tokens,
        "positions_per_token": num_positions / num_tokens,
        "identical": None if plain is None else f"{num_identical}/{len(rows)}",
    }


def main() -> None:
    """Decodes, counts, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a recurrent-depth checkpoint")
    parser.add_argument("adapter", help="the output of teach.py for it")
    parser.add_argument("--prompts", type=Path, required=True, help="a text file, one per line")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="0 decodes greedily")
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--mask-recurrences", type=int, nargs="+", default=[4, 0], help="0: all")
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    lines = [line for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line]
    rows = [tokenizer(line, return_tensors="pt")["input_ids"] for line in lines]
    plain_model, model = load(arguments.model, max(arguments.draft_lengths))
    model.load_adapter(arguments.adapter)
    passes = CorePasses(model)
    found = []

    def show(name: str, temperature: float, figures: dict[str, Any]) -> None:
        found.append({"decoding": name, "temperature": temperature, **figures})
        told = (
            f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
        )
        print(f"T={temperature} {name}: {', '.join(told)}", flush=True)

    length = {"max_new_tokens": arguments.max_new_tokens, "eos_token_id": None, "pad_token_id": 0}
    for temperature in arguments.temperatures:
        options = {**length, "do_sample": temperature > 0, **({"temperature": temperature} if temperature else {})}
        plain = None
        if not temperature:
            texts = [plain_model.generate(ids, policy="autoregressive", **options) for ids in rows]
            plain = [text[0, ids.shape[1] :].tolist() for text, ids in zip(texts, rows, strict=True)]
        seeded = {"seed": 0, "top_k": 0} if temperature else {}
        for policy in ("exact", "diffusion-forcing"):
            num_tokens = num_passes = num_identical = 0
            for place, ids in enumerate(rows):
                output = plain_model.generate(ids, policy=policy, return_dict_in_generate=True, **options, **seeded)
                text = output.sequences[0, ids.shape[1] :].tolist()
                num_tokens, num_passes = num_tokens + len(text) - 1, num_passes + output.num_core_passes
                num_identical += plain is not None and text == plain[place]
            figures = {"tokens": num_tokens, "core_passes_per_token": num_passes / num_tokens}
            show(policy, temperature, figures | {"identical": plain and f"{num_identical}/{len(rows)}"})
        for mask_recurrences in arguments.mask_recurrences:
            model.mask_recurrences = mask_recurrences or None
            for draft_length in arguments.draft_lengths:
                name = f"TiDAR K={draft_length}, masks through {mask_recurrences or 'all'} recurrences"
                own = {**options, **seeded, "draft_length": draft_length}
                show(name, temperature, drafted(model, rows, passes, plain, **own))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
