"""`wavedraft data regenerate`: prompts answered by the model itself, to learn from."""

from pathlib import Path
from typing import Annotated

import typer

from .options import DTYPES, Device, Dtype, MaxNewTokens


def regenerate(
    model: Annotated[str, typer.Argument(help="The model that answers: a folder or a Hub id.")],
    prompts: Annotated[Path, typer.Argument(help="JSONL rows with `prompt`.")],
    output: Annotated[Path, typer.Argument(help="The JSONL file to write, or to go on with.")],
    max_new_tokens: MaxNewTokens = 192,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 answers greedily.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="For sampling; by default 0.")] = None,
    max_answer_tokens: Annotated[int | None, typer.Option(help="Stop once the file holds so many.")] = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
) -> None:
    """Let a model answer prompts itself: what it wrote is what its drafts learn best from."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..conversion.quiet_transformers import quiet_transformers
    from ..training import regenerate as regenerate_answers
    from ..training.dialogue import read_jsonl
    from .cli_checks import FOR_SAMPLING, check_choice, device_for, refuse

    check_choice("--dtype", dtype, DTYPES)
    if not temperature:
        refuse({"seed": seed}, FOR_SAMPLING)
    device = device_for(device)
    rows = list(read_jsonl(prompts))
    with quiet_transformers():
        answering = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
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
