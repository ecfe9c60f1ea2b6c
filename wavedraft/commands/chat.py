"""`wavedraft chat`: a conversation in the terminal."""

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
    MinP,
    Model,
    NumBranches,
    NumRecurrences,
    PackedWeights,
    Penalty,
    Policy,
    Preset,
    Seed,
    Temperature,
    TopK,
    TopP,
    Trust,
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
    trust: Trust = None,
    packed_weights: PackedWeights = None,
    compile: Compile = False,
    policy: Policy = None,
    preset: Preset = None,
    num_recurrences: NumRecurrences = None,
    max_new_tokens: MaxAnswer = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Talk to a model until the end of input. /help lists what may be typed besides text.

    Each turn goes on from the cache of the turn before. With --compile it reads the whole conversation.
    """
    given: dict[str, Any] = dict(locals())
    check_decoding(given)
    load_library(model, adapter)
    from transformers import AutoTokenizer

    from ..chat import Chat
    from ..conversion.quiet_transformers import quiet_transformers
    from ..generation.execution.packed_linear import check_packable
    from .chat_commands import ChatCommands
    from .chat_turns import Turns
    from .cli_checks import check_adapter, device_for
    from .loading import load
    from .typed_lines import line_reader

    with quiet_transformers():
        device = device_for(device)
        check_adapter(adapter, model)
        options = turn_keywords(given)
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = load(model, dtype, device, adapter)
        if packed_weights:
            check_packable(loaded)
        turns = Turns(Chat(loaded, tokenizer, system, **options))
        commands = ChatCommands(turns, chat, given, turn_keywords)
        next_line = line_reader()
        if compile:
            say("Compiling the decode steps: the first answer waits for it, seconds to minutes.")
        while not commands.is_over and (text := next_line("> ")) is not None:
            if text.startswith("/"):
                commands.run(text)
            elif text.strip():
                turns.answer(text)
    say(f"Next: wavedraft audit {model} --prompts FILE says on many prompts whether the texts are plain decoding's.")


def turn_keywords(given: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `generate` for a turn, by the verb's options.

    Raises:
        ValueError: they contradict each other, or the checkpoint.
    """
    from .cli_keywords import both_keywords

    check_decoding(given)
    return both_keywords(given)[0]
