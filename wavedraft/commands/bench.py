"""`wavedraft bench`: every way to decode the same prompts with the same weights, timed."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .decoding_bar import decoding_bar
from .options import DTYPES, Adapter, Device, Dtype, PackedWeights

if TYPE_CHECKING:
    from ..bench import Settings

Assistant = Annotated[str | None, typer.Option(help="A smaller model, for transformers' assisted decoding.")]
Prompts = Annotated[
    Path | None, typer.Option(help="JSONL rows of `prompt` and `kind`, or a text file; else 20 of our own.")
]
PromptLengths = Annotated[
    str, typer.Option(help="Tokens that prompts are filled or cut to, as 128,2048; own leaves them as they are.")
]
DraftLengths = Annotated[str | None, typer.Option(help="K, as 4,8; by default the checkpoint's.")]
NumLookupTokens = Annotated[int, typer.Option(help="Tokens prompt lookup proposes at a time.")]
Compiled = Annotated[
    bool, typer.Option("--compiled", help="Plain decoding and drafts with a static cache and torch.compile, too.")
]
Only = Annotated[
    str | None, typer.Option(help="Lines of the table to measure beside AR, as 'AR compiled,auto'; by default all.")
]
Output = Annotated[Path | None, typer.Option(help="A folder for bench.json, bench.md and, with matplotlib, bench.png.")]


def bench(
    model: Annotated[str, typer.Argument(help="A TiDAR checkpoint: a folder or a Hub id.")],
    adapter: Adapter = None,
    assistant: Assistant = None,
    prompts: Prompts = None,
    batch_sizes: Annotated[str, typer.Option(help="A list, as 1,4,8,16.")] = "1,4",
    prompt_lengths: PromptLengths = "own",
    temperatures: Annotated[str, typer.Option(help="0 decodes greedily; as 0,1.")] = "0",
    draft_lengths: DraftLengths = None,
    num_branches: Annotated[str, typer.Option(help="B: integers, all, auto.")] = "1,3,all,auto",
    num_batches: Annotated[int, typer.Option(help="Of each kind of prompt.")] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds; a figure is the median of them.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Of every text: no end token ends one.")] = 32,
    num_lookup_tokens: NumLookupTokens = 10,
    compiled: Compiled = False,
    only: Only = None,
    packed_weights: PackedWeights = False,
    dtype: Dtype = "auto",
    device: Device = None,
    output: Output = None,
) -> None:
    """Time every way to decode with the same weights, in turn: plain, transformers' own speed-ups, drafting."""
    from ..bench import Settings
    from ..bench.prompts import PROMPTS, read_kinds
    from ..conversion.quiet_transformers import quiet_transformers
    from .cli_checks import check_choice, trained_draft_length
    from .cli_keywords import read_list

    check_choice("--dtype", dtype, DTYPES)
    trained_length = trained_draft_length(model)
    settings = Settings(
        batch_sizes=read_list(batch_sizes, "--batch-sizes", int),
        prompt_lengths=read_list(prompt_lengths, "--prompt-lengths", int, words=("own",)),
        temperatures=read_list(temperatures, "--temperatures", float),
        draft_lengths=read_list(draft_lengths or str(trained_length), "--draft-lengths", int),
        num_branches=read_list(num_branches, "--num-branches", int, words=("all", "auto")),
        num_batches=num_batches,
        repeats=repeats,
        max_new_tokens=max_new_tokens,
        num_lookup_tokens=num_lookup_tokens,
        has_compiled=compiled,
        has_packed_weights=packed_weights,
        only=tuple(map(str.strip, only.split(","))) if only else (),
    )
    texts = read_kinds(prompts) if prompts is not None else PROMPTS
    options = {"model": model, "adapter": adapter, "assistant": assistant, "prompts": prompts and str(prompts)}
    with quiet_transformers():
        figures = measured(settings, texts, options, dtype, device)
    print_figures(figures, output)


def measured(
    settings: "Settings", texts: dict[str, list[str]], options: dict[str, Any], dtype: str, device: str | None
) -> dict[str, Any]:
    """The figures of a bench of one checkpoint.

    Args:
        texts: prompts by their kind.
        options: what the report says of the call: `model`, `adapter` and `assistant` are loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    from ..bench import bench as run_bench
    from ..bench import contenders_of, num_runs, without_adapter
    from ..bench.prompts import encode_kinds
    from ..bench.report import report
    from .cli_checks import device_for
    from .loading import load, load_assistant

    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    encoded, filler = encode_kinds(tokenizer, texts)
    settings.check_against(AutoConfig.from_pretrained(options["model"]), encoded)
    assistant = None if options["assistant"] is None else load_assistant(options["assistant"], dtype, tokenizer)
    device = device_for(device)
    loaded = load(options["model"], dtype, device, adapter=None)
    left_out = why_left_out(loaded) if settings.has_packed_weights else None
    if left_out is not None:
        print(left_out, file=sys.stderr)
        settings = replace(settings, has_packed_weights=False)
    stock = without_adapter(loaded)
    if options["adapter"] is not None:
        loaded.load_adapter(options["adapter"])
    contenders = contenders_of(loaded, stock, settings, None if assistant is None else assistant.to(device))
    with decoding_bar(num_runs(contenders, encoded, settings)) as advance:
        results = run_bench(contenders, encoded, filler, settings, advance)
    return report(results, loaded, settings, options | {"left_out": left_out})


def why_left_out(model: Any) -> str | None:
    """Why this machine measures without packed weights; None where it has products of them.

    Raises:
        ValueError: no machine has them for a model of this dtype or on this device.
    """
    from ..generation.execution.packed_linear import PACKABLE, check_packable, why_no_packed_products

    if model.dtype in PACKABLE and (why := why_no_packed_products(model.dtype)):
        return f"`--packed-weights` is left aside: {why}."
    check_packable(model)
    return None


def print_figures(figures: dict[str, Any], output: Path | None) -> None:
    """Prints a bench's tables and notes, and writes its files where there is a folder for them."""
    from ..bench.report import has_matplotlib, notes, save, tables

    for table in tables(figures):
        Console().print(table)
    for note in notes(figures):
        Console(highlight=False).print(note)
    if output is not None:
        print(*save(figures, output), sep="\n")
        if not has_matplotlib():
            print("no picture: matplotlib is not installed (pip install 'wavedraft[plot]')")
