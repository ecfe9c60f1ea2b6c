"""How much of a sampled draft stands: token by token, as a block, and beside greedy decoding.

python benchmarks/sampled_drafts.py models/SmolLM2-135M-Instruct-TiDAR \
    --adapter adapters/smollm2-135m-instruct-gated --page docs/how-it-works.md

Nothing is left to the draws of a decode. Plain decoding writes the texts. One forward then drafts after every token of
a text. Given the text, the chance that i drafted tokens stand is known under either rule, and so are the forwards to
expect of a decode with every branch. Intervals are of a bootstrap over prompts.

n tokens of a text, K drafted tokens.
"""

import argparse
import json
import random
import textwrap
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench_page import put_between_marks
from rich.progress import track
from torch import Tensor
from transformers import AutoTokenizer

from wavedraft import TiDARForCausalLM
from wavedraft.bench.report import processor
from wavedraft.generation.drafting.draft_head import draft_head_of
from wavedraft.generation.drafting.draft_network import new_network
from wavedraft.generation.drafting.draft_step import with_masks
from wavedraft.generation.drafting.mask_predictions import SlotPredictions
from wavedraft.generation.stock_model import taught_of
from wavedraft.training import prompt_ids, read_prompts

NUM_DRAWS = 1000  # of the bootstrap
TOKEN, BLOCK = "token by token", "as a block"
Forwards = dict[str, tuple[int, float]]  # by rule: tokens after the first, and the forwards to expect for them


def plain_text(model: Any, ids: Tensor, temperature: float, num_new: int) -> Tensor:
    """New tokens [n] of plain decoding, from the whole distribution."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    options = sampling if temperature else {"do_sample": False}
    output = model.generate(
        ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=num_new, draft_length=0, **options
    )
    return output[0, len(ids) :]


def read_text(model: Any, ids: Tensor, text: Tensor, draft_length: int) -> tuple[Tensor, list[SlotPredictions]]:
    """The model's own logits [n, V] after each token of a text [n], and what masks predict after each but the last."""
    num_tokens = len(text)
    mask_row = taught_of(model).get("mask_embedding_id") or taught_of(model)["mask_token_id"]
    network = new_network(model, 1, mask_row)
    network.head = draft_head_of(model)
    with network.form.applied():
        _, first, position = network.prefill(ids[None], None, draft_length)
        lengths = torch.arange(1, num_tokens)[None]
        positions, cached = position + torch.arange(num_tokens), torch.tensor([len(ids)])
        inputs = with_masks(text[None], positions, lengths, cached, draft_length, num_tokens, network.masks)
        target, later = network(inputs)
        slots = [first.after(torch.ones(1, dtype=torch.long))]
        slots += [later.after(torch.tensor([num])) for num in range(1, num_tokens - 1)]
    return target[0], slots


def chances(target: Tensor, slots: list[SlotPredictions], text: Tensor, temperature: float) -> dict[str, list[Any]]:
    """By rule, for each place of a text [n] but the last, the chance that 1, 2, ... tokens of the draft there stand,
    given that the text goes on as it does."""
    found: dict[str, list[Any]] = {TOKEN: [], BLOCK: []}
    for start, slot in enumerate(slots):
        ratios = []  # the drafter's probability of each token over the model's own, as logarithms
        for i in range(min(slot.logits.shape[1], len(text) - 1 - start)):
            before, token = text[start + i], text[start + i + 1]
            drafted = slot.logits[0, i] if slot.chain is None else slot.chain.logits_after(i, before.view(1, 1))[0, 0]
            own = target[start + i]
            if temperature:
                ratios.append((log_prob(drafted, token, temperature) - log_prob(own, token, temperature)).item())
            else:
                ratios.append(0.0 if drafted.argmax() == token else -torch.inf)
        ratio = torch.tensor(ratios, dtype=torch.double)
        found[TOKEN].append(ratio.clamp(max=0).cumsum(0).exp().tolist())
        found[BLOCK].append(ratio.cumsum(0).clamp(max=0).cummin(0).values.exp().tolist())
    return found


