"""Options of more than one verb.

Typer reads these types to write `--help`. This file and the top of each verb's file import nothing heavy: what needs
torch is imported inside the verb.
"""

from typing import Annotated

import typer

DTYPES = ("auto", "float32", "bfloat16", "float16")

Model = Annotated[str, typer.Argument(help="A TiDAR or recurrent-depth checkpoint: a folder or a Hub id.")]
Adapter = Annotated[str | None, typer.Option(help="A PEFT adapter that was taught to draft.")]
NumBranches = Annotated[str | None, typer.Option(help="Numbers of accepted tokens to draft behind, or auto (TiDAR).")]
Exact = Annotated[str | None, typer.Option(help="tie-safe: plain decoding's text in half precision (TiDAR).")]
PackedWeights = Annotated[
    bool, typer.Option("--packed-weights", help="Keep weights a second time, in the order a CPU reads.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1)]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
Device = Annotated[str | None, typer.Option(help="By default cuda where there is one, else cpu.")]
