"""Trains a gated adapter to draft over a recurrent depth. The model's text does not change.

    python experiments/recurrent_drafts/teach.py checkpoints/austen-recurrent-6m train.txt runs/austen-drafts \\
        --draft-length 8 --mask-recurrences 4
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoTokenizer

from drafting_recurrent import load
from wavedraft.modeling_tidar import DraftObjective
from wavedraft.training import gated_adapter_config


def rows_of_text(ids: torch.Tensor, length: int) -> torch.Tensor:
    """A text's ids [N] cut into rows [N // length, length]. The remainder is dropped."""
    num_rows = len(ids) // length
    return ids[: num_rows * length].view(num_rows, length)


def teach(
    model: Any,
    rows: torch.Tensor,
    output: str | Path,
    max_steps: int,
    batch_size: int,
    learning_rate: float,
    rank: int = 32,
    slot_decay: float = 1.0,
) -> list[float]:
    """Trains an adapter on rows of ids [N, S], saves it, and returns the loss of each step."""
    taught = get_peft_model(model, gated_adapter_config(model, rank)).train()
    parameters = [parameter for parameter in taught.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(max_steps):
        batch = rows[torch.randint(len(rows), (batch_size,), generator=generator)]
        # The first block starts at a random token, so every token is learnt in every slot.
        first_token = int(torch.randint(model.config.tidar_config["draft_length"], (), generator=generator))
        objective = DraftObjective("gated", draft_loss="kl", slot_decay=slot_decay, first_token=first_token)
        loss = taught(input_ids=batch, objective=objective).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            print(f"step {len(losses)}: loss {sum(losses[-10:]) / 10:.3f}", flush=True)
    taught.save_pretrained(output)
    return losses


def main() -> None:
    """Reads, trains, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a recurrent-depth checkpoint")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("output", type=Path, help="the folder for the adapter")
    parser.add_argument("--draft-length", type=int, default=8)
    parser.add_argument("--mask-recurrences", type=int, help="core steps of the masks; default: all")
    parser.add_argument("--max-steps", type=int, default=420)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--slot-decay", type=float, default=0.75)
    arguments = parser.parse_args()
    _, model = load(arguments.model, arguments.draft_length, arguments.mask_recurrences)
    ids = AutoTokenizer.from_pretrained(arguments.model)(arguments.text.read_text(encoding="utf-8"))["input_ids"]
    rows = rows_of_text(torch.tensor(ids), arguments.max_length)
    options = {name: getattr(arguments, name) for name in ("max_steps", "batch_size", "learning_rate", "slot_decay")}
    teach(model, rows, arguments.output, **options)


if __name__ == "__main__":
    main()
