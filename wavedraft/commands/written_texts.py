"""What `wavedraft generate` does after its options were checked: texts as they are written, and what they took."""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer, StoppingCriteria, StoppingCriteriaList, TextStreamer

from ..audit import trust_of
from ..bench.prompts import encode_prompt
from ..conversion.quiet_transformers import quiet_transformers
from ..generation.execution.packed_linear import check_packable
from ..modeling_recurrent.checkpoint_recurrent import is_recurrent_config
from ..trace import Trace, TraceStreamer
from ..trace_picture import write_picture
from ..training.position_table import check_fit
from ..training.row_forms import Row
from .cli_checks import check_adapter, device_for, has_wavefront
from .cli_keywords import both_keywords
from .decoding_bar import decoding_bar
from .early_checks import say
from .loading import load
from .timed_runs import (
    Run,
    is_identical,
    num_calls,
    print_runs,
    timed_generate,
    timed_recurrent,
    told_of,
    why_different,
)

SAMPLED = "identical: not compared; sampled texts share a distribution, not their tokens"
NUM_WARM_UP = 16  # tokens, in which each step that is to be compared occurs twice
COMPILING = "Compiling the decode steps: seconds to minutes, once for each length of text. It is not part of any time."


def write_texts(given: dict[str, Any]) -> None:
    """Prints the text of each prompt, and what it took.

    Args:
        given: the options of `wavedraft generate` by their names, and the prompts as `rows`.
    """
    model, prompts = given["model"], given["rows"]
    with quiet_transformers():
        device = device_for(given["device"])
        check_adapter(given["adapter"], model)
        parallel, plain = both_keywords(given)
        if given["trace"] and has_wavefront(model, parallel):
            parallel["record_wavefront"] = True
        tokenizer = AutoTokenizer.from_pretrained(model)
        encoded = [encode_prompt(tokenizer, prompt, given["raw"]) for prompt in prompts]
        lengths = [inputs["input_ids"].shape[1] for inputs in encoded]
        check_fit(AutoConfig.from_pretrained(model), zip(prompts, lengths, strict=True), given["max_new_tokens"])
        loaded = load(model, given["dtype"], device, given["adapter"])
        if given["packed_weights"]:
            check_packable(loaded)
        encoded = [inputs.to(loaded.device) for inputs in encoded]
        longest = max(encoded, key=lambda inputs: inputs["input_ids"].shape[1])
        if "compile_config" in parallel:
            say(COMPILING)
        if "compile_config" in parallel or given["compare"]:
            warm_up(loaded, longest, parallel)
        if given["compare"]:
            warm_up(loaded, longest, plain)
        decode = decode_to_json if given["output"] == "json" else decode_to_text
        traces: list[Trace] | None = [] if given["trace"] else None
        decode(loaded, tokenizer, prompts, encoded, parallel, plain if given["compare"] else None, traces)
        if traces is not None:
            write_picture(given["trace"], traces, tokenizer)
            say(f"The trace is in {given['trace']}.")


class FirstSteps(StoppingCriteria):
    """Ends a text when it is `length` tokens long."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


def warm_up(model: Any, inputs: Any, keywords: dict[str, Any]) -> None:
    """Decodes a few tokens, so that no timed text waits for what a first one does."""
    few = FirstSteps(inputs["input_ids"].shape[1] + NUM_WARM_UP)
    model.generate(**inputs, **keywords, stopping_criteria=StoppingCriteriaList([few]))


def decode_to_text(
    model: Any,
    tokenizer: Any,
    prompts: list[Row],
    encoded: list[Any],
    parallel: dict[str, Any],
    plain: dict[str, Any] | None,
    traces: list[Trace] | None = None,
) -> None:
    """Prints each text as it is written, then a table of what they took.

    Args:
        parallel, plain: keywords of `generate`; without `plain` there is nothing to compare with.
        traces: gets the trace of each parallel decode; None records none.
    """
    timed = timed_recurrent if is_recurrent_config(model.config) else timed_generate
    drafted_runs, plain_runs = [], []
    for prompt, inputs in zip(prompts, encoded, strict=True):
        print(f"\n> {last_words(prompt)}\n")
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        drafted_runs.append(traced(timed, traces, prompt)(model, inputs, streamer=streamer, **parallel))
        if plain is not None:
            plain_runs.append(timed(model, inputs, **plain))
    print()
    print_runs(list(map(last_words, prompts)), drafted_runs, plain_runs, Console())
    if plain is not None:
        pairs = zip(drafted_runs, plain_runs, strict=True)
        same = [is_identical(*pair) for pair in pairs]
        reason = why_different(model, trust_of(model, parallel))
        print(SAMPLED if plain["do_sample"] else told_of_identical(same, reason))


def decode_to_json(
    model: Any,
    tokenizer: Any,
    prompts: list[Row],
    encoded: list[Any],
    parallel: dict[str, Any],
    plain: dict[str, Any] | None,
    traces: list[Trace] | None = None,
) -> None:
    """Prints a row of JSON for each prompt when its text is there.

    Args:
        parallel, plain, traces: as of `decode_to_text`.
    """
    timed = timed_recurrent if is_recurrent_config(model.config) else timed_generate
    with decoding_bar(len(prompts)) as advance:
        for prompt, inputs in zip(prompts, encoded, strict=True):
            run = traced(timed, traces, prompt)(model, inputs, **parallel)
            row = row_of(prompt, tokenizer.decode(run.new_ids, skip_special_tokens=True), run)
            if plain is not None:
                other = timed(model, inputs, **plain)
                row |= {"plain_forwards": num_calls(other), "plain_seconds": round(other.seconds, 3)}
                row["identical"] = None if plain["do_sample"] else is_identical(run, other)
            print(json.dumps(row, ensure_ascii=False))
            sys.stdout.flush()
            advance()


def told_of_identical(same: list[bool], reason: str) -> str:
    """How many texts are plain decoding's, and why others may not be."""
    return "identical: yes" if all(same) else f"identical: {sum(same)} of {len(same)}. {reason}"


def traced(decode: Callable[..., Run], traces: list[Trace] | None, prompt: Row) -> Callable[..., Run]:
    """A decode that also appends its trace to `traces`, if there are any."""
    if traces is None:
        return decode

    def decode_and_record(model: Any, inputs: Any, streamer: Any = None, **options: Any) -> Run:
        recorder = TraceStreamer(streamer)
        run = decode(model, inputs, streamer=recorder, **options)
        traces.append(Trace(last_words(prompt), told_of(run), recorder.forwards, run.wavefront))
        return run

    return decode_and_record


def row_of(prompt: Row, text: str, run: Run) -> dict[str, Any]:
    """One prompt's text, its new tokens, the forwards after the prompt was read, and its seconds.

    Of a recurrent-depth model a forward is a core pass.
    """
    told = {"prompt": prompt.question} if prompt.question is not None else {"messages": prompt.messages}
    return {
        **told,
        "text": text,
        "tokens": len(run.new_ids),
        "forwards": num_calls(run),
        "seconds": round(run.seconds, 3),
    }


def last_words(prompt: Row) -> str:
    """A prompt as the table names it: by the content of its last message."""
    return prompt.messages[-1].get("content") or ""
