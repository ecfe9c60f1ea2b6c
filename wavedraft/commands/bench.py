"""`wavedraft bench`: every way to decode the same prompts with the same weights, timed."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.prompts import PROMPTS, encode_kinds, read_kinds
from ..bench.settings import Settings
from ..training.row_forms import Row, read_columns
from .decoding_bar import decoding_bar
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
from .options import DTYPES, PROMPT_ROWS, Adapter, Columns, Compile, Device, Dtype, PackedWeights

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
    typer.Option(help="Prepare the next draft for these numbers of accepted tokens: a list of numbers, all, auto."),
]
NumBatches = Annotated[int, typer.Option(min=1, help="Time this many batches of each kind of prompt.")]
Repeats = Annotated[int, typer.Option(min=1, help="Repeat this often; each figure is the median of the rounds.")]
MaxNewTokens = Annotated[int, typer.Option(min=2, help="Write this many tokens of every text; no end token ends one.")]
NumLookupTokens = Annotated[int, typer.Option(min=1, help="Let transformers' prompt lookup propose this many tokens.")]
Only = Annotated[
    str | None,
    typer.Option(help="Measure only these lines of the table beside AR, as 'AR compiled,auto'; by default all."),
]
Output = Annotated[
    Path | None, typer.Option(help="Write bench.json, bench.md and, with matplotlib, bench.png into this folder.")
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
    num_batches: NumBatches = 1,
    repeats: Repeats = 3,
    max_new_tokens: MaxNewTokens = 32,
    num_lookup_tokens: NumLookupTokens = 10,
    compile: Compile = False,
    only: Only = None,
    packed_weights: PackedWeights = None,
    dtype: Dtype = "auto",
    device: Device = None,
    output: Output = None,
) -> None:
    """Time every way to decode with the same weights, in turn: plain, transformers' own speed-ups, drafting."""
    check_choice("--dtype", dtype, DTYPES)
    check_device(device)
    check_folder(model)
    check_adapter_folder(adapter)
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
    load_library()
    options = {"model": model, "adapter": adapter, "assistant": assistant, "prompts": prompts and str(prompts)}
    print_figures(figures_of(settings, texts, options, draft_lengths is not None, dtype, device), output)
    say(f"Next: wavedraft audit {model} --prompts FILE says whether the faster texts are plain decoding's.")


def figures_of(
    settings: Settings,
    texts: dict[str, list[Row]],
    options: dict[str, Any],
    has_lengths: bool,
    dtype: str,
    device: str | None,
) -> dict[str, Any]:
    """Measures.

    Args:
        texts: prompts by their kind.
        options: of the command: `model`, `adapter`, `assistant` and `prompts`.
        has_lengths: whether `settings.draft_lengths` was given; by default it is the checkpoint's.
    """
    from ..conversion.quiet_transformers import quiet_transformers
    from .cli_checks import trained_draft_length

    trained = trained_draft_length(options["model"])
    if not has_lengths:
        settings = replace(settings, draft_lengths=(trained,))
    if settings.has_compiled:
        say("Compiling each compiled way at its first run: seconds to minutes, told apart from its times.")
    with quiet_transformers():
        return measured(settings, texts, options, dtype, device)


def measured(
    settings: Settings, texts: dict[str, list[Row]], options: dict[str, Any], dtype: str, device: str | None
) -> dict[str, Any]:
    """The figures of a bench of one checkpoint.

    Args:
        texts: prompts by their kind.
        options: what the report says of the call: `model`, `adapter` and `assistant` are loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    from ..bench.contenders import contenders_of, without_adapter
    from ..bench.measure import bench as run_bench
    from ..bench.measure import num_runs
    from ..bench.report import report
    from ..generation.execution.packed_linear import check_packable, pays_to_pack
    from .cli_checks import device_for
    from .loading import load, load_assistant

    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    encoded, filler = encode_kinds(tokenizer, texts)
    settings.check_against(AutoConfig.from_pretrained(options["model"]), encoded)
    assistant = None if options["assistant"] is None else load_assistant(options["assistant"], dtype, tokenizer)
    device = device_for(device)
    loaded = load(options["model"], dtype, device, adapter=None)
    if settings.has_packed_weights:
        check_packable(loaded)
    if settings.has_packed_weights is None:
        settings = replace(settings, has_packed_weights=pays_to_pack(loaded))
    stock = without_adapter(loaded)
    if options["adapter"] is not None:
        loaded.load_adapter(options["adapter"])
    contenders = contenders_of(loaded, stock, settings, None if assistant is None else assistant.to(device))
    with decoding_bar(num_runs(contenders, encoded, settings)) as advance:
        results = run_bench(contenders, encoded, filler, settings, advance)
    return report(results, loaded, settings, options)


def print_figures(figures: dict[str, Any], output: Path | None) -> None:
    """Prints a bench's tables and notes, and writes its files where there is a folder for them."""
    from rich.console import Console

    from ..bench.report import has_matplotlib, notes, save, tables

    for table in tables(figures):
        Console().print(table)
    for note in notes(figures):
        Console(highlight=False).print(note)
    if output is not None:
        print(*save(figures, output), sep="\n")
        if not has_matplotlib():
            print("no picture: matplotlib is not installed (pip install 'wavedraft[plot]')")