def log_prob(logits: Tensor, token: Tensor, temperature: float) -> Tensor:
    return (logits.double() / temperature).log_softmax(-1)[token]


def forwards_for(stand: list[list[float]]) -> float:
    """Forwards to expect for a text after its first token, by the chances that 1, 2, ... drafted tokens stand at each
    place. Each forward decides what stands, and one token more."""
    last = len(stand)
    left = [0.0] * (last + 1)
    for place in range(last - 1, -1, -1):
        stops = enumerate(pairwise([1.0, *stand[place], 0.0]))
        left[place] = 1 + sum((here - further) * left[min(place + 1 + num, last)] for num, (here, further) in stops)
    return left[0]


def tokens_per_forward(runs: list[Forwards], rule: str) -> float:
    tokens, forwards = (sum(column) for column in zip(*(run[rule] for run in runs), strict=True))
    return tokens / forwards


def line_of(runs: list[Forwards], temperature: float, draft_length: int) -> str:
    """A row of the table."""

    def ratio(some: list[Forwards]) -> float:
        return tokens_per_forward(some, BLOCK) / tokens_per_forward(some, TOKEN)

    figures = [f"{tokens_per_forward(runs, rule):.2f}" for rule in (TOKEN, BLOCK)]
    draw = random.Random(0)
    ratios = sorted(ratio(draw.choices(runs, k=len(runs))) for _ in range(NUM_DRAWS))
    low, high = ratios[NUM_DRAWS // 40], ratios[-1 - NUM_DRAWS // 40]
    gain = f"{ratio(runs):.3f} ({low:.3f}-{high:.3f})" if temperature else "greedy: the same rule"
    return f"| {draft_length} | {temperature:g} | {len(runs)} | {' | '.join(figures)} | {gain} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapter")
    parser.add_argument("--prompts", default=str(Path(__file__).with_name("prompts_heldout.jsonl")))
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    parser.add_argument("--output", type=Path, help="write the tokens and forwards of each prompt here as JSON")
    parser.add_argument("--page", type=Path, help="write the table between the marks of this page")
    arguments = parser.parse_args()

    model = TiDARForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.adapter:
        model.load_adapter(arguments.adapter)
    prompts = [prompt_ids(row, tokenizer) for row in list(read_prompts(arguments.prompts))[: arguments.num_prompts]]
    settings = [(length, t) for length in arguments.draft_lengths for t in arguments.temperatures]
    runs: dict[tuple[int, float], list[Forwards]] = {setting: [] for setting in settings}
    with torch.no_grad():
        for number, ids in enumerate(track(prompts, description="Drafting")):
            for temperature in arguments.temperatures:
                torch.manual_seed(number)
                text = plain_text(model, ids, temperature, arguments.max_new_tokens)
                for length in arguments.draft_lengths if len(text) > 1 else ():
                    stand = chances(*read_text(model, ids, text, length), text, temperature)
                    run = {rule: (len(text) - 1, forwards_for(of_rule)) for rule, of_rule in stand.items()}
                    runs[length, temperature].append(run)
    head = (
        f"`python benchmarks/sampled_drafts.py`: {arguments.model.name}, float32, texts of {arguments.max_new_tokens} "
        f"tokens, every branch, {processor()}, torch {torch.__version__}, {date.today().isoformat()}. Tokens per "
        "forward to expect:"
    )
    titles = ["K", "temperature", "prompts", TOKEN, BLOCK, "gain (95% interval)"]
    rows = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    rows += [line_of(runs[length, t], t, length) for length, t in settings]
    table = "\n".join([textwrap.fill(head, 120), "", *rows])
    print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps({f"{k} {t:g}": some for (k, t), some in runs.items()}, indent=1) + "\n")
    if arguments.page:
        put_between_marks(arguments.page, "sampled drafts", [table])


if __name__ == "__main__":
    main()
