"""Options of more than one verb, and the words they may be.

Typer reads these types to write `--help`. This file and the top of each verb's file import nothing heavy: what needs
torch is imported inside the verb, after its options were checked.
"""

from typing import Annotated

import typer

DTYPES = ("auto", "float32", "bfloat16", "float16")
EXACT_MODES = ("tie-safe",)
POLICIES = ("adaptive", "autoregressive", "diffusion-forcing", "exact", "published", "self-speculative")
PRESETS = (
    *("adaptive", "diffusion-forcing-r2", "diffusion-forcing-r4", "self-speculative"),
    *("static-r32", "static-r4", "static-r64", "static-r8"),
)

PROMPT_ROWS = "rows with a prompt or messages (JSONL, JSON, CSV, Parquet), or text with one prompt a line"

Model = Annotated[
    str, typer.Argument(help="The TiDAR or recurrent-depth checkpoint: a folder, or ORG/NAME on the Hub.")
]
Adapter = Annotated[
    str | None, typer.Option(help="The PEFT adapter that was taught to draft: a folder, or ORG/NAME on the Hub.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="A text ends after this many new tokens, if not before.")]
Columns = Annotated[
    str | None,
    typer.Option(help="Read rows from these columns, as prompt=question,answer=reply, where they have other names."),
]
Raw = Annotated[bool, typer.Option("--raw", help="Continue prompts as they are, without the chat template.")]

# Speed. None of them but --trust changes a greedy text, save by rounding.
DraftLength = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Draft this many tokens at a time; by default as many as the checkpoint was taught. 0 decodes plainly. "
        "(TiDAR; of recurrent-depth models, self-speculative decoding.)",
    ),
]
NumBranches = Annotated[
    str | None,
    typer.Option(
        help="Prepare the next draft for this many numbers of accepted tokens, or for all: all. By default, auto: the "
        "clock decides this, and how much is drafted. (TiDAR.)"
    ),
]
Exact = Annotated[
    str | None, typer.Option(help="tie-safe writes plain decoding's text in half precision too. (TiDAR, greedy.)")
]
Trust = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Count the model's own logits this much, and those of the masks for the rest. Below 1 the text is not "
        "plain decoding's. (TiDAR, greedy, every branch.)",
    ),
]
PackedWeights = Annotated[
    bool | None,
    typer.Option(
        "--packed-weights/--no-packed-weights",
        help="Keep the weights a second time, in the order a CPU reads fastest; by default where memory is plentiful. "
        "(TiDAR.)",
    ),
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile decode steps over a static cache. The first text waits for it, once."),
]
Policy = Annotated[str | None, typer.Option(help=f"How a recurrent-depth model decodes: {', '.join(POLICIES)}.")]
Preset = Annotated[
    str | None,
    typer.Option(help=f"Take a row of the paper's table for a recurrent-depth model: {', '.join(PRESETS)}."),
]
NumRecurrences = Annotated[
    int | None, typer.Option(min=1, help="Run a recurrent-depth model's core this often; by default as it was trained.")
]
Dtype = Annotated[str, typer.Option(help=f"Compute in one of {', '.join(DTYPES)}; auto is the checkpoint's own.")]
Device = Annotated[
    str | None, typer.Option(help="Compute on this device, as cuda:1; by default cuda if any, else cpu.")
]

# Sampling.
Temperature = Annotated[float, typer.Option(min=0.0, help="Sample at this temperature; 0 decodes greedily.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Sample from this many likeliest tokens; 0 samples from all.")]
TopP = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens that together reach this share."),
]
MinP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Sample from tokens at least this likely, beside the likeliest.")
]
Penalty = Annotated[float | None, typer.Option(help="Make tokens that were written already less likely: above 1.")]
Seed = Annotated[
    int | None,
    typer.Option(min=0, help="Draw the same text again. It sets a recurrent-depth model's first states too."),
]
