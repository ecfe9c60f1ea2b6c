"""Chooses the embedding row that masks read. The mask's id itself is after the vocabulary: see `convert`."""

from collections.abc import Callable, Iterator
from typing import Any


def mask_embedding_id(
    tokenizer: Any, vocab_size: int, end_ids: list[int], is_zero_row: Callable[[int], bool]
) -> tuple[int, str]:
    """The row that text uses least, and the reason for the choice.

    Args:
        tokenizer: the checkpoint's, or None.
        end_ids: further ids that end a text (`generation_config.eos_token_id`).
        is_zero_row: whether a row of the table is all zeros. Such a row gives an adapter nothing to act on in the first
            layer, so it is chosen only if there is no other.
    """
    candidates = [row for row in _by_preference(tokenizer, vocab_size, end_ids) if 0 <= row[0] < vocab_size]
    for row, reason in candidates:
        if not is_zero_row(row):
            return row, reason
    return candidates[0]


def _by_preference(tokenizer: Any, vocab_size: int, end_ids: list[int]) -> Iterator[tuple[int, str]]:
    if tokenizer is not None:
        for row in range(max(tokenizer.get_vocab().values(), default=-1) + 1, vocab_size):
            yield row, "no token of the tokenizer uses it"
        reserved = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
        template = str(tokenizer.chat_template or "")
        added = {row: token for row, token in tokenizer.added_tokens_decoder.items() if token.special}
        for row, token in sorted(added.items(), reverse=True):
            if row not in [*reserved, *end_ids] and token.content not in template:
                yield row, f"the special token {token.content!r}, which the chat template does not use"
        for name in ("unk_token", "bos_token", "eos_token"):
            if (row := getattr(tokenizer, f"{name}_id")) is not None:
                yield row, f"the tokenizer's {name}"
    yield vocab_size - 1, "the last row, since no better one was found"
