"""A model drafts for one thread at a time: while it does, its layers compute otherwise than they are."""

import functools
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .stock_model import decoder_of

_turns: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_guard = threading.Lock()


def in_turn(decode: Callable[..., Any]) -> Callable[..., Any]:
    """`decode(model, ...)` that waits until no other thread decodes with the model's decoder, whichever class it is
    seen through."""

    @functools.wraps(decode)
    def waiting(model: Any, *args: Any, **kwargs: Any) -> Any:
        with _guard:
            turn = _turns.setdefault(decoder_of(model), threading.RLock())
        with turn:
            return decode(model, *args, **kwargs)

    return waiting
