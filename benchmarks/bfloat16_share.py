"""How many texts in half precision are plain decoding's own, for each way to decode; and what `exact` costs.

    python benchmarks/bfloat16_share.py models/SmolLM2-135M-Instruct-TiDAR \
        --adapter adapters/smollm2-135m-instruct-gated --output build/bfloat16_share.json

A forward of several tokens rounds differently from a forward of one, and so does a compiled one, or one of a batch.
Every way writes one prompt before any writes the next, and each text is compared with the stock model's greedy one.
`--output` keeps all texts: the same command goes on where it was stopped.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_page import put_between_marks
from transformers import AutoTokenizer

from wavedraft import TiDARForCausalLM
from wavedraft.bench.contenders import AR, Contender, contenders_of, without_adapter
from wavedraft.bench.instruments import timed, waited_seconds
from wavedraft.bench.measure import OWN_LENGTH, batch_of
from wavedraft.bench.paired import BUSY, FEWEST_PAIRS, is_noisy, paired_ratio
from wavedraft.bench.prompts import encode_prompt, read_prompts
from wavedraft.bench.report import processor
from wavedraft.bench.settings import Settings

HERE = Path(__file__).parent
BATCH_SIZE = 8
BATCHES = f"AR in batches of {BATCH_SIZE}"
EXACT = " tie-safe"  # the end of the name of a plan with `exact`
HEAD = ("", "equal texts", "share", "tokens before they part", "speed-up over AR", "time over the same plan")


@dataclass
class Texts:
    """What was written so far.

    Attributes:
        about: what must be the same to go on.
        rows: for each way, by the number of a prompt: `ids`, the new tokens up to the end, and of single texts
            `seconds` and `waited`.
    """

    about: dict[str, Any]
    rows: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None, about: dict[str, Any]) -> "Texts":
        if path is None or not path.is_file():
            return cls(about)
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, value in about.items():
            if found["about"].get(name) != value:
                raise ValueError(
                    f"{path} has texts of `{name}` {found['about'].get(name)!r}, but now it is {value!r}. Give another "
                    "--output, or remove the file."
                )
        return cls(about, found["texts"])

    def write(self, path: Path | None, lines: list[dict[str, Any]] | None = None) -> None:
        """Writes all, whole or not at all."""
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"about": self.about, "lines": lines, "texts": self.rows}) + "\n", encoding="utf-8")
        os.replace(part, path)


def ways_of(model: Any, stock: Any, has_compiled: bool) -> list[Contender]:
    """Plain decoding first; then transformers' compiled decoding and prompt lookup, ours by default and with one fixed
    plan, and both with `exact`."""
    length = min(4, model.tidar_config.draft_length)
    settings = Settings(draft_lengths=(length,), num_branches=(1, "auto"), has_compiled=has_compiled)
    names = (AR, "AR compiled", "lookup", "default", f"K={length} B=1")
    ways = [one for one in contenders_of(model, stock, settings) if one.name in names]
    exact = {"exact": "tie-safe"}
    ways += [Contender(one.name + EXACT, model, one.keywords | exact) for one in ways if one.model is model]
    return ways


def new_ids(sequences: torch.Tensor, num_prompt: int, end_ids: set[int]) -> list[list[int]]:
    """Each row's new tokens up to its end; what follows is padding."""
    found = []
    for row in sequences[:, num_prompt:].tolist():
        end = next((place for place, one in enumerate(row) if one in end_ids), len(row) - 1)
        found.append(row[: end + 1])
    return found


def write_texts(
    texts: Texts, ways: list[Contender], prompts: list[torch.Tensor], num_new: int, save: Callable[[], None]
) -> None:
    """Writes what is missing of all texts, prompt by prompt, and then plain decoding's in batches."""
    config = ways[0].model.generation_config
    ends = config.eos_token_id
    end_ids = set() if ends is None else set(ends if isinstance(ends, list) else [ends])
    options = {"max_new_tokens": num_new, "do_sample": False}
    missing = [
        place for place in range(len(prompts)) if any(str(place) not in texts.rows.get(one.name, {}) for one in ways)
    ]
    if missing:  # the longest prompt first: all others then fit into its static cache, which is compiled once
        longest = max(prompts, key=len)[None]
        for way in ways:
            timed(way, longest, torch.ones_like(longest), options | {"max_new_tokens": min(num_new, 16)})
    for place in missing:
        ids = prompts[place][None]
        turn = place % len(ways)
        for way in ways[turn:] + ways[:turn]:
            waited = waited_seconds() or 0.0
            sequences, seconds, _ = timed(way, ids, torch.ones_like(ids), options)
            (written,) = new_ids(sequences, ids.shape[1], end_ids)
            row = {"ids": written, "seconds": seconds, "waited": (waited_seconds() or 0.0) - waited}
            texts.rows.setdefault(way.name, {})[str(place)] = row
        save()
        print(f"{place + 1} of {len(prompts)} prompts", flush=True)
    rebatched = texts.rows.setdefault(BATCHES, {})
    for start in range(0, len(prompts), BATCH_SIZE):
        some = prompts[start : start + BATCH_SIZE]
        if str(start) in rebatched or len(some) < 2:
            continue
        ids, mask = batch_of(some, len(some), OWN_LENGTH, torch.zeros(1))
        sequences, *_ = timed(ways[0], ids, mask, options)
        for number, written in enumerate(new_ids(sequences, ids.shape[1], end_ids)):
            rebatched[str(start + number)] = {"ids": written}
        save()


