"""A stock model is given a recurrence and healed: perplexity by depth before and after, and what each policy brings.

    python benchmarks/retrofit.py models/SmolLM2-135M-Instruct-TiDAR --layouts 8,14,8@1e-4 8,8,8@4e-4 \
        --minutes 10 --page docs/recurrent.md

A layout is the layers of prelude, core and coda, and a learning rate. Healing is `wavedraft train --mode full` on
answers that the source wrote. Some of these are held out, for perplexity and as prompts. The minutes are of one
layout's healing: a step is timed first, and they become steps. What is measured stands in `figures.json` of the folder:
the same command goes on where it was stopped.
"""

import argparse
import json
import math
import os
import shutil
import textwrap
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_page import put_between_marks
from retrofit_policies import by_each_policy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from wavedraft import RecurrentDepthForCausalLM, convert
from wavedraft.bench.report import processor
from wavedraft.commands.cli_checks import multiplies_bfloat16
from wavedraft.conversion import to_ar
from wavedraft.training import finetune
from wavedraft.training.chat_template import prompt_ids
from wavedraft.training.dialogue import PaddingCollator, encode_row
from wavedraft.training.row_sources import rows_of_file
from wavedraft.training.run_folder import last_whole_checkpoint

ROOT = Path(__file__).parents[1]
SELF_WRITTEN = ROOT / "adapters" / "smollm2-135m-instruct-gated" / "self_written.jsonl"
HEALING = "healing.jsonl"  # all rows but the held-out ones
LEAST = 16  # tokens of an answer within the longest row, for a held-out one
DEPTHS = range(1, 9)


class Figures:
    """What was measured so far, by name, in a file that is replaced at once."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path = path
        self.found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"about": about}
        for name, value in about.items():
            if self.found["about"].get(name) != value:
                raise ValueError(
                    f"{path} has figures of `{name}` {self.found['about'].get(name)!r}, but now it is {value!r}. Give "
                    "another --folder, or remove the file."
                )

    def part(self, name: str, measure: Callable[[], Any]) -> Any:
        """What stands under a name; it is measured if nothing does."""
        if name not in self.found:
            self.found[name] = measure()
            unfinished = self.path.with_suffix(".part")
            unfinished.write_text(json.dumps(self.found) + "\n", encoding="utf-8")
            os.replace(unfinished, self.path)
            print(f"{name}: {str(self.found[name])[:200]}", flush=True)
        return self.found[name]


def stock_copy(source: Path, folder: Path) -> Path:
    """The stock checkpoint that a TiDAR one was made from. A source that is stock is taken as it is."""
    if "tidar_config" not in json.loads((source / "config.json").read_text(encoding="utf-8")):
        return source
    if not (folder / "config.json").is_file():
        to_ar(source, folder)
    return folder


def split_rows(
    data: Path, tokenizer: Any, healing: Path, num_rows: int, max_length: int
) -> tuple[list[dict[str, list[int]]], list[torch.Tensor]]:
    """Encoded rows that are held out, taken evenly through the file, and the prompts [P] of these.

    All other rows are written to the file `healing`.
    """
    rows, lines = list(rows_of_file(data)), data.read_text(encoding="utf-8").splitlines()
    apart = max(1, len(rows) // num_rows)
    chosen = [(encode_row(row, tokenizer, max_length), prompt_ids(row, tokenizer)) for row in rows[::apart]]
    held_out = [pair for pair in chosen if sum(label != -100 for label in pair[0]["labels"]) >= LEAST]
    healing.write_text("".join(f"{line}\n" for place, line in enumerate(lines) if place % apart), encoding="utf-8")
    return [row for row, _ in held_out], [ids for _, ids in held_out]


@torch.no_grad()
def read_answers(model: Any, rows: list[dict[str, list[int]]], **options: Any) -> dict[str, Any]:
    """Perplexity of the answers in encoded rows, and the token that is likeliest at each of their places."""
    total, likeliest = 0.0, []
    for row in rows:
        batch = PaddingCollator(0)([row])
        labels = batch.pop("labels")[0, 1:]
        logits = model(**batch, **options).logits[0, :-1].float()[labels != -100]
        total += torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum").item()
        likeliest += logits.argmax(-1).tolist()
    return {"perplexity": math.exp(total / len(likeliest)), "likeliest": likeliest}


def at_each_depth(folder: Path, rows: list[dict[str, list[int]]], dtype: str, source_ids: list[int]) -> dict[str, Any]:
    """Perplexity at each depth, and the share of likeliest next tokens that are the source's."""
    model = RecurrentDepthForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found = [read_answers(model, rows, num_recurrences=depth, init_scale=0.0) for depth in DEPTHS]
    shares = [sum(map(int.__eq__, one["likeliest"], source_ids)) / len(source_ids) for one in found]
    return {"perplexity": [one["perplexity"] for one in found], "same": shares}


