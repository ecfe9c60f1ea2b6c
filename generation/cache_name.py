"""What transformers calls the cache of keys and values: `cache` from 5.24 on, `past_key_values` before."""

from dataclasses import fields
from typing import Any

from transformers.generation.utils import GenerateDecoderOnlyOutput

NAMES = ("cache", "past_key_values")
CACHE = next(name for name in NAMES if name in {field.name for field in fields(GenerateDecoderOnlyOutput)})


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """What a forward of ours was given, by either name.

    Raises:
        ValueError: by both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("`past_key_values` must be left out beside `cache`: the two are names of one argument.")
    return past_key_values if cache is None else cache


def is_users_cache(cache: Any) -> bool:
    """Whether a caller of `generate` handed this cache in: it is then brought up to date, which costs time."""
    return getattr(cache, "_is_user_defined", False)


def mark_users_cache(cache: Any) -> None:
    """Says of a cache what `is_users_cache` asks."""
    cache._is_user_defined = True
