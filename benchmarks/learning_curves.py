"""Tokens per forward against text learned: losses, ranks, draft lengths; and joint training beside plain fine-tuning.

    python benchmarks/learning_curves.py models/SmolLM2-135M-Instruct-TiDAR build/curves
    python benchmarks/learning_curves.py models/SmolLM2-135M-Instruct-TiDAR build/curves --only joint

Every run begins at the converted checkpoint, reads the same rows in the same order with the same learning rate, and is
stopped every `--every` steps to decode held-out prompts, greedily and with all branches. Each leaves a JSON file in the
folder when it is done, and one that is there is not run again; curves.png shows all of them. Perplexity is the plain
model's: of held-out rows that the base model wrote, and of Jane Austen's text, which it did not.
"""

import argparse
import json
import platform
import random
import time
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from wavedraft import DraftObjective, TiDARForCausalLM
from wavedraft.training import (
    PaddingCollator,
    RowEncoder,
    gated_adapter_config,
    open_rows,
    prompt_ids,
    read_prompts,
)
from wavedraft.training.trainer_tidar import measure_drafting

ROOT = Path(__file__).parents[1]
WRITTEN = ROOT / "adapters" / "smollm2-135m-instruct-gated" / "self_written.jsonl"
AUSTEN = ROOT / "checkpoints" / "austen-recurrent-6m" / "prompts.txt"
USUAL: dict[str, Any] = {"mode": "gated", "loss": "cross_entropy", "rank": 32, "draft_length": 8, "learning_rate": 1e-3}
RUNS = {
    "cross-entropy, rank 32, K=8": USUAL,
    "KL, rank 32, K=8": USUAL | {"loss": "kl"},
    "TV, rank 32, K=8": USUAL | {"loss": "tv"},
    "cross-entropy, rank 8, K=8": USUAL | {"rank": 8},
    "cross-entropy, rank 128, K=8": USUAL | {"rank": 128},
    "cross-entropy, rank 32, K=4": USUAL | {"draft_length": 4},
    "cross-entropy, rank 32, K=16": USUAL | {"draft_length": 16},
    "joint": USUAL | {"mode": "joint", "rank": 0, "learning_rate": 5e-5},
    "plain fine-tuning": USUAL | {"mode": None, "rank": 0, "learning_rate": 5e-5},
}


def model_of(path: Path, run: dict[str, Any]) -> Any:
    """The checkpoint in float32; with an adapter where the run teaches one."""
    torch.manual_seed(0)
    if run["mode"] is None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model = TiDARForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model.config.tidar_config |= {"draft_length": run["draft_length"]}
    return get_peft_model(model, gated_adapter_config(model, run["rank"])) if run["mode"] == "gated" else model


@torch.no_grad()
def perplexity(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Of the labels, as the plain model reads them."""
    total, number = 0.0, 0
    for batch in batches:
        labels = batch["labels"][:, 1:]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        number += int((labels != -100).sum())
    return float(torch.tensor(total / number).exp())


def measured(model: Any, run: dict[str, Any], arguments: Any, prompts: list[torch.Tensor], texts: Any) -> dict:
    """What a model is worth now."""
    model.eval()
    found = {}
    if run["mode"] is not None:
        decoder = model.get_base_model() if run["mode"] == "gated" else model
        report = measure_drafting(decoder, prompts, arguments.max_new_tokens)
        found = {"tokens_per_forward": report.tokens_per_forward, "acceptance": report.acceptance}
    if run["mode"] != "gated":  # whose plain side does not move
        found |= {f"perplexity_{name}": perplexity(model, batches) for name, batches in texts.items()}
    model.train()
    return found


def train(run: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """Points of one curve."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    collate = PaddingCollator(tokenizer.pad_token_id or 0)
    written = list(open_rows(WRITTEN)())
    random.Random(0).shuffle(written)
    encode = RowEncoder(tokenizer, max_length=192, draft_length=16)
    of_held_out, rows = ([row for one in part for row in encode(one)] for part in (written[:12], written[12:]))
    ids = tokenizer(AUSTEN.read_text(), return_tensors="pt").input_ids[:, :512]
    austen = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    texts = {"own": [collate(of_held_out[i : i + 4]) for i in range(0, 12, 4)], "austen": [austen]}
    held_out = read_prompts(ROOT / "benchmarks" / "prompts_heldout.jsonl")
    prompts = [prompt_ids(row, tokenizer) for row in islice(held_out, 0, 100, 20)]
    model = model_of(arguments.model, run).train()
    learnt = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=run["learning_rate"], weight_decay=0.0)
    points: list[dict[str, Any]] = [{"step": 0, "labels": 0, **measured(model, run, arguments, prompts, texts)}]
    num_labels, starts, begin = 0, random.Random(1), time.perf_counter()
    for step in range(1, arguments.steps + 1):
        places = [(step - 1) * arguments.batch_size + i for i in range(arguments.batch_size)]
        batch = collate([rows[place % len(rows)] for place in places])
        num_labels += int((batch["labels"] != -100).sum())
        objective = {}
        if run["mode"] is not None:
            first = starts.randrange(run["draft_length"])
            objective = {"objective": DraftObjective(run["mode"], run["loss"], first_token=first)}
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, **objective).loss
        for group in optimizer.param_groups:  # warmed up over the first tenth
            group["lr"] = run["learning_rate"] * min(1.0, 10 * step / arguments.steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % arguments.every == 0:
            now = measured(model, run, arguments, prompts, texts)
            points.append({"step": step, "labels": num_labels, "loss": float(loss.detach()), **now})
            print(step, {name: value for name, value in points[-1].items() if name != "acceptance"}, flush=True)
    return {"points": points, "seconds": time.perf_counter() - begin}


def draw(folder: Path) -> None:
    """All curves there are, in one picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name in RUNS:
        if (file := folder / f"{name}.json").exists():
            points = json.loads(file.read_text())["points"]
            if "tokens_per_forward" in points[0]:
                axes.plot([p["labels"] for p in points], [p["tokens_per_forward"] for p in points], "o-", label=name)
    axes.set_xlabel("tokens learned from")
    axes.set_ylabel("tokens per forward, held-out prompts")
    axes.legend(fontsize="small")
    figure.savefig(folder / "curves.png", dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    about = {"date": date.today().isoformat(), "torch": torch.__version__, "device": platform.processor() or "cpu"}
    for name in arguments.only:
        file = arguments.folder / f"{name}.json"
        if not file.exists():
            print(name, flush=True)
            found = {"run": RUNS[name], "about": about | vars(arguments), **train(RUNS[name], arguments)}
            file.write_text(json.dumps(found, indent=1, default=str) + "\n")
    draw(arguments.folder)


if __name__ == "__main__":
    main()
