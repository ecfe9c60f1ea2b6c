"""Prompts: those of a file, or five kinds of our own, as text and as ids. P prompt tokens, F filler tokens."""

from pathlib import Path
from typing import Any

import torch

PROMPTS: dict[str, list[str]] = {
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


def read_prompts(path: str | Path, num_prompts: int | None = None) -> list[str]:
    """The prompts of a file: JSONL rows with `prompt`, or else one a line.

    Raises:
        ValueError: a row has none, or the file holds fewer than `num_prompts`.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}. Give JSONL rows with `prompt`, or a text file with one a line.")
    if Path(path).suffix == ".jsonl":
        from ..training.dialogue import read_jsonl  # its package imports Trainer, which takes seconds

        rows = list(read_jsonl(path))
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get("prompt"), str):
                raise ValueError(f"{path}, row {number} must have a `prompt` of text, but has {sorted(row)}.")
        prompts = [row["prompt"] for row in rows]
    else:
        prompts = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if num_prompts is not None and len(prompts) < num_prompts:
        raise ValueError(f"`num_prompts` must be at most {len(prompts)}, the prompts of {path}, but is {num_prompts}.")
    return prompts[:num_prompts]


def read_kinds(path: str | Path) -> dict[str, list[str]]:
    """The prompts of a file by kind: JSONL rows with `prompt` and, where there are several kinds, `kind`; or one
    prompt a line, all of one kind.

    Raises:
        ValueError: there is no such file, or none in it, or a row has no prompt.
    """
    prompts = read_prompts(path)
    if not prompts:
        raise ValueError(f"{path} holds no prompts. Give JSONL rows with `prompt` and `kind`, or one prompt a line.")
    kinds = ["all"] * len(prompts)
    if Path(path).suffix == ".jsonl":
        from ..training.dialogue import read_jsonl

        kinds = [str(row.get("kind", "all")) for row in read_jsonl(path)]
    return {kind: [p for p, k in zip(prompts, kinds, strict=True) if k == kind] for kind in dict.fromkeys(kinds)}


def encode_kinds(tokenizer: Any, texts: dict[str, list[str]]) -> tuple[dict[str, list[torch.Tensor]], torch.Tensor]:
    """The ids [P] of each prompt by kind, and those of all texts in one, [F], which fill prompts up."""
    encoded = {
        kind: [encode_prompt(tokenizer, text, is_raw=False)["input_ids"][0] for text in of_kind]
        for kind, of_kind in texts.items()
    }
    filler = tokenizer("\n".join(text for of_kind in texts.values() for text in of_kind), return_tensors="pt")
    return encoded, filler["input_ids"][0]


def encode_prompt(tokenizer: Any, prompt: str, is_raw: bool) -> Any:
    """A prompt's ids and mask, through the chat template where there is one."""
    if is_raw or not tokenizer.chat_template:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    inputs.pop("token_type_ids", None)
    if not inputs["input_ids"].shape[1]:
        raise ValueError("The prompt is empty, and there is no chat template to put it in. Give some text to continue.")
    return inputs
