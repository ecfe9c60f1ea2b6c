"""Tokens per forward against text learned: losses, ranks, blocks of masks, and a draft head.

python benchmarks/learning_curves.py models/SmolLM2-135M-Instruct-TiDAR --runs cross-entropy LK --tokens 400000

Every run begins with a new gated adapter, and reads the same rows in the same order at the same learning rate. After
each `--every` tokens it drafts for held-out prompts, and keeps all that it needs to go on: the same command continues.
So runs can be given one after another, or side by side. `--page` draws all that is there.

The adapter leaves the model's own texts alone. So one forward reads a whole text with masks after each of its tokens,
and says how far each draft would have stood. Forwards are counted for a greedy decode with every branch.
"""

import argparse
import json
import os
import random
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench_page import put_between_marks
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from sampled_drafts import TOKEN, chances, forwards_for, plain_text, read_text
from torch import Tensor
from transformers import AutoTokenizer

from wavedraft import DraftObjective, TiDARForCausalLM
from wavedraft.bench.paired import bootstrap
from wavedraft.bench.report import processor
from wavedraft.generation.drafting.draft_head import new_draft_head
from wavedraft.training import PaddingCollator, RowEncoder, gated_adapter_config, open_rows, prompt_ids, read_prompts

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "adapters" / "smollm2-135m-instruct-gated" / "self_written.jsonl"
HELD_OUT = ROOT / "benchmarks" / "prompts_heldout.jsonl"
DRAFT_LENGTH, NUM_NEW = 8, 32
WARM_UP = 20  # steps to the full learning rate
STATE, POINTS = "state.safetensors", "points.json"


@dataclass(frozen=True)
class Run:
    """What one curve is taught with. `after`: the run whose adapter a draft head is taught for."""

    loss: str = "cross_entropy"
    rank: int = 32
    block_attention: str | None = None
    after: str | None = None

    @property
    def learning_rate(self) -> float:
        return 2e-3 if self.after else 1e-3


RUNS = {
    "cross-entropy": Run(),
    "KL": Run(loss="kl"),
    "TV": Run(loss="tv"),
    "LK": Run(loss="lk"),
    "rank-8": Run(rank=8),
    "rank-128": Run(rank=128),
    "causal": Run(block_attention="causal"),
    "head": Run(after="cross-entropy"),
}


class Learner:
    """A run under way, in a folder of its own.

    Attributes:
        step, num_tokens: optimizer steps so far, and labels learned from.
        points: a row of figures for each point.
    """

    def __init__(self, name: str, folder: Path, model_path: Path):
        self.run, self.folder = RUNS[name], folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        model = TiDARForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16, attn_implementation="eager")
        model.has_objective = True
        model.config.tidar_config |= {"draft_length": DRAFT_LENGTH}
        if self.run.block_attention:
            model.config.tidar_config |= {"block_attention": self.run.block_attention}
        self.adapted = get_peft_model(model, gated_adapter_config(model, self.run.rank))
        self.model = self.adapted.get_base_model()
        if self.run.after:
            set_peft_model_state_dict(self.adapted, Learner(self.run.after, folder, model_path).adapter())
            self.adapted.requires_grad_(False)
            new_draft_head(self.model, 512).requires_grad_(True)
        self.learnt = [weight for weight in self.adapted.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learnt, lr=self.run.learning_rate, weight_decay=0.0)
        self.step, self.num_tokens, self.seconds = 0, 0, 0.0
        self.points: list[dict[str, Any]] = []
        if (self.folder / POINTS).is_file():
            self.go_on()

    def adapter(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(self.adapted).items()}

    def go_on(self) -> None:
        """Takes up what the last point kept."""
        kept = json.loads((self.folder / POINTS).read_text())
        self.step, self.num_tokens, self.seconds = kept["step"], kept["num_tokens"], kept["seconds"]
        self.points, state = kept["points"], load_file(self.folder / STATE)
        for number, weight in enumerate(self.learnt):
            weight.data.copy_(state[f"weight.{number}"])
            if self.step:
                moments = {name: state[f"{name}.{number}"] for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[weight] = {"step": torch.tensor(float(self.step)), **moments}

    def keep(self) -> None:
        """Writes all that `go_on` takes up, each file whole."""
        state = {f"weight.{number}": weight.detach() for number, weight in enumerate(self.learnt)}
        for number, weight in enumerate(self.learnt):
            state |= {f"{k}.{number}": self.optimizer.state[weight][k] for k in ("exp_avg", "exp_avg_sq") if self.step}
        counts = {"step": self.step, "num_tokens": self.num_tokens, "seconds": self.seconds}
        text = json.dumps({"run": asdict(self.run), **counts, "points": self.points}, indent=1)
        save_file(state, self.folder / f"{STATE}.part")
        (self.folder / f"{POINTS}.part").write_text(text + "\n")
        for name in (STATE, POINTS):
            os.replace(self.folder / f"{name}.part", self.folder / name)

    def learn(self, batch: dict[str, Tensor], first_token: int) -> float:
        """One step; returns its loss."""
        began = time.perf_counter()
        mode = "head" if self.run.after else "gated"
        objective = DraftObjective(mode, self.run.loss, slot_decay=0.85, first_token=first_token)
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.adapted(**batch, objective=objective).loss
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.learning_rate * min(1.0, self.step / WARM_UP)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learnt, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_tokens += int((batch["labels"] != -100).sum())
        self.seconds += time.perf_counter() - began
        return float(loss.detach())

    @torch.no_grad()
    def measure(self, texts: list[dict[str, Any]], loss: float | None) -> None:
        """Adds a point: for each text its kind, its tokens after the first, and the forwards for them."""
        self.adapted.eval()
        of_texts = []
        for text in texts:
            ids, new = torch.tensor(text["prompt"]), torch.tensor(text["new"])
            stand = chances(*read_text(self.model, ids, new, DRAFT_LENGTH), new, 0.0)[TOKEN]
            of_texts.append([text["kind"], len(new) - 1, forwards_for(stand)])
        self.adapted.train()
        self.points.append({"num_tokens": self.num_tokens, "loss": loss, "texts": of_texts})
        print(
            f"{self.folder.name}: {self.num_tokens} tokens, {told(of_texts)} a forward, {self.seconds:.0f} s",
            flush=True,
        )


def batches(tokenizer: Any, batch_size: int, num_done: int) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Batches in an order that is the same for every run, from step `num_done` on, and where their blocks begin."""
    encode, collate = RowEncoder(tokenizer, max_length=256, draft_length=DRAFT_LENGTH), PaddingCollator(0)
    rows = [row for written in open_rows(ROWS)() for row in encode(written)]
    draw, number = random.Random(0), 0
    while True:
        draw.shuffle(rows)
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            first_token = draw.randrange(DRAFT_LENGTH)
            number += 1
            if number > num_done:
                yield collate(rows[start : start + batch_size]), first_token


def texts_of(model_path: Path, tokenizer: Any, file: Path, num_prompts: int) -> list[dict[str, Any]]:
    """The model's own texts after held-out prompts, written once."""
    if not file.is_file():
        model = TiDARForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
        kinds = [json.loads(line)["kind"] for line in HELD_OUT.read_text().splitlines()]
        texts = []
        for kind, row in list(zip(kinds, read_prompts(HELD_OUT), strict=True))[:num_prompts]:
            ids = prompt_ids(row, tokenizer)
            new = plain_text(model, ids, 0.0, NUM_NEW)
            texts += [{"kind": kind, "prompt": ids.tolist(), "new": new.tolist()}] if len(new) > 1 else []
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_text(json.dumps(texts))
        os.replace(part, file)
    return json.loads(file.read_text())


def tokens_per_forward(of_texts: list[list[Any]]) -> float:
    return sum(tokens for _, tokens, _ in of_texts) / sum(forwards for *_, forwards in of_texts)


def told(of_texts: list[list[Any]]) -> str:
    interval = bootstrap(of_texts, tokens_per_forward)
    return f"{tokens_per_forward(of_texts):.2f}" + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else "")


