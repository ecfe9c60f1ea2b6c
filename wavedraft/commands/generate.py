"""`wavedraft generate`: texts that continue prompts, with the forwards they took."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.row_forms import prompt_row, read_columns
from ..training.row_sources import read_prompts
from .early_checks import check_choice, check_decoding, check_trace, load_library, refuse, say
from .options import (
    PROMPT_ROWS,
    Adapter,
    Columns,
    Compile,
    Device,
    DraftLength,
    Dtype,
    Exact,
    MaxNewTokens,
    MinP,
    Model,
    NumBranches,
    NumRecurrences,
    PackedWeights,
    Penalty,
    Policy,
    Preset,
    Raw,
    Seed,
    Temperature,
    TopK,
    TopP,
    Trust,
)

Texts = Annotated[list[str] | None, typer.Argument(metavar="prompts", help="The prompts to continue, each in quotes.")]
PromptFile = Annotated[
    Path | None,
    typer.Option("--prompts", help=f"Read prompts from a file: {PROMPT_ROWS}."),
]
Compare = Annotated[bool, typer.Option("--compare", help="Decode each prompt plainly as well, and compare.")]
Output = Annotated[
    str,
    typer.Option(help="Print text with a table, or json: a row a prompt of prompt, text, tokens, forwards, seconds."),
]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        "--trace", help="Write a picture of what each forward drafted and wrote: a file that ends in .html or .svg."
    ),
]


def generate(
    model: Model,
    texts: Texts = None,
    prompts: PromptFile = None,
    columns: Columns = None,
    adapter: Adapter = None,
    draft_length: DraftLength = None,
    num_branches: NumBranches = None,
    exact: Exact = None,
    trust: Trust = None,
    packed_weights: PackedWeights = None,
    compile: Compile = False,
    policy: Policy = None,
    preset: Preset = None,
    num_recurrences: NumRecurrences = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = None,
    raw: Raw = False,
    compare: Compare = False,
    output: Output = "text",
    trace: TraceFile = None,
) -> None:
    """Continue prompts in fewer forwards than one a token, and say how many."""
    given: dict[str, Any] = dict(locals())
    check_decoding(given)
    check_choice("--output", output, ("text", "json"))
    if bool(texts) == bool(prompts):
        raise ValueError("Give prompts either after the model, each in quotes, or in a file: --prompts FILE.")
    if prompts is None:
        refuse({"columns": columns}, "has no effect without --prompts.")
        given["rows"] = [prompt_row(text) for text in texts or ()]
    else:
        given["rows"] = read_prompts(prompts, read_columns(columns))
    check_trace(trace)
    load_library(model, adapter)
    from .written_texts import write_texts

    write_texts(given)
    say(f"Next: wavedraft audit {model} --prompts FILE says on many prompts whether the texts are plain decoding's.")
