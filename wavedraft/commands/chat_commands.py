"""What begins with / in `wavedraft chat`."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .chat_turns import Turns

HELP = """\
/help            this list
/reset           forget all turns; what --system told the model stays
/save FILE       write the conversation to a file
/load FILE       go on from a saved conversation, in place of this one
/set             the settings: {settings}
/set NAME VALUE  change a setting, as /set temperature 0.7; the value default restores the command line's own default
/stats           what each answer took
/exit            end the conversation; so does Ctrl-D
Enter sends. Alt-Enter (or Esc, then Enter) begins a new line. The arrow keys edit, and call up earlier messages.
Ctrl-C stops an answer and keeps the conversation. A message that begins with / is sent with a space before it.
"""
SETTINGS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
    *("draft_length", "num_branches", "policy", "preset", "num_recurrences"),
)


class ChatCommands:
    """
    Args:
        verb: the function of `wavedraft chat`, for its options' types, limits and defaults.
        given: the verb's options by their names.
        turn_keywords: makes of them the keywords of `generate`, and refuses some.

    Attributes:
        is_over: whether the conversation was ended.
    """

    def __init__(
        self,
        turns: Turns,
        verb: Callable[..., None],
        given: dict[str, Any],
        turn_keywords: Callable[[dict[str, Any]], dict[str, Any]],
    ):
        self.turns, self.verb, self.given, self.turn_keywords = turns, verb, given, turn_keywords
        self.is_over = False

    def run(self, line: str) -> None:
        """Does what a line says. What cannot be done is told, and changes nothing."""
        name, _, rest = line[1:].strip().partition(" ")
        commands = {
            "help": self.help,
            "reset": self.reset,
            "save": self.save,
            "load": self.load,
            "set": self.set,
            "stats": self.stats,
            "exit": self.exit,
        }
        try:
            if name not in commands:
                raise ValueError(f"There is no /{name}. /help lists what there is.")
            if rest and name not in ("save", "load", "set"):
                raise ValueError(f"/{name} takes nothing after it, but got {rest.strip()!r}.")
            commands[name](rest.strip())
        except (ValueError, OSError) as error:
            print(f"({error})\n")

    def help(self, rest: str) -> None:
        print(HELP.format(settings=", ".join(SETTINGS)))

    def reset(self, rest: str) -> None:
        self.turns.conversation.reset()
        self.turns.runs.clear()
        print("(The conversation begins anew.)\n")

    def save(self, rest: str) -> None:
        path = named_file(rest, "/save")
        self.turns.conversation.save(path)
        print(f"({len(self.turns.conversation.messages)} messages are in {path}.)\n")

    def load(self, rest: str) -> None:
        path = named_file(rest, "/load")
        self.turns.conversation.load(path)
        print(f"({len(self.turns.conversation.messages)} messages of {path} were read.)\n")

    def set(self, rest: str) -> None:
        """Lists the settings, or changes one as the verb's option of that name would."""
        if not rest:
            values = (f"{name} {'default' if self.given[name] is None else self.given[name]}" for name in SETTINGS)
            print("\n".join([*values, ""]))
            return
        name, _, word = rest.partition(" ")
        name = name.lstrip("-").replace("-", "_")
        if name not in SETTINGS or not word.strip():
            raise ValueError(f"/set takes one of {', '.join(SETTINGS)} and a value, but got {rest!r}.")
        value = read_setting(self.verb, name, word.strip())
        changed = self.given | {name: value}
        self.turns.conversation.set_options(self.turn_keywords(changed))
        self.given = changed
        print(f"({name} is {'the default' if value is None else value}.)\n")

    def stats(self, rest: str) -> None:
        self.turns.show()

    def exit(self, rest: str) -> None:
        self.is_over = True


def named_file(name: str, command: str) -> Path:
    """The file that a command names."""
    if not name:
        raise ValueError(f"{command} needs a file: {command} FILE.")
    return Path(name).expanduser()


def read_setting(verb: Callable[..., None], name: str, word: str) -> Any:
    """The value of a verb's option, as typed; of the word default, the option's default.

    Raises:
        ValueError: it is no number where one is needed, or outside the option's limits.
    """
    if word == "default":
        return inspect.signature(verb).parameters[name].default
    option = get_type_hints(verb, include_extras=True)[name]
    (kind,) = (kind for kind in get_args(option.__origin__) or (option.__origin__,) if kind is not type(None))
    limits = [limit for limit in (option.__metadata__[0].min, option.__metadata__[0].max) if limit is not None]
    try:
        value = kind(word)
        is_inside = not limits or limits[0] <= value <= (*limits, float("inf"))[1]
    except ValueError:
        is_inside = False
    if not is_inside:
        number = {int: "a whole number", float: "a number"}[kind]
        raise ValueError(
            f"{name} must be {number} from {limits[0]} {f'to {limits[1]}' if limits[1:] else 'up'}, but is {word!r}."
        )
    return value
