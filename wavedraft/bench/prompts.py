"""Prompts: those of a file, or five kinds of our own, as text and as ids. P prompt tokens, F filler tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Prompt = str | list[dict[str, str]]  # a text, or the messages of a conversation
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


def read_prompts(path: str | Path, num_prompts: int | None = None) -> list[Prompt]:
    """The prompts of a file: JSONL rows with `prompt` or `messages`, or else one a line.

    Raises:
        ValueError: a row has none, or the file holds none, or fewer than `num_prompts`.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}. Give JSONL rows with `prompt`, or a text file with one a line.")
    prompts: list[Prompt]
    if Path(path).suffix == ".jsonl":
        from ..training.dialogue import read_jsonl  # its package imports Trainer, which takes seconds

        prompts = [_prompt_of(row, f"{path}, row {number}") for number, row in enumerate(read_jsonl(path), start=1)]
    else:
        prompts = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if num_prompts is not None and len(prompts) < num_prompts:
        raise ValueError(f"`num_prompts` must be at most {len(prompts)}, the prompts of {path}, but is {num_prompts}.")
    return prompts[:num_prompts]


def _prompt_of(row: dict[str, Any], place: str) -> Prompt:
    messages = row.get("messages")
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(
            f"{place} must have a `prompt` of text, or `messages` of `role` and `content`, but has {sorted(row)}."
        )
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{place} ends with an answer of the assistant. Its last message must be the user's.")
    return messages


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def read_kinds(path: str | Path) -> dict[str, list[str]]:
    """The prompts of a file by kind: JSONL rows with `prompt` and, where there are several kinds, `kind`; or one
    prompt a line, all of one kind.

    Raises:
        ValueError: there is no such file, or none in it, or a row has no prompt.
    """
    prompts = read_prompts(path)
    if any(not isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{path} has rows of `messages`, but `wavedraft bench` takes rows of `prompt`.")
    if not prompts:
        raise ValueError(f"{path} holds no prompts. Give JSONL rows with `prompt` and `kind`, or one prompt a line.")
    kinds = kinds_of_prompts(path)
    pairs = list(zip(map(str, prompts), kinds, strict=True))
    return {kind: [prompt for prompt, of in pairs if of == kind] for kind in dict.fromkeys(kinds)}


def kinds_of_prompts(path: str | Path) -> list[str]:
    """The kind of each prompt of a file: `kind` of a JSONL row, "all" where there is none."""
    if Path(path).suffix == ".jsonl":
        from ..training.dialogue import read_jsonl

        return [str(row.get("kind", "all")) for row in read_jsonl(path)]
    return ["all"] * len(read_prompts(path))


def encode_kinds(tokenizer: Any, texts: dict[str, list[str]]) -> "tuple[dict[str, list[torch.Tensor]], torch.Tensor]":
    """The ids [P] of each prompt by kind, and those of all texts in one, [F], which fill prompts up."""
    encoded = {
        kind: [encode_prompt(tokenizer, text, is_raw=False)["input_ids"][0] for text in of_kind]
        for kind, of_kind in texts.items()
    }
    filler = tokenizer("\n".join(text for of_kind in texts.values() for text in of_kind), return_tensors="pt")
    return encoded, filler["input_ids"][0]


def encode_prompt(tokenizer: Any, prompt: Prompt, is_raw: bool) -> Any:
    """A prompt's ids and mask, through the chat template where there is one.

    Raises:
        ValueError: it is empty, or has messages and there is no template to put them in.
    """
    has_template = bool(tokenizer.chat_template) and not is_raw
    if not isinstance(prompt, str) and not has_template:
        raise ValueError("`messages` need the chat template of the checkpoint. Give `prompt` instead, or no --raw.")
    if not has_template:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    inputs.pop("token_type_ids", None)
    if not inputs["input_ids"].shape[1]:
        raise ValueError("The prompt is empty, and there is no chat template to put it in. Give some text to continue.")
    return inputs