def seconds_of_step(folder: Path, batch_size: int, max_length: int) -> float:
    """The time of a step of full rows at the mean depth of training."""
    model = RecurrentDepthForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer, seconds = torch.optim.AdamW(model.parameters(), lr=0.0), 0.0
    ids = torch.randint(model.config.vocab_size, (batch_size, max_length))
    for _ in range(2):  # the first makes room for gradients
        start = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=multiplies_bfloat16()):
            loss = model(input_ids=ids, labels=ids, num_recurrences=model.config.mean_recurrence + 1).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
    return seconds


def heal(
    converted: Path, healing: Path, healed: Path, max_steps: int, learning_rate: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """`wavedraft train --mode full`, going on where it was stopped. Returns its steps and seconds of this call."""
    if not (is_begun := last_whole_checkpoint(healed) is not None):
        shutil.rmtree(healed, ignore_errors=True)  # stopped before its first checkpoint
    start = time.perf_counter()
    report = finetune(
        converted, healing, healed, mode="full", max_steps=max_steps, batch_size=arguments.batch_size,
        max_length=arguments.max_length, learning_rate=learning_rate, save_steps=max(1, max_steps // 2),
        save_total_limit=1, bf16=multiplies_bfloat16(), resume=is_begun,
    )  # fmt: skip
    for checkpoint in healed.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return {"steps": report["steps"], "seconds": time.perf_counter() - start}


def of_layout(
    layout: str, stock: Path, rows: list[Any], prompts: list[torch.Tensor], figures: Figures, arguments: Any
) -> None:
    """Converts, measures, heals and measures again. What stands in the figures is not done again."""
    name, _, rate = layout.partition("@")
    folder, source_ids = arguments.folder / name, figures.found["source"]["likeliest"]
    converted, healed = folder / "converted", folder / "healed"
    if not converted.is_dir():
        convert(stock, converted, recurrent=tuple(map(int, name.split(","))))
    depths = partial(at_each_depth, rows=rows, dtype=arguments.dtype, source_ids=source_ids)
    figures.part(f"{name} converted", partial(depths, converted))
    timed = partial(seconds_of_step, converted, arguments.batch_size, arguments.max_length)
    steps = max(1, round(60 * arguments.minutes / figures.part(f"{name} step", timed)))
    healing = partial(heal, converted, arguments.folder / HEALING, healed, steps, float(rate), arguments)
    figures.part(f"{name} healing", healing)
    figures.part(f"{name} healed", partial(depths, healed))
    figures.part(f"{name} policies", partial(by_each_policy, healed, prompts, arguments.max_new_tokens))


def measured(arguments: argparse.Namespace) -> Figures:
    """All figures: of the source, and of each layout as it was converted and as it was healed."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    about = {name: value for name, value in vars(arguments).items() if isinstance(value, int | float | str)}
    figures = Figures(arguments.folder / "figures.json", about | {"source": arguments.source.name})
    stock = stock_copy(arguments.source, arguments.folder / "stock")
    tokenizer = AutoTokenizer.from_pretrained(stock)
    sizes = arguments.num_rows, arguments.max_length
    rows, prompts = split_rows(arguments.data, tokenizer, arguments.folder / HEALING, *sizes)
    figures.part("num_layers", lambda: AutoConfig.from_pretrained(stock).num_hidden_layers)
    load = partial(AutoModelForCausalLM.from_pretrained, stock, dtype=arguments.dtype)
    figures.part("source", lambda: read_answers(load().eval(), rows))
    figures.part("held out", lambda: len(rows))
    host = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {date.today().isoformat()}"
    figures.part("made on", lambda: host)
    for layout in arguments.layouts:
        of_layout(layout, stock, rows, prompts[: arguments.num_prompts], figures, arguments)
    return figures


def as_table(rows: list[list[str]]) -> str:
    """Rows in Markdown, the first of them the names of the columns."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def tables_of(figures: Figures, layouts: list[str]) -> list[str]:
    """What it was measured with, perplexity by depth, and a table of policies for each layout."""
    found, about, source = figures.found, figures.found["about"], figures.found["source"]
    head = (
        f"`make retrofit`: {about['source']} without its drafting, {found['made on']}. Healed by "
        f"{about['batch_size']} rows of at most {about['max_length']} tokens a step. "
        f"Perplexity of {found['held out']} held-out answers ({len(source['likeliest'])} tokens), read in "
        f"{about['dtype']}, and in brackets the share of likeliest next tokens that are the source's. The source's "
        f"perplexity is {source['perplexity']:.2f}. Texts are of {about['max_new_tokens']} tokens, in float32."
    )
    pairs = [layout.split("@") for layout in layouts]
    rows = [["layers of prelude, core, coda", *(f"depth {depth}" for depth in DEPTHS)]]
    for name, rate in pairs:
        num_dropped = found["num_layers"] - sum(map(int, name.split(",")))
        healing = found[f"{name} healing"]
        steps = f"{healing['steps']} steps at {rate}, {healing['seconds'] / 60:.0f} minutes"
        for moment, told in (("converted", f"{num_dropped} dropped"), ("healed", steps)):
            line = found[f"{name} {moment}"]
            cells = [f"{one:.4g} ({same:.0%})" for one, same in zip(line["perplexity"], line["same"], strict=True)]
            rows.append([f"{name}, {moment}, {told}", *cells])
    tables = [textwrap.fill(head, 120), as_table(rows)]
    for name, _ in pairs:
        lines = found[f"{name} policies"]
        rows = [[f"{name}, healed", "core passes a token", "tokens per forward", "equal texts", "equal tokens"]]
        rows += [
            [policy, f"{line['passes']:.2f}", f"{line['per_forward']:.2f}", f"{line['texts']}/{about['num_prompts']}",
             f"{line['tokens']:.0%}"] for policy, line in lines.items()
        ]  # fmt: skip
        tables.append(as_table(rows))
    return tables


def main() -> None:
    """Measure, print the tables, and write them to the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a stock Llama-form checkpoint, or a TiDAR one made from it")
    parser.add_argument("--layouts", nargs="+", default=["8,14,8@1e-4", "8,8,8@4e-4"])
    parser.add_argument("--data", type=Path, default=SELF_WRITTEN, help="rows of prompt and answer")
    parser.add_argument("--minutes", type=float, default=10, help="of each layout's healing")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row, the rest is cut off")
    parser.add_argument("--num-rows", type=int, default=16, help="rows to hold out")
    parser.add_argument("--num-prompts", type=int, default=8, help="of held-out rows, to decode")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16" if multiplies_bfloat16() else "float32")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "retrofit")
    parser.add_argument("--page", type=Path, help="write the tables between the marks of this page")
    arguments = parser.parse_args()
    tables = tables_of(measured(arguments), arguments.layouts)
    print("\n\n".join(tables))
    if arguments.page:
        put_between_marks(arguments.page, "retrofit", tables)


if __name__ == "__main__":
    main()
