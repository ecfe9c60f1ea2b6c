"""`wavedraft bench`: every way to decode the same prompts with the same weights, timed."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.prompts import PROMPTS, encode_kinds, read_kinds
from ..bench.settings import Settings
from ..training.row_forms import Row, read_columns
from .decoding_bar import decoding_bar
from .drafting_record import Record, check_recordable, record_drafting
from .early_checks import (
    check_adapter_folder,
    check_choice,
    check_device,
    check_folder,
    load_library,
    read_list,
    refuse,
    say,
)
from .options import DTYPES, PROMPT_ROWS, Adapter, Columns, Compile, Device, Dtype, PackedWeights, Trust

Assistant = Annotated[str | None, typer.Option(help="Time assisted decoding too, with this smaller model.")]
Prompts = Annotated[
    Path | None,
    typer.Option(help=f"The file of prompts: {PROMPT_ROWS}; rows may have a kind. By default 20 of our own."),
]
BatchSizes = Annotated[str, typer.Option(help="Time batches of these sizes: a list, as 1,4,8,16.")]
PromptLengths = Annotated[
    str, typer.Option(help="Fill or cut prompts to these numbers of tokens, as 128,2048; own leaves them as they are.")
]
Temperatures = Annotated[str, typer.Option(help="Time these temperatures, as 0,1; 0 decodes greedily.")]
DraftLengths = Annotated[
    str | None, typer.Option(help="Draft these numbers of tokens at a time, as 4,8; by default the checkpoint's.")
]
NumBranches = Annotated[
    str,
    typer.Option(
        help="Prepare the next draft for these numbers of accepted tokens: a list of numbers, all, auto. With auto, "
        "generate's default, the clock decides."
    ),
]
NumBatches = Annotated[
    int, typer.Option(min=1, help="Time this many batches of each kind of prompt; fewer where prompts run out.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Decode each batch this often; the median of the rounds counts.")]
MaxNewTokens = Annotated[int, typer.Option(min=2, help="Write this many tokens of every text; no end token ends one.")]
NumLookupTokens = Annotated[int, typer.Option(min=1, help="Let transformers' prompt lookup propose this many tokens.")]
Only = Annotated[
    str | None,
    typer.Option(help="Measure only these lines of the table beside AR, as 'AR compiled,default'; by default all."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        help="Write bench.json, bench.md and, with matplotlib, bench.png into this folder; or the figures alone into "
        "this file, if it ends in .json."
    ),
]
UNKNOWN_LENGTH = "64"  # the longest that any checkpoint is taught, until this one's is read


def bench(
    model: Annotated[str, typer.Argument(help="The TiDAR checkpoint: a folder, or ORG/NAME on the Hub.")],
    adapter: Adapter = None,
    assistant: Assistant = None,
    prompts: Prompts = None,
    columns: Columns = None,
    batch_sizes: BatchSizes = "1,4",
    prompt_lengths: PromptLengths = "own",
    temperatures: Temperatures = "0",
    draft_lengths: DraftLengths = None,
    num_branches: NumBranches = "1,3,all,auto",
    num_batches: NumBatches = 2,
    repeats: Repeats = 2,
    max_new_tokens: MaxNewTokens = 32,
    num_lookup_tokens: NumLookupTokens = 10,
    compile: Compile = False,
    only: Only = None,
    trust: Trust = None,
    packed_weights: PackedWeights = None,
    dtype: Dtype = "auto",
    device: Device = None,
    output: Output = None,
    record: Record = False,
) -> None:
    """Time every way to decode with the same weights, in turn: plain, transformers' own speed-ups, drafting."""
    check_choice("--dtype", dtype, DTYPES)
    check_device(device)
    check_folder(model)
    check_adapter_folder(adapter)
    if any(read_list(temperatures, "--temperatures", float)):
        refuse({"trust": trust}, "is for greedy decoding, but --temperatures has others than 0. Leave one out.")
    if prompts is None:
        refuse({"columns": columns}, "has no effect without --prompts.")
    texts = read_kinds(prompts, read_columns(columns)) if prompts else PROMPTS
    settings = Settings(
        batch_sizes=read_list(batch_sizes, "--batch-sizes", int),
        prompt_lengths=read_list(prompt_lengths, "--prompt-lengths", int, words=("own",)),
        temperatures=read_list(temperatures, "--temperatures", float),
        draft_lengths=read_list(draft_lengths or UNKNOWN_LENGTH, "--draft-lengths", int),
        num_branches=read_list(num_branches, "--num-branches", int, words=("all", "auto")),
        num_batches=num_batches,
        repeats=repeats,
        max_new_tokens=max_new_tokens,
        num_lookup_tokens=num_lookup_tokens,
        has_compiled=compile,
        has_packed_weights=packed_weights,
        only=tuple(map(str.strip, only.split(","))) if only else (),
    )
    load_library(model, adapter)
    recorded_in = check_recordable(model, adapter) if record else None
    options: dict[str, Any] = {"model": model, "adapter": adapter, "assistant": assistant, "trust": trust}
    options["prompts"] = prompts and str(prompts)
    figures_of(settings, texts, options, draft_lengths is not None, dtype, device, output, recorded_in)
    say(f"Next: wavedraft audit {model} --prompts FILE says whether the faster texts are plain decoding's.")


