"""Rows as the text that a tokenizer's chat template writes, and prompts as ids. P tokens of a prompt."""

import re
from typing import Any

from .row_forms import Row

NUM_TOKENS_OF_TEXT = 32  # tokens of a text that form its prompt
SET_HERE = ("messages", "tools", "add_generation_prompt", "tokenize")


class TemplateRefusal(ValueError):
    """The chat template refuses the messages of a row."""


def has_generation_marks(tokenizer: Any, row: Row) -> bool:
    """Whether the chat template marks the assistant's words."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template_of(tokenizer, row)) is not None


def template_of(tokenizer: Any, row: Row) -> str:
    """The chat template of a row, checked to read the row's tools and options.

    Raises:
        ValueError: there is no template, or it does not read what the row gives it.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{row.place} is a dialogue. The tokenizer of {tokenizer.name_or_path or 'this checkpoint'} has no chat "
            "template for dialogues. Put a `chat_template.jinja` in its folder, or give rows of `text`."
        )
    template = tokenizer.get_chat_template(tools=row.tools)
    given = {"tools": "tools"} if row.tools else {}
    given |= {name: f"chat_template_kwargs.{name}" for name in row.template_options}
    for name, said in given.items():
        if said != name and name in SET_HERE:
            raise ValueError(f"{row.place} has `{said}`, which is set by what reads the row. Leave it out.")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"{row.place} has `{said}`, but the chat template of {tokenizer.name_or_path or 'this checkpoint'} "
                f"reads no `{name}`. Leave it out, or use a template that reads it."
            )
    return template


def apply_template(tokenizer: Any, row: Row, messages: list[dict[str, Any]] | None = None, **options: Any) -> Any:
    """What the chat template makes of a row's messages, or of others in their place, with the row's tools.

    Raises:
        ValueError: as `template_of`.
        TemplateRefusal: the template raised an error.
    """
    from jinja2 import TemplateError

    template_of(tokenizer, row)
    messages = row.messages if messages is None else messages
    try:
        return tokenizer.apply_chat_template(messages, tools=row.tools, **row.template_options, **options)
    except TemplateError as error:
        raise TemplateRefusal(f"{row.place}: the chat template refuses these messages: {error}") from None


def prompt_text(row: Row, tokenizer: Any, is_raw: bool = False) -> tuple[str, bool]:
    """The text of a prompt, ready for the answer, and whether a tokenizer adds its special tokens to it.

    A single question is written as it is where there is no chat template, or with `is_raw`.

    Raises:
        ValueError: the row has other messages and there is no template for them.
    """
    if tokenizer.chat_template is not None and not is_raw:
        return apply_template(tokenizer, row, tokenize=False, add_generation_prompt=True), False
    if row.question is None:
        raise ValueError(
            f"{row.place}: `messages` need the chat template of the checkpoint. Give `prompt` instead, or no --raw."
        )
    return row.question, True


def prompt_ids(row: Row, tokenizer: Any) -> Any:
    """The ids [P] of a row's prompt, for the model to answer; of a text, its first 32."""
    from torch import tensor

    if row.messages:
        text, has_special_tokens = prompt_text(row.prompt(), tokenizer)
        return tensor(tokenizer(text, add_special_tokens=has_special_tokens)["input_ids"])
    return tensor(tokenizer(row.text)["input_ids"][:NUM_TOKENS_OF_TEXT])
