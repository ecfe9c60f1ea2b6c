"""`wavedraft generate`: texts that continue prompts, with the forwards they took."""

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from .options import DTYPES, Adapter, Device, Dtype, Exact, MaxNewTokens, Model, NumBranches, PackedWeights, Temperature

DraftLength = Annotated[
    int | None, typer.Option(help="Tokens drafted at a time; 0 drafts none (TiDAR, self-speculation).")
]
Policy = Annotated[str | None, typer.Option(help="Of a recurrent-depth model: exact, diffusion-forcing, ...")]
Preset = Annotated[str | None, typer.Option(help="Of a recurrent-depth model: a row of the paper's table.")]
Seed = Annotated[int | None, typer.Option(help="For sampling; of a recurrent-depth model's first states, too.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]
SAMPLED = "identical: not compared; sampled texts share a distribution, not their tokens"


def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    adapter: Adapter = None,
    draft_length: DraftLength = None,
    num_branches: NumBranches = None,
    exact: Exact = None,
    packed_weights: PackedWeights = False,
    policy: Policy = None,
    preset: Preset = None,
    num_recurrences: Annotated[int | None, typer.Option(help="Full depth of a recurrent-depth model.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = None,
    raw: Raw = False,
    compare: Annotated[bool, typer.Option("--compare", help="Decode plainly as well, and compare.")] = False,
) -> None:
    """Write text in fewer forwards, and say how many."""
    from transformers import AutoTokenizer

    from ..bench.prompts import encode_prompt
    from ..conversion.quiet_transformers import quiet_transformers
    from ..generation.execution.packed_linear import check_packable
    from .cli_checks import check_adapter, check_choice, check_keywords, device_for
    from .cli_keywords import decoding_keywords, drafting_keywords, seed_plain_decoding, without_none
    from .loading import load

    check_choice("--dtype", dtype, DTYPES)
    options = without_none(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature or None, seed=seed
    )
    options |= without_none(top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    depth = {"policy": policy, "preset": preset, "num_recurrences": num_recurrences}
    drafting = drafting_keywords(num_branches, exact, packed_weights)
    with quiet_transformers():
        device = device_for(device)
        check_adapter(adapter, model)
        parallel, plain = decoding_keywords(model, options, draft_length, depth, drafting)
        check_keywords(model, parallel)
        seed_plain_decoding(plain, parallel)
        tokenizer = AutoTokenizer.from_pretrained(model)
        encoded = [encode_prompt(tokenizer, prompt, raw) for prompt in prompts]
        loaded = load(model, dtype, device, adapter)
        if packed_weights:
            check_packable(loaded, exact)
        decode_prompts(loaded, tokenizer, prompts, encoded, parallel, plain if compare else None)


def decode_prompts(
    model: Any, tokenizer: Any, prompts: list[str], encoded: list[Any], parallel: dict, plain: dict | None
) -> None:
    """Prints each text as it is written, then a table of what they took.

    Args:
        parallel, plain: keywords of `generate`; without `plain` there is nothing to compare with.
    """
    from transformers import TextStreamer

    from ..modeling_recurrent.checkpoint_recurrent import is_recurrent_config
    from .timed_runs import is_identical, runs_table, timed_generate, timed_recurrent

    timed = timed_recurrent if is_recurrent_config(model.config) else timed_generate
    encoded = [inputs.to(model.device) for inputs in encoded]
    if parallel.get("num_branches") == "auto":
        print("Measuring what a forward costs here ...", file=sys.stderr)  # once a model; not part of any run below
        model.generate(**encoded[0], **parallel | {"max_new_tokens": 2})
    drafted_runs, plain_runs = [], []
    for prompt, inputs in zip(prompts, encoded, strict=True):
        print(f"\n> {prompt}\n")
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        drafted_runs.append(timed(model, inputs, streamer=streamer, **parallel))
        if plain is not None:
            plain_runs.append(timed(model, inputs, **plain))
    print()
    Console().print(runs_table(prompts, drafted_runs, plain_runs))
    if plain is not None:
        answer = "yes" if is_identical(drafted_runs, plain_runs) else "no"
        print(SAMPLED if plain["do_sample"] else f"identical: {answer}")