def lines_of(texts: Texts) -> list[dict[str, Any]]:
    """A line of figures for each way."""
    plain, lines = texts.rows[AR], []
    for name, rows in texts.rows.items():
        shared = [(plain[place]["ids"], row["ids"]) for place, row in rows.items()]
        parted = [parting(*pair) for pair in shared if pair[0] != pair[1]]
        line: dict[str, Any] = {"name": name, "num_equal": len(shared) - len(parted), "num_texts": len(shared)}
        line["tokens_before_they_part"] = median(parted) if parted else None
        for figure, other in (("speed_up", AR), ("over_same_plan", name.removesuffix(EXACT))):
            line[figure] = None
            if name != other and name != BATCHES:
                line[figure] = time_ratio(texts.rows[other], rows)
        if line["over_same_plan"] is not None:  # a cost, not a gain: how much longer it takes
            line["over_same_plan"] = time_ratio(rows, texts.rows[name.removesuffix(EXACT)])
        lines.append(line)
    return lines


def parting(one: list[int], other: list[int]) -> int:
    """How many tokens two texts share before they differ."""
    pairs = zip(one, other, strict=False)
    return next((place for place, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(one), len(other)))


def time_ratio(rows: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Seconds a token of the first over those of the second, text by text: texts may end at different tokens."""

    def each(row: dict[str, Any]) -> float:
        return row["seconds"] / len(row["ids"])

    return paired_ratio({place: [(each(row), each(others[place]))] for place, row in rows.items()})


def markdown(texts: Texts, lines: list[dict[str, Any]], num_threads: int) -> str:
    """The table, after what it was made with, and what makes its times doubtful."""
    about = texts.about
    rows = [HEAD, ("---",) * len(HEAD)]
    for line in lines:
        parted = line["tokens_before_they_part"]
        rows.append(
            (line["name"], f"{line['num_equal']}/{line['num_texts']}", f"{line['num_equal'] / line['num_texts']:.0%}",
             "" if parted is None else f"{parted:.0f}", told(line["speed_up"]), told(line["over_same_plan"]))
        )  # fmt: skip
    single = [row for name, by_place in texts.rows.items() if name != BATCHES for row in by_place.values()]
    share = min(1.0, sum(row["waited"] for row in single) / num_threads / sum(row["seconds"] for row in single))
    doubts = []
    if share > BUSY:
        doubts.append(
            f"TOO BUSY for times: other programs had the cores for {share:.0%} of the time. The shares stand."
        )
    if about["num_prompts"] < FEWEST_PAIRS:
        doubts.append(f"{about['num_prompts']} prompts are too few for intervals of times, which take {FEWEST_PAIRS}.")
    head = (
        f"`python benchmarks/bfloat16_share.py`: {about['model']}, {about['dtype']}, {about['device']}, "
        f"{about['num_threads']} threads, torch {about['torch']}, {date.today().isoformat()}, {about['num_prompts']} "
        f"prompts, texts of at most {about['max_new_tokens']} tokens. Times are a token's, with a 95% interval."
    )
    table = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "", *table, *(f"\n{doubt}" for doubt in doubts)]) + "\n"


def told(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return ""
    interval = "" if ratio["low"] is None else f" ({ratio['low']:.2f}-{ratio['high']:.2f})"
    return f"{ratio['mean']:.2f}{'?' * is_noisy(ratio)}{interval}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts_heldout.jsonl")
    parser.add_argument("--num-prompts", type=int, default=100, help="the first of the file")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--no-compile", action="store_true", help="leave transformers' compiled decoding out")
    parser.add_argument(
        "--output", type=Path, help="keep texts and figures here, as JSON; go on from it if it is there"
    )
    parser.add_argument("--page", type=Path, help="write the table between the marks of this page")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompts = [
        encode_prompt(tokenizer, text, is_raw=False)["input_ids"][0]
        for text in read_prompts(arguments.prompts)[: arguments.num_prompts]
    ]
    about = {name: getattr(arguments, name) for name in ("dtype", "num_prompts", "max_new_tokens", "no_compile")}
    about |= {"model": Path(arguments.model).name, "adapter": arguments.adapter, "prompts": arguments.prompts.name}
    about |= {"device": processor(), "num_threads": torch.get_num_threads(), "torch": torch.__version__}
    texts = Texts.read(arguments.output, about)
    model = TiDARForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    stock = without_adapter(model)
    if arguments.adapter:
        model.load_adapter(arguments.adapter)
    ways = ways_of(model, stock, not arguments.no_compile)
    write_texts(texts, ways, prompts, arguments.max_new_tokens, lambda: texts.write(arguments.output))
    lines = lines_of(texts)
    texts.write(arguments.output, lines)
    print(markdown(texts, lines, torch.get_num_threads()))
    if arguments.page:
        put_between_marks(arguments.page, "half precision", [markdown(texts, lines, torch.get_num_threads())])


if __name__ == "__main__":
    main()