def figures_of(
    settings: Settings,
    texts: dict[str, list[Row]],
    options: dict[str, Any],
    has_lengths: bool,
    dtype: str,
    device: str | None,
    output: Path | None,
    recorded_in: Path | None,
) -> None:
    """Measures, prints the figures, and records acceptance where asked.

    Args:
        texts: prompts by their kind.
        options: of the command: `model`, `adapter`, `assistant`, `prompts` and `trust`. The report names them.
        has_lengths: whether `settings.draft_lengths` was given; by default it is the checkpoint's.
        recorded_in: the generation_config.json of `--record`.
    """
    from transformers import AutoConfig, AutoTokenizer

    from ..conversion.quiet_transformers import quiet_transformers
    from .cli_checks import trained_draft_length

    trained = trained_draft_length(options["model"])
    if not has_lengths:
        settings = replace(settings, draft_lengths=(trained,))
    if settings.has_compiled:
        say("Compiling each compiled way at its first run: seconds to minutes, told apart from its times.")
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(options["model"])
        encoded, filler = encode_kinds(tokenizer, texts)
        settings.check_against(AutoConfig.from_pretrained(options["model"]), encoded)
        loaded, figures = measured(settings, encoded, filler, options, tokenizer, dtype, device)
        print_figures(figures, output)
        if recorded_in is not None:
            ids = [one for of_kind in encoded.values() for one in of_kind]
            kinds = [kind for kind, of_kind in encoded.items() for _ in of_kind]
            record_drafting(loaded, ids, kinds, settings.max_new_tokens, recorded_in)


def measured(
    settings: Settings,
    encoded: dict[str, list[Any]],
    filler: Any,
    options: dict[str, Any],
    tokenizer: Any,
    dtype: str,
    device: str | None,
) -> tuple[Any, dict[str, Any]]:
    """A checkpoint, and the figures of its bench.

    Args:
        encoded: ids [P] of the prompts by their kind.
        filler: ids that fill prompts up.
        options: what the report says of the call: `model`, `adapter` and `assistant` are loaded, `trust` is timed.
    """
    from ..bench.contenders import contenders_of
    from ..bench.measure import bench as run_bench
    from ..bench.measure import num_runs
    from ..bench.report import report
    from ..generation.execution.packed_linear import check_packable
    from .cli_checks import device_for
    from .loading import load_assistant, load_with_stock

    assistant = None if options["assistant"] is None else load_assistant(options["assistant"], dtype, tokenizer)
    device = device_for(device)
    loaded, stock = load_with_stock(options["model"], options["adapter"], dtype, device)
    if settings.has_packed_weights:
        check_packable(loaded)
    assistant = None if assistant is None else assistant.to(device)
    contenders = contenders_of(loaded, stock, settings, assistant, options["trust"])
    with decoding_bar(num_runs(contenders, encoded, settings)) as advance:
        results = run_bench(contenders, encoded, filler, settings, advance)
    return loaded, report(results, loaded, contenders, settings, options)


def print_figures(figures: dict[str, Any], output: Path | None) -> None:
    """Prints a bench's tables and notes, and writes its files where there is a place for them."""
    from rich.console import Console

    from ..bench.picture import has_matplotlib
    from ..bench.report import save
    from ..bench.tables import notes, tables

    for table in tables(figures):
        Console().print(table)
    print()
    for note in notes(figures):
        Console(highlight=False).print(note)
    if output is not None:
        print(*save(figures, output), sep="\n")
        if output.suffix != ".json" and not has_matplotlib():
            print("no picture: matplotlib is not installed (pip install 'wavedraft[plot]')")
