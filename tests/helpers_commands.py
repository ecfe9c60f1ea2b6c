"""Whether a command that a page or a script names is one: a verb, a make target, or a script, with its options."""

import re
from pathlib import Path

import typer

from wavedraft.cli import app

ROOT = Path(__file__).parents[1]
VERBS = typer.main.get_command(app)


def check_command(words: list[str], reason: str | None) -> None:
    if not words:
        return
    if "-m" in words and words[words.index("-m") + 1] == "wavedraft":  # accelerate launch ... -m wavedraft train ...
        words = words[words.index("-m") + 1 :]
    if words[0] == "wavedraft":
        parse(words[1:])
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert not set(words[1:]) - set(targets), words
    elif words[0] == "python":
        check_script(words)
    else:
        assert reason, f"{words}: say before the block why it is not run"


def parse(arguments: list[str]) -> None:
    """Reads the arguments of `wavedraft` as the command line does, and runs nothing."""
    group, context = VERBS, VERBS.make_context("wavedraft", list(arguments), resilient_parsing=True)
    verb, *rest = arguments
    while hasattr(group, "get_command"):
        command = group.get_command(context, verb)
        assert command is not None, f"`wavedraft {' '.join(arguments)}`: no verb {verb}"
        if not hasattr(command, "get_command"):
            command.make_context(verb, list(rest))
            return
        group, (verb, *rest) = command, rest


def check_script(words: list[str]) -> None:
    """A script exists, and its source has each option."""
    if words[1] == "-m":
        return
    source = (ROOT / words[1]).read_text(encoding="utf-8")
    missing = [word for word in words[2:] if word.startswith("--") and f'"{word.split("=")[0]}"' not in source]
    assert not missing, words
