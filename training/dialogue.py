"""Texts and dialogues become rows of ids, with labels where the model's own words stand.

S tokens.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

IGNORED = -100


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file; a line that is no JSON object is an error that names it."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error.msg}): {line[:80]!r}.") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be a JSON object, but is {line[:80]!r}.")
            yield row


def encode_row(row: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Ids and labels of one row, cut to `max_length`.

    Args:
        row: `{"text": ...}`, every token of which teaches; `{"messages": [...]}` or `{"prompt": ..., "answer": ...}`,
            of which the assistant's words teach. `"finished": false` says that the answer was cut: no end follows.

    Returns:
        `input_ids` and `labels` (-100 where nothing is learnt), [S] each.
    """
    if "text" in row:
        text_ids = tokenizer(row["text"])["input_ids"][:max_length]
        return {"input_ids": text_ids, "labels": list(text_ids)}
    if "messages" in row:
        messages = row["messages"]
    elif "prompt" in row and "answer" in row:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
    else:
        raise ValueError(
            f"A training row must have `text`, `messages`, or `prompt` and `answer`, but has {sorted(row)}."
        )
    ids: list[int] = []
    labels: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _template(tokenizer, messages[:index], add_generation_prompt=True)
        words = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
        if row.get("finished", True):
            words.append(tokenizer.eos_token_id)
        if before[: len(ids)] != ids:
            raise ValueError(
                "The chat template writes earlier turns differently once later ones follow, so the assistant's words "
                "cannot be told apart. Give one turn a row (`prompt` and `answer`)."
            )
        labels += [IGNORED] * (len(before) - len(labels)) + words
        ids = before + words
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def _template(tokenizer: Any, messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_rows(
    rows: Iterable[dict[str, Any]], tokenizer: Any, max_length: int, draft_length: int
) -> list[dict[str, list[int]]]:
    """All rows with at least one label behind a draft's first slot; shorter ones cannot teach drafting."""
    encoded = [encode_row(row, tokenizer, max_length) for row in rows]
    return [row for row in encoded if sum(label != IGNORED for label in row["labels"]) > draft_length]


def pack_rows(rows: list[dict[str, list[int]]], max_length: int) -> list[dict[str, list[int]]]:
    """Encoded rows, several to a sequence of at most `max_length` tokens, longest first into the first that has room.

    Returns:
        rows of `input_ids`, `labels` and `document_ids` (0, 1, ...), [S] each: no document sees another.
    """
    packed: list[dict[str, list[int]]] = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True):
        length = len(row["input_ids"])
        room = (bin for bin in packed if len(bin["input_ids"]) + length <= max_length)
        target = next(room, None)
        if target is None:
            target = {"input_ids": [], "labels": [], "document_ids": []}
            packed.append(target)
        number = target["document_ids"][-1] + 1 if target["document_ids"] else 0
        target["input_ids"] += row["input_ids"]
        target["labels"] += row["labels"]
        target["document_ids"] += [number] * length
    return packed


class PaddingCollator:
    """Pads a batch of encoded rows to its longest, on the right: `input_ids`, `labels`, `attention_mask` [B, S], and
    `document_ids` of packed rows."""

    def __init__(self, pad_token_id: int):
        self.fillers = {"input_ids": pad_token_id, "labels": IGNORED, "document_ids": -1, "attention_mask": 0}

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return {
            name: torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])
            for name, filler in self.fillers.items()
            if name in rows[0]
        }
