"""Prompts: those of a file, or five kinds of our own, as text and as ids. P prompt tokens, F filler tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.chat_template import prompt_text
from ..training.row_forms import Row, prompt_row
from ..training.row_sources import read_prompts

if TYPE_CHECKING:
    import torch

TEXTS: dict[str, list[str]] = {
    "code": [
        "Write a Python function that returns the longest common prefix of a list of strings.",
        "Write a SQL query that lists the ten customers with the most orders this year.",
        "Explain with a short example how a queue differs from a stack.",
        "Write a shell command that counts the lines of every text file in a folder.",
    ],
    "maths": [
        "A train leaves at 9:40 and arrives at 13:05. How long does the journey take?",
        "A box holds 24 apples. A farmer fills 17 boxes and has 9 apples left. How many apples are there?",
        "Solve 3x + 7 = 40 and show each step.",
        "A coat costs 80 dollars and is reduced by 15 percent. What does it cost now?",
    ],
    "chat": [
        "Why do leaves change colour in autumn?",
        "I have a free Saturday and it will rain. What could I do at home?",
        "Write a short letter that thanks a neighbour for watering the plants.",
        "What should somebody know before adopting a cat?",
    ],
    "translation": [
        "Translate into French: The library is closed on Monday, but the museum is open until six.",
        "Translate into Spanish: My sister works in a hospital near the river.",
        "Translate into German: We would like a table for four people, please.",
        "Translate into Italian: The train was late, so we missed the beginning of the film.",
    ],
    "json": [
        "Give a JSON object that describes a bicycle: brand, colour, price and a list of three accessories.",
        "Turn this into JSON: Ana, 34, nurse, lives in Porto, speaks Portuguese and English.",
        "Write a JSON array of four planets, each with name, number of moons and whether it has rings.",
        "Write a JSON configuration for a web server: host, port, timeouts and two allowed origins.",
    ],
}


PROMPTS = {kind: [prompt_row(text, kind=kind) for text in texts] for kind, texts in TEXTS.items()}


def read_kinds(path: str | Path, columns: Mapping[str, str] | None = None) -> dict[str, list[Row]]:
    """The prompts of a file by the `kind` of their rows, and by "all" where rows have none.

    Raises:
        ValueError: as `read_prompts`.
    """
    prompts: dict[str, list[Row]] = {}
    for row in read_prompts(path, columns):
        prompts.setdefault(row.kind or "all", []).append(row)
    return prompts


def encode_kinds(tokenizer: Any, prompts: dict[str, list[Row]]) -> "tuple[dict[str, list[torch.Tensor]], torch.Tensor]":
    """The ids [P] of each prompt by kind, and those of all their words in one, [F], which fill prompts up."""
    encoded = {
        kind: [encode_prompt(tokenizer, row, is_raw=False)["input_ids"][0] for row in of_kind]
        for kind, of_kind in prompts.items()
    }
    turns = [turn for of_kind in prompts.values() for row in of_kind for turn in row.messages]
    filler = tokenizer("\n".join(turn.get("content") or "" for turn in turns), return_tensors="pt")
    return encoded, filler["input_ids"][0]


def encode_prompt(tokenizer: Any, prompt: Row, is_raw: bool) -> Any:
    """A prompt's ids and mask, through the chat template where there is one.

    Raises:
        ValueError: it is empty, or has messages and there is no template to put them in.
    """
    text, has_special_tokens = prompt_text(prompt, tokenizer, is_raw)
    inputs = tokenizer(text, add_special_tokens=has_special_tokens, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    if not inputs["input_ids"].shape[1]:
        raise ValueError(
            f"{prompt.place} is empty, and there is no chat template to put it in. Give some text to continue."
        )
    return inputs
