"""`wavedraft chat`: a conversation in the terminal."""

import time
from typing import Annotated, Any

import typer

from .early_checks import check_decoding, load_library, say
from .options import (
    Adapter,
    Compile,
    Device,
    DraftLength,
    Dtype,
    Exact,
    Model,
    NumBranches,
    PackedWeights,
    Policy,
    Seed,
    Temperature,
    TopK,
    TopP,
)

System = Annotated[str | None, typer.Option(help="Tell the model this before the first turn.")]
MaxAnswer = Annotated[int, typer.Option(min=1, help="An answer ends after this many tokens, if not before.")]


def chat(
    model: Model,
    adapter: Adapter = None,
    system: System = None,
    draft_length: DraftLength = None,
    num_branches: NumBranches = None,
    exact: Exact = None,
    packed_weights: PackedWeights = None,
    compile: Compile = False,
    policy: Policy = None,
    max_new_tokens: MaxAnswer = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Talk to a model until the end of input.

    Each turn goes on from the cache of the turn before. With --compile it reads the whole conversation.
    """
    given: dict[str, Any] = dict(locals())
    check_decoding(given)
    load_library()
    from transformers import AutoTokenizer

    from ..chat import Chat
    from ..conversion.quiet_transformers import quiet_transformers
    from ..generation.execution.packed_linear import check_packable
    from .cli_checks import check_adapter, check_keywords, device_for
    from .cli_keywords import decoding_keywords, drafting_keywords, sampling_keywords, seed_plain_decoding
    from .loading import load

    depth = {"policy": policy, "preset": None, "num_recurrences": None}
    drafting = drafting_keywords(num_branches, exact, packed_weights)
    with quiet_transformers():
        device = device_for(device)
        check_adapter(adapter, model)
        options, plain = decoding_keywords(model, sampling_keywords(given), draft_length, depth, drafting, compile)
        check_keywords(model, options)
        seed_plain_decoding(plain, options)
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = load(model, dtype, device, adapter)
        if packed_weights:
            check_packable(loaded, exact)
        conversation = Chat(loaded, tokenizer, system, **options)
        if compile:
            say("Compiling the decode steps: the first answer waits for it, seconds to minutes.")
        while (text := next_line("> ")) is not None:
            if text.strip():
                answer(conversation, text)
    say(f"Next: wavedraft audit {model} --prompts FILE says on many prompts whether the texts are plain decoding's.")


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
