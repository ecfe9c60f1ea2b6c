"""The rows of data, in every form that is read: rows to learn from, and prompts.

`COLUMNS` is the table of forms. `row_sources` reads files and datasets.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# The parts of a row, and the columns that each is read from. The first form that a row has is taken: `messages`; then
# `prompt` (with `history` before it, and `input` after it) and `answer`; then `text`.
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "prompt": ("prompt", "question", "instruction"),
    "input": ("input", "context"),
    "answer": ("answer", "completion", "response", "output"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "text": ("text",),
    "tools": ("tools",),
    "chat_template_kwargs": ("chat_template_kwargs",),
    "finished": ("finished",),
    "kind": ("kind",),
}
OF_WORDS = ("messages", "prompt", "input", "answer", "system", "history", "text")
# ShareGPT's names of the speakers, in `from`.
SPEAKERS = {
    **{"human": "user", "user": "user", "system": "system", "tool": "tool", "observation": "tool"},
    **{"gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"},
}
FORMS = (
    "`messages` or `conversations` (turns of `role` and `content`, or of `from` and `value`); `prompt`, `question`, "
    "`instruction` or `input` with `answer`, `completion`, `response` or `output`; or `text`"
)
MAPPING = "Name the columns to read: `columns`, on the command line --columns prompt=COLUMN,answer=COLUMN."


@dataclass(frozen=True)
class Row:
    """A dialogue, a text, or both of one row of data.

    Attributes:
        place: where the row is from, such as "data.jsonl, line 3".
        messages: `role` and `content` of each turn, and what else the chat template may read of it; empty for a text.
        text: a text to learn as it is.
        tools: JSON schemas of functions, for the chat template.
        template_options: further keywords of the chat template.
        finished: whether the model that wrote the last answer ended it; None if the row does not say.
        kind: a name to group rows by.
    """

    place: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    text: str | None = None
    tools: list[Any] | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    finished: bool | None = None
    kind: str | None = None

    @property
    def question(self) -> str | None:
        """The only message, if it is a user's and no template needs to know more; otherwise None."""
        is_one = [message["role"] for message in self.messages] == ["user"] and not self.tools
        return self.messages[0]["content"] if is_one and not self.template_options else None

    @property
    def has_answer(self) -> bool:
        return any(message["role"] == "assistant" for message in self.messages)

    def prompt(self) -> "Row":
        """This row without its text and its last answer, which the model is to write.

        Raises:
            ValueError: nothing is asked.
        """
        asked = list(self.messages)
        while asked and asked[-1]["role"] == "assistant":
            asked.pop()
        if not any(message["role"] != "system" for message in asked):
            has = "has `text` and no prompt" if self.text is not None else "has no turn before the assistant's"
            raise ValueError(
                f"{self.place} {has}. A prompt is read from `prompt`, `question`, `instruction` or `input`, or from "
                f"`messages` or `conversations` up to the last answer. {MAPPING}"
            )
        return replace(self, messages=asked, text=None, finished=None)

    def check_teaches(self) -> None:
        """Raises ValueError if there is nothing to learn: neither an answer nor a text."""
        if not self.has_answer and self.text is None:
            raise ValueError(
                f"{self.place} has a prompt and no answer to learn. An answer is read from `answer`, `completion`, "
                f"`response` or `output`, or from turns of the assistant. {MAPPING} Or let the model answer the "
                "prompts: `wavedraft data regenerate`."
            )

    def prompt_columns(self) -> dict[str, Any]:
        """The columns from which this row is read again as a prompt."""
        columns: dict[str, Any] = {
            "kind": self.kind,
            "prompt": self.messages if self.question is None else self.question,
        }
        columns |= {"tools": self.tools, "chat_template_kwargs": self.template_options or None}
        return {name: value for name, value in columns.items() if value is not None}


def prompt_row(text: str, place: str = "The prompt", kind: str | None = None) -> Row:
    """A row whose only message is a user's."""
    return Row(place, [{"role": "user", "content": text}], kind=kind)


# -- forms


def row_of(values: Mapping[str, Any], place: str, columns: Mapping[str, str] | None = None) -> Row:
    """The row that a mapping of columns to values is, in one of the forms of `COLUMNS`.

    Args:
        values: of each column. None means that the row lacks the column.
        place: named in errors.
        columns: the column of each part, instead of `COLUMNS`. Words are then read from these columns alone.

    Raises:
        ValueError: the row has no form that is read, or a column has a value of another type.
    """

    def value(part: str, *types: type) -> Any:
        name = _column_of(part, values, place, columns)
        found = None if name is None else values[name]
        if isinstance(found, str) and types and str not in types:
            found = _parsed(found)  # datasets often keep lists and objects as JSON in text
        if found is not None and types and not isinstance(found, types):
            raise ValueError(f"{place}: `{name}` must be {_NAMES[types]}, but is {short(values[str(name)])}.")
        return found

    system, messages, text = value("system", str), value("messages", list), None
    if messages is not None:
        messages = _turns(messages, place)
    else:
        text = value("text", str)
        messages = _asked_and_said(value("prompt", str, list), value("input", str), value("answer", str, list), place)
        messages = [*_earlier_turns(value("history", list), place), *messages] if messages else []
    if not messages and text is None:
        mapped = "" if columns is None else f" With columns {dict(columns)}, only these are read."
        raise ValueError(f"{place} has {_listed(values)}. What is read: {FORMS}.{mapped} {MAPPING}")
    if system and messages:
        messages = [{"role": "system", "content": system}, *messages]
    kind = value("kind")
    return Row(
        place,
        messages,
        text,
        tools=value("tools", list) or None,
        template_options=value("chat_template_kwargs", dict) or {},
        finished=value("finished", bool),
        kind=None if kind is None else str(kind),
    )