def points_there(folder: Path) -> dict[str, list[dict[str, Any]]]:
    files = {name: folder / name / POINTS for name in RUNS}
    return {name: json.loads(file.read_text())["points"] for name, file in files.items() if file.is_file()}


def table(runs: dict[str, list[dict[str, Any]]], about: str) -> str:
    """Each run's points, the last one by kinds."""
    kinds = sorted({kind for points in runs.values() for kind, *_ in points[-1]["texts"]})
    rows = [["run", "tokens learned", "tokens per forward (95% interval)", *kinds]]
    rows.append(["---"] * len(rows[0]))
    for name, points in runs.items():
        for point in points:
            by_kind = [tokens_per_forward([one for one in point["texts"] if one[0] == kind]) for kind in kinds]
            rows.append([name, f"{point['num_tokens']:,}", told(point["texts"]), *(f"{one:.2f}" for one in by_kind)])
    return "\n".join([textwrap.fill(about, 120), "", *(f"| {' | '.join(row)} |" for row in rows)])


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, points in runs.items():
        places = [point["num_tokens"] / 1000 for point in points]
        axes.plot(places, [tokens_per_forward(point["texts"]) for point in points], "o-", markersize=3, label=name)
        intervals = [bootstrap(point["texts"], tokens_per_forward) or (float("nan"),) * 2 for point in points]
        axes.fill_between(places, *zip(*intervals, strict=True), alpha=0.12)
    axes.set_xlabel("thousand tokens learned")
    axes.set_ylabel("tokens per forward")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("build/curves"))
    parser.add_argument("--runs", nargs="*", choices=list(RUNS), default=[])
    parser.add_argument("--tokens", type=int, default=400_000, help="learn from so many")
    parser.add_argument("--every", type=int, default=40_000, help="tokens from point to point")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--page", type=Path, help="write the table between the marks of this page")
    parser.add_argument("--picture", type=Path, help="draw the curves here, as PNG")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    file = arguments.folder / f"texts-{arguments.num_prompts}.json"
    texts = texts_of(arguments.model, tokenizer, file, arguments.num_prompts) if arguments.runs else []
    for name in arguments.runs:
        learner = Learner(name, arguments.folder, arguments.model)
        if not learner.points:
            learner.measure(texts, None)
            learner.keep()
        for batch, first_token in batches(tokenizer, arguments.batch_size, learner.step):
            if learner.num_tokens >= arguments.tokens:
                break
            loss = learner.learn(batch, first_token)
            if learner.num_tokens // arguments.every > learner.points[-1]["num_tokens"] // arguments.every:
                learner.measure(texts, loss)
                learner.keep()
    runs = points_there(arguments.folder)
    num_prompts = len(next(iter(runs.values()))[-1]["texts"])
    about = (
        f"`python benchmarks/learning_curves.py`: {arguments.model.name}, bfloat16, K = {DRAFT_LENGTH}, {num_prompts} "
        f"held-out prompts, texts of {NUM_NEW} tokens, {processor()}, torch {torch.__version__}, {date.today()}."
    )
    print(table(runs, about))
    if arguments.page:
        put_between_marks(arguments.page, "learning curves", [table(runs, about)])
    if arguments.picture:
        draw(runs, arguments.picture)


if __name__ == "__main__":
    main()
