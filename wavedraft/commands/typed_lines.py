"""What the user of `wavedraft chat` types: plain lines, or messages edited in a terminal."""

import sys
from collections.abc import Callable


def line_reader() -> Callable[[str], str | None]:
    """A function that prompts for the next message; it returns None at the end of input."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return edited_lines()
    return plain_line


def plain_line(prompt: str) -> str | None:
    """The next line of stdin."""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def edited_lines() -> Callable[[str], str | None]:
    """Messages with history and editing: Enter sends, Alt-Enter begins a line, and pasted lines stay one message."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(
        key_bindings=keys, multiline=True, prompt_continuation=lambda width, number, is_wrapped: " " * width
    )

    def next_message(prompt: str) -> str | None:
        while True:
            try:
                return session.prompt(prompt)
            except EOFError:
                return None
            except KeyboardInterrupt:
                print("(Ctrl-D or /exit ends the conversation.)")

    return next_message