_NAMES = {
    (str,): "text",
    (list,): "a list",
    (str, list): "text or a list of turns",
    (dict,): "an object of keywords",
    (bool,): "true or false",
}


def _column_of(part: str, values: Mapping[str, Any], place: str, columns: Mapping[str, str] | None) -> str | None:
    """The column that a row has of a part; None if the row lacks the part."""
    names: tuple[str, ...] = COLUMNS[part]
    if columns is not None and (part in OF_WORDS or part in columns):
        names = (columns[part],) if part in columns else ()
    found = [name for name in names if values.get(name) is not None]
    if len(found) > 1:
        raise ValueError(f"{place} has `{found[0]}` and `{found[1]}`, and only one can be its {part}. {MAPPING}")
    return found[0] if found else None


def _asked_and_said(prompt: Any, given: str | None, answer: Any, place: str) -> list[dict[str, Any]]:
    """The turns of a pair. Alpaca's `input` stands after the instruction."""
    if isinstance(prompt, list):
        asked = _turns(prompt, place)
    else:
        question = "\n\n".join(part for part in (prompt, given) if part)
        asked = [] if prompt is None and given is None else [{"role": "user", "content": question}]
    if not asked or answer is None:
        return asked
    return [
        *asked,
        *(_turns(answer, place) if isinstance(answer, list) else [{"role": "assistant", "content": answer}]),
    ]


def _earlier_turns(history: list[Any] | None, place: str) -> list[dict[str, Any]]:
    """The turns before a pair: turns, or pairs of what was asked and said, as LLaMA-Factory keeps them."""
    turns: list[Any] = []
    for number, one in enumerate(history or (), start=1):
        if isinstance(one, list) and len(one) == 2 and all(isinstance(part, str) for part in one):
            turns += [{"role": "user", "content": one[0]}, {"role": "assistant", "content": one[1]}]
        elif isinstance(one, dict):
            turns.append(_turn(one, f"{place}: turn {number} of `history`"))
        else:
            raise ValueError(f"{place}: `history` must be turns, or pairs of two texts, but has {short(one)}.")
    return turns


def _turns(turns: list[Any], place: str) -> list[dict[str, Any]]:
    if not turns:
        raise ValueError(f"{place} has an empty list of turns.")
    return [_turn(turn, f"{place}: turn {number}") for number, turn in enumerate(turns, start=1)]


def _turn(turn: Any, place: str) -> dict[str, Any]:
    """A turn of `role` and `content`, or of ShareGPT's `from` and `value`."""
    turn = {name: value for name, value in turn.items() if value is not None} if isinstance(turn, dict) else turn
    if isinstance(turn, dict) and isinstance(turn.get("from"), str) and "role" not in turn:
        if turn["from"] not in SPEAKERS:
            raise ValueError(f"{place} is from {turn['from']!r}. Read are {', '.join(SPEAKERS)}.")
        turn = {"role": SPEAKERS[turn["from"]], "content": turn.get("value")}
    content = turn.get("content") if isinstance(turn, dict) else None
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        turn = {**turn, "content": (content := "".join(str(part.get("text", "")) for part in content))}
    is_call = isinstance(turn, dict) and content is None and bool(turn.get("tool_calls"))
    if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and (isinstance(content, str) or is_call)):
        raise ValueError(
            f"{place} must have `role` and `content`, or `from` and `value`, each of them text, but is {short(turn)}."
        )
    return turn


def _parsed(text: str) -> Any:
    """The JSON of a text, None if it is empty, or the text if it is not JSON."""
    try:
        return json.loads(text) if text else None
    except json.JSONDecodeError:
        return text


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name, value in values.items() if value is not None) or "no columns"


def short(value: Any) -> str:
    """At most 80 characters of a value, for an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_columns(text: str | None) -> dict[str, str] | None:
    """The mapping that `--columns prompt=question,answer=reply` names; None without the option."""
    if text is None:
        return None
    pairs = [pair.partition("=") for pair in text.split(",")]
    return check_columns({part.strip(): name.strip() for part, _, name in pairs}, f"--columns {text}")


def check_columns(columns: Any, said: str = "`columns`") -> dict[str, str]:
    """A mapping of parts of a row to columns, if it is one. Raises ValueError otherwise."""
    if not isinstance(columns, Mapping) or not columns or not all(columns.values()):
        raise ValueError(f"{said} must name a column for each part, as prompt=question,answer=reply.")
    if unknown := [part for part in columns if part not in COLUMNS]:
        raise ValueError(f"{said} names {unknown[0]!r}, which is no part of a row. Parts are {', '.join(COLUMNS)}.")
    return dict(columns)
