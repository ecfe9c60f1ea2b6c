"""Converts texts and dialogues to rows of ids, with labels on the assistant's words.

S tokens of a row, P tokens of a prompt.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .chat_template import TemplateRefusal, apply_template, has_generation_marks
from .regeneration import usable_answer
from .row_forms import Row

IGNORED = -100


class AmbiguousTurns(ValueError):
    """The assistant's words of a dialogue cannot be located."""


def encode_row(row: Row, tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Ids and labels of one row, cut to `max_length`.

    A dialogue has labels on the assistant's words, a text on every token. An answer that was cut (`row.finished` is
    False) has no end mark.

    Returns:
        `input_ids` and `labels` (-100 for a token without a label), [S] each.

    Raises:
        ValueError: the row has nothing to learn, the chat template refuses it, or its assistant's words cannot be
            located.
    """
    row.check_teaches()
    if not row.has_answer:
        ids = tokenizer(row.text)["input_ids"]
        return {"input_ids": ids[:max_length], "labels": ids[:max_length]}
    by_marks = has_generation_marks(tokenizer, row) and row.finished is not False
    ids, labels = (_by_marks if by_marks else _by_prefixes)(row, tokenizer)
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def _by_marks(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    encoded = apply_template(tokenizer, row, return_dict=True, return_assistant_tokens_mask=True)
    ids, said = encoded["input_ids"], encoded["assistant_masks"]
    return ids, [token if is_said else IGNORED for token, is_said in zip(ids, said, strict=True)]


def _by_prefixes(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids and labels of a dialogue whose template has no generation marks.

    For each assistant turn, the template writes the turns before with a generation prompt, and then with this turn.
    The difference is the assistant's words, up to the end mark, or to the last word of an unfinished answer.

    Raises:
        AmbiguousTurns: the tokens of a prefix are not the first tokens of the whole dialogue.
    """
    messages = row.messages
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")

    def written(number: int, **options: Any) -> str:
        return apply_template(tokenizer, row, messages[:number], tokenize=False, **options)

    whole = written(last + 1)
    ids: list[int] = []
    labels: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, through = written(index, add_generation_prompt=True), written(index + 1)
        said = through[len(before) :].rstrip()
        is_cut = index == last and row.finished is False
        if is_cut:
            words = message["content"].strip()
            said = said[: said.rfind(words) + len(words)]
        before_ids, ids = _tokens(tokenizer, before), _tokens(tokenizer, before + said)
        is_prefix = through.startswith(before) and (is_cut or whole.startswith(before + said))
        whole_ids = ids if is_cut else _tokens(tokenizer, whole)
        if not is_prefix or ids[: len(before_ids)] != before_ids or whole_ids[: len(ids)] != ids:
            raise AmbiguousTurns(
                f"{row.place}: the chat template has no generation marks, and the dialogue to turn {index + 1} is not "
                "the turns before followed by the answer, so the assistant's words cannot be located. Give rows of one "
                "turn (`prompt` and `answer`), or a template with {% generation %} marks."
            )
        labels += [IGNORED] * (len(before_ids) - len(labels)) + ids[len(before_ids) :]
    return ids, labels


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class RowEncoder:
    """Encodes rows, and counts those it drops.

    A row needs more labels than a draft has tokens to train drafting. A text longer than `max_length` continues in
    further rows; a dialogue is cut. An answer of `regenerate` that repeats itself is cut at its first repetition.

    Attributes:
        loops: numbers of answers `kept`, `cut` at a loop, and `dropped`.
        assistant_words: how the last dialogue's assistant words were located: by the template's "generation marks", or
            by "prefixes" without marks.
        refused: number of dialogues that the chat template refuses, or whose assistant words could not be located.
        reason: why the first of these dialogues was refused.
    """

    def __init__(self, tokenizer: Any, max_length: int, draft_length: int):
        self.tokenizer, self.max_length, self.draft_length = tokenizer, max_length, draft_length
        self.loops = {"kept": 0, "cut": 0, "dropped": 0}
        self.refused, self.reason = 0, ""
        self.assistant_words: str | None = None

    def __call__(self, row: Row) -> Iterator[dict[str, list[int]]]:
        if row.has_answer and row.finished is not None:  # `regenerate` wrote it
            answer = usable_answer(said := row.messages[-1]["content"])
            self.loops["dropped" if answer is None else "kept"] += 1
            if answer is None:
                return
            if answer != said:
                self.loops["cut"] += 1
                row = replace(
                    row, messages=[*row.messages[:-1], {"role": "assistant", "content": answer}], finished=False
                )
        row.check_teaches()
        if not row.has_answer:
            ids = self.tokenizer(row.text)["input_ids"]
            pieces = [ids[start : start + self.max_length] for start in range(0, len(ids), self.max_length)]
            encoded = [{"input_ids": piece, "labels": list(piece)} for piece in pieces]
        else:
            try:
                encoded = [encode_row(row, self.tokenizer, self.max_length)]
            except (AmbiguousTurns, TemplateRefusal) as error:
                self.refused, self.reason = self.refused + 1, self.reason or str(error)
                return
            self.assistant_words = "generation marks" if has_generation_marks(self.tokenizer, row) else "prefixes"
        yield from (row for row in encoded if sum(label != IGNORED for label in row["labels"]) > self.draft_length)


def pack_rows(rows: list[dict[str, list[int]]], max_length: int) -> list[dict[str, list[int]]]:
    """Packs several encoded rows into each sequence of at most `max_length` tokens.

    The longest rows are placed first, each into the first sequence that has room.

    Returns:
        rows of `input_ids`, `labels` and `document_ids` (0, 1, ...), [S] each. No document sees another.
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
    """Pads a batch of encoded rows on the right to the longest row.

    A call returns `input_ids`, `labels`, `attention_mask`, and `document_ids` for packed rows, [B, S] each.
    """

    def __init__(self, pad_token_id: int):
        self.fillers = {"input_ids": pad_token_id, "labels": IGNORED, "document_ids": -1, "attention_mask": 0}

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return {
            name: torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])
            for name, filler in self.fillers.items()
            if name in rows[0]
        }
