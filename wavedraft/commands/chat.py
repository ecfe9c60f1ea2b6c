"""`wavedraft chat`: a conversation in the terminal."""

import time
from typing import Annotated, Any

import typer

from .options import DTYPES, Adapter, Device, Dtype, Model, Temperature


def chat(
    model: Model,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first of all.")] = None,
    draft_length: Annotated[int | None, typer.Option(help="Tokens drafted at a time; 0 drafts none.")] = None,
    policy: Annotated[str | None, typer.Option(help="Of a recurrent-depth model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 512,
    temperature: Temperature = 0.0,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Talk to a model, until the end of input; each turn goes on from the cache of the turn before."""
    from transformers import AutoTokenizer

    from ..chat import Chat
    from ..conversion.quiet_transformers import quiet_transformers
    from .cli_checks import check_adapter, check_choice, check_keywords, device_for
    from .cli_keywords import decoding_keywords, without_none
    from .loading import load

    check_choice("--dtype", dtype, DTYPES)
    options = without_none(max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature or None)
    depth = {"policy": policy, "preset": None, "num_recurrences": None}
    with quiet_transformers():
        device = device_for(device)
        check_adapter(adapter, model)
        options, _ = decoding_keywords(model, options, draft_length, depth, drafting={})
        check_keywords(model, options)
        tokenizer = AutoTokenizer.from_pretrained(model)
        conversation = Chat(load(model, dtype, device, adapter), tokenizer, system, **options)
        while (text := next_line("> ")) is not None:
            if text.strip():
                answer(conversation, text)


def answer(conversation: Any, text: str) -> None:
    """Prints one turn's answer as it is written, and what it took."""
    from transformers import TextStreamer

    streamer, start = (
        TextStreamer(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True),
        time.perf_counter(),
    )
    output = conversation.answer(text, streamer)
    num_new, seconds = output.sequences.shape[1] - conversation.num_prompt, time.perf_counter() - start
    speed = f"{num_new} tokens, {seconds:.1f} s"
    if (tokens_per_forward := getattr(output, "tokens_per_forward", None)) is not None:
        speed += f", {float(tokens_per_forward[0]):.2f} tokens per forward"
    print(f"({speed}; {conversation.num_cached} of {conversation.num_prompt} prompt tokens from the cache)\n")


def next_line(prompt: str) -> str | None:
    """What the user types; None at the end of input."""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        return None
