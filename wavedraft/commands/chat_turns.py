"""The turns of `wavedraft chat`: each is shown while it is written, counted, and may be interrupted."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from transformers import TextStreamer

from ..chat import Chat
from ..live_view import PLAIN, LiveView
from ..modeling_recurrent.checkpoint_recurrent import is_recurrent_config
from .timed_runs import Run, print_runs


class Turns:
    """
    Attributes:
        conversation: what was said.
        runs: of each answer that was written to its end, the question and what it took.
    """

    def __init__(self, conversation: Chat):
        self.conversation = conversation
        self.runs: list[tuple[str, Run]] = []

    def answer(self, text: str) -> None:
        """Prints one turn's answer as it is written, and what it took.

        In a terminal, Ctrl-C stops the answer. What was written of it stays in the conversation.

        A question that the model's template or limits refuse leaves the conversation as it was.
        """
        conversation, console, start = self.conversation, Console(), time.perf_counter()
        if not sys.stdout.isatty() or console.is_dumb_terminal:
            streamer = TextStreamer(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True)
            self._tell(text, conversation.answer(text, streamer), time.perf_counter() - start)
            return
        is_recurrent = is_recurrent_config(conversation.model.config)
        shades = {"shades": (PLAIN,)} if console.no_color else {}
        view = LiveView(conversation.tokenizer, counts_forwards=not is_recurrent, **shades)
        try:
            with without_echo(), stopped_between_tokens(view):
                output = conversation.answer(text, view)
        except KeyboardInterrupt:
            view.end()
            if view.text:
                conversation.add_turn(text, view.text)
            print("(stopped; what was written stays in the conversation)\n" if view.text else "(stopped)\n")
            return
        except ValueError as error:
            view.end()
            print(f"({error})\n")
            return
        self._tell(text, output, time.perf_counter() - start)

    def show(self) -> None:
        """Prints what each answer took, and all of them."""
        if not self.runs:
            print("No answer has been written to its end.\n")
            return
        questions, runs = zip(*self.runs, strict=True)
        print_runs(list(questions), list(runs), [], Console())
        print()

    def _tell(self, text: str, output: Any, seconds: float) -> None:
        """Keeps what an answer took, and prints it."""
        conversation = self.conversation
        run = run_of(output, conversation.num_prompt, seconds)
        self.runs.append((text, run))
        told = [f"{len(run.new_ids)} tokens", f"{seconds:.1f} s"]
        if run.num_forwards:
            told.append(f"{run.tokens_per_forward:.2f} tokens per forward")
        from_cache = f"{conversation.num_cached} of {conversation.num_prompt} prompt tokens from the cache"
        print(f"({', '.join(told)}; {from_cache})\n")


def run_of(output: Any, num_prompt: int, seconds: float) -> Run:
    """What `generate` returned, counted. Plain decoding takes a forward for each token after the first."""
    new_ids = output.sequences[0, num_prompt:].tolist()
    if (num_core_passes := getattr(output, "num_core_passes", None)) is not None:
        tokens_per_forward = float(output.tokens_per_forward[0])
        num_forwards = (len(new_ids) - 1) / tokens_per_forward if tokens_per_forward > 0 else 0
        return Run(new_ids, num_forwards, seconds, num_core_passes)
    return Run(new_ids, getattr(output, "num_forwards", len(new_ids) - 1), seconds)


@contextmanager
def stopped_between_tokens(view: LiveView) -> Iterator[None]:
    """Ctrl-C stops the answer at its next token, and at once when pressed twice. An exception that a signal raises
    anywhere can be lost in a callback of Python's own."""

    def stop(*args: Any) -> None:
        view.is_stopped = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def without_echo() -> Iterator[None]:
    """Keeps the terminal from showing what is typed, and Ctrl-C itself, in the middle of an answer."""
    if not sys.stdin.isatty() or sys.platform == "win32":  # nothing is typed, or the terminal does not show it
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
