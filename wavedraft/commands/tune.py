"""`wavedraft tune`: what decodes fastest on this machine, kept in the checkpoint's generation config."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.prompts import PROMPTS, encode_kinds, read_kinds
from ..training.row_forms import read_columns
from .decoding_bar import decoding_bar
from .drafting_record import check_writable, write_whole
from .early_checks import check_adapter_folder, check_choice, check_device, check_folder, load_library, refuse, say
from .options import DTYPES, PROMPT_ROWS, Adapter, Columns, Device, Dtype

CHOSEN = ("draft_length", "num_branches", "packed_weights")  # what tuning may write; earlier choices are replaced

Tuned = Annotated[str, typer.Argument(help="The TiDAR checkpoint: a folder that may be written.")]
Prompts = Annotated[
    Path | None,
    typer.Option(help=f"Tune for the prompts of this file: {PROMPT_ROWS}. By default five of our own, one a kind."),
]
MaxNewTokens = Annotated[int, typer.Option(min=2, help="Write this many tokens of every text; no end token ends one.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Time compiled steps too. Compiling takes seconds to minutes.")
]
Print = Annotated[bool, typer.Option("--print", help="Print what was found, and write nothing.")]


def tune(
    model: Tuned,
    adapter: Adapter = None,
    prompts: Prompts = None,
    columns: Columns = None,
    max_new_tokens: MaxNewTokens = 32,
    compile: Compile = False,
    dtype: Dtype = "auto",
    device: Device = None,
    print_only: Print = False,
) -> None:
    """Find what decodes fastest on this machine, one text at a time, and keep it in generation_config.json."""
    check_choice("--dtype", dtype, DTYPES)
    check_device(device)
    check_folder(model)
    check_adapter_folder(adapter)
    if prompts is None:
        refuse({"columns": columns}, "has no effect without --prompts.")
    texts = read_kinds(prompts, read_columns(columns)) if prompts else PROMPTS
    path = None if print_only else check_writable(Path(model), "tune", "Or give --print.")
    load_library(model, adapter)
    from ..bench.tuning import num_tuning_runs, settings_of
    from ..bench.tuning import tune as run_tuning
    from ..conversion.quiet_transformers import quiet_transformers
    from .cli_checks import device_for, trained_draft_length
    from .loading import load_with_stock

    settings = settings_of(trained_draft_length(model), compile, max_new_tokens)
    with quiet_transformers():
        encoded, filler = encoded_for(model, settings, texts)
        loaded, stock = load_with_stock(model, adapter, dtype, device_for(device))
        with decoding_bar(num_tuning_runs(encoded, settings)) as advance:
            tuned = run_tuning(loaded, stock, encoded, filler, settings, advance)
    print_tuned(tuned)
    if path is not None:
        write_keywords(path, tuned.keywords)
        say(f'{path} has them now. Next: wavedraft generate {model} "PROMPT" --compare')


def encoded_for(model: str, settings: Any, texts: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The ids of prompts by kind, and filler ids, checked against the checkpoint's config."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded, filler = encode_kinds(tokenizer, texts)
    settings.check_against(AutoConfig.from_pretrained(model), encoded)
    return encoded, filler


def print_tuned(tuned: Any) -> None:
    """Prints the tables of both benches, and the keywords that were chosen."""
    from rich.console import Console

    from ..bench.tables import notes, tables

    for figures in tuned.reports:
        Console().print(tables(figures)[0])
    print()
    for note in notes(tuned.reports[-1]):
        Console(highlight=False).print(note)
    found = ", ".join(f"{name}={value!r}" for name, value in tuned.keywords.items())
    print(f"fastest: {found or 'the defaults'}")
    print(f"speed: {tuned.speed_up:.2f}x the stock model, one text at a time")


def write_keywords(path: Path, keywords: dict[str, Any]) -> None:
    """Puts keywords of `generate` into a generation_config.json, in place of those of an earlier tuning."""
    from ..hub.hub_repository import FROM_MODEL_CONFIG

    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept = {name: value for name, value in values.items() if name not in CHOSEN}
    write_whole(path, json.dumps(kept | keywords | {FROM_MODEL_CONFIG: False}, indent=2) + "\n")
