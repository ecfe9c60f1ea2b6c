"""What `trust` gives and takes: tokens per forward, and how likely the texts are to the model they were taught from.

    python benchmarks/trust.py --page docs/exactness.md

A small model learns answers of SmolLM2 letter by letter. A copy of it is taught to draft jointly, as the paper does.
Both take a few minutes of one thread. The copy then continues beginnings of answers that neither has seen.
"""

import argparse
import copy
import json
import math
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench_page import put_between_marks
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from wavedraft import DraftObjective, TiDARForCausalLM

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "adapters" / "smollm2-135m-instruct-gated" / "self_written.jsonl"
EVERY = 20  # rows, of which one is held out
NUM_LETTERS = 128  # ASCII; id 0, which no page has, is the masks' row
LENGTH, NUM_PROMPT, NUM_NEW = 64, 32, 32
SIZE = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}


def ids_of(row: str) -> Tensor:
    """The letters of an answer as ids; what is not ASCII is left out."""
    text = json.loads(row)["answer"] + "\n"
    return torch.tensor([letter for letter in text.encode("ascii", "ignore") if letter])


def learn(model: Any, ids: Tensor, num_steps: int, seed: int, draft_length: int | None = None) -> float:
    """Teaches a model rows of `ids` at random places; jointly where `draft_length` is given. Returns the last loss."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps)
    loss = torch.zeros(())
    for step in range(num_steps):
        starts = torch.randint(len(ids) - LENGTH, (16,), generator=generator).tolist()
        rows = torch.stack([ids[start : start + LENGTH] for start in starts])
        drafts = {"objective": DraftObjective(first_token=step % draft_length)} if draft_length else {}
        loss = model(input_ids=rows, attention_mask=torch.ones_like(rows), labels=rows, **drafts).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return float(loss.detach())


@torch.no_grad()
def negative_log_likelihood(source: Any, text: Tensor) -> float:
    """Mean over the new tokens of a text [P + N], by the model that was taught to draft."""
    logits = source(text[None]).logits[0, NUM_PROMPT - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, text[NUM_PROMPT:]))


def figures_of(model: Any, source: Any, prompts: list[Tensor], trust: float) -> list[str]:
    """A row of the table."""
    texts, plain_texts, num_forwards = [], [], 0
    for prompt in prompts:
        options = {"max_new_tokens": NUM_NEW, "do_sample": False, "return_dict_in_generate": True}
        output = model.generate(prompt[None], num_branches="all", trust=trust, **options)
        texts.append(output.sequences[0])
        num_forwards += output.num_forwards
        plain_texts.append(model.generate(prompt[None], **options | {"draft_length": 0}).sequences[0])
    per_forward = len(prompts) * (NUM_NEW - 1) / num_forwards
    likely = math.exp(sum(negative_log_likelihood(source, text) for text in texts) / len(texts))
    same = sum(torch.equal(text, plain) for text, plain in zip(texts, plain_texts, strict=True))
    return [f"{trust:g}", f"{per_forward:.2f}", f"{likely:.2f}", f"{same} of {len(texts)}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of each of the two trainings")
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trust", type=float, nargs="+", default=[1.0, 0.5, 0.0])
    parser.add_argument("--page", type=Path, help="put the table between its marks of this page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    rows = ROWS.read_text(encoding="utf-8").splitlines()
    answers = [ids_of(row) for row in rows]
    taught_ids = torch.cat([ids for place, ids in enumerate(answers) if place % EVERY])
    config = LlamaConfig(vocab_size=NUM_LETTERS, max_position_embeddings=256, eos_token_id=None, **SIZE)
    source = LlamaForCausalLM(config)
    loss = learn(source, taught_ids, arguments.steps, arguments.seed)
    print(f"{len(taught_ids)} letters; loss of the source after {arguments.steps} steps: {loss:.3f}", flush=True)

    drafting = copy.deepcopy(config)
    drafting.tidar_config = {"draft_length": arguments.draft_length, "mask_token_id": NUM_LETTERS}
    drafting.tidar_config["mask_embedding_id"] = 0
    model = TiDARForCausalLM.from_config(drafting)
    model.load_state_dict(source.state_dict())
    model.has_objective = True  # of every step below
    loss = learn(model.train(), taught_ids, arguments.steps, arguments.seed + 1, arguments.draft_length)
    print(f"joint loss after {arguments.steps} steps more: {loss:.3f}", flush=True)

    source.eval(), model.eval()
    unseen = [ids[:NUM_PROMPT] for ids in answers[::EVERY] if len(ids) >= NUM_PROMPT]
    prompts = unseen[: arguments.num_prompts]
    table = [["`trust`", "tokens per forward", "perplexity under the source", "texts of plain decoding"], ["---"] * 4]
    table += [figures_of(model, source, prompts, trust) for trust in arguments.trust]
    told = (
        f"`python benchmarks/trust.py --steps {arguments.steps} --num-prompts {len(prompts)}`, "
        f"K = {arguments.draft_length}, {date.today()}, {platform.machine()},\ntorch {torch.__version__}. "
        f"{len(prompts)} texts of {NUM_NEW} letters:"
    )
    lines = "\n".join(f"| {' | '.join(row)} |" for row in table)
    print(f"{told}\n\n{lines}")
    if arguments.page is not None:
        put_between_marks(arguments.page, "trust", [f"{told}\n", lines])


if __name__ == "__main__":
    main()
