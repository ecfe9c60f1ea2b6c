"""The learned position table of some models, GPT-2 and OPT among them, and texts that are too long for it."""

from collections.abc import Iterable
from typing import Any

from .row_forms import Row


def position_table_of(config: Any) -> int | None:
    """The rows of a model's position table; None for rotary positions, which have no table."""
    config = config.get_text_config()
    has_table = getattr(config, "rope_parameters", None) is None
    return getattr(config, "max_position_embeddings", None) if has_table else None


def check_fit(config: Any, prompts: Iterable[tuple[Row, int]], max_new_tokens: int) -> None:
    """Raises ValueError for the first prompt whose text may become longer than the model's position table.

    Args:
        prompts: each row with its number of tokens.
    """
    limit = position_table_of(config)
    for row, length in prompts if limit is not None else ():
        if (num_read := length + max_new_tokens - 1) > limit:
            raise ValueError(
                f"{row.place} has {length} tokens. With {max_new_tokens} new ones, {num_read} are read, but this "
                f"model's position table has {limit} rows (`config.max_position_embeddings`). Shorten the prompt, or "
                "lower `max_new_tokens`."
            )
