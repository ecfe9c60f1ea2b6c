"""`wavedraft data regenerate`: prompts answered by the model itself, to learn from."""

from pathlib import Path
from typing import Annotated

import typer

from ..training.row_forms import read_columns
from ..training.row_sources import read_prompts
from .early_checks import FOR_SAMPLING, check_choice, check_device, check_folder, load_library, refuse, say
from .options import DTYPES, PROMPT_ROWS, Columns, Device, Dtype

Answering = Annotated[str, typer.Argument(help="The model that answers: a folder, or ORG/NAME on the Hub.")]
Prompts = Annotated[Path, typer.Argument(help=f"The file of prompts: {PROMPT_ROWS}.")]
Output = Annotated[Path, typer.Argument(help="The JSONL file to write, or to go on with.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="An answer ends after this many tokens, if not before.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Answer this many prompts at a time.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sample at this temperature; 0 answers greedily.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Draw the same answers again; by default 0. For sampling.")]
MaxAnswerTokens = Annotated[
    int | None, typer.Option(min=1, help="Stop when the file holds this many tokens of answers.")
]


def regenerate(
    model: Answering,
    prompts: Prompts,
    output: Output,
    columns: Columns = None,
    max_new_tokens: MaxNewTokens = 192,
    batch_size: BatchSize = 32,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    max_answer_tokens: MaxAnswerTokens = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
) -> None:
    """Let a model answer prompts itself. What it wrote is what its drafts learn best from."""
    check_choice("--dtype", dtype, DTYPES)
    if not temperature:
        refuse({"seed": seed}, FOR_SAMPLING)
    check_device(device)
    check_folder(model)
    rows = read_prompts(prompts, read_columns(columns))
    load_library(model)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from ..conversion.quiet_transformers import quiet_transformers
    from ..training.regeneration import answers_in, check_prompts
    from ..training.regeneration import regenerate as regenerate_answers
    from .cli_checks import device_for

    device = device_for(device)
    answers_in(output)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(model)
        check_prompts(rows, tokenizer, AutoConfig.from_pretrained(model), max_new_tokens)
        answering = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    num_tokens = regenerate_answers(
        answering,
        tokenizer,
        rows,
        output,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed or 0,
        max_answer_tokens=max_answer_tokens,
    )
    print(f"{output}: {num_tokens:,} tokens of answers")
    say(f"Next: wavedraft train {model} {output} OUTPUT teaches a TiDAR checkpoint of this model by them.")
