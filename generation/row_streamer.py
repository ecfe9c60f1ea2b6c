"""Streams each text of a batch separately."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer


class RowStreamer(BaseStreamer):
    """A streamer for several rows: `put_row` gets each row's ids when they are decided.

    Args:
        tokenizer: decodes the ids.
        on_text: called as `on_text(row, text, is_end)` with each piece of finished text, in whole words.
        decode_kwargs: keywords of the tokenizer's `decode`, such as `skip_special_tokens=True`.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[int, str, bool], None], **decode_kwargs: Any):
        self.tokenizer, self.on_text, self.decode_kwargs = tokenizer, on_text, decode_kwargs
        self.rows: list[TextStreamer] = []

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompts [B, P] first: they set the number of rows and are not shown.

        Then takes the next id of every row, [B], from transformers' own loop. This loop pads the rows that have ended
        (pass `skip_special_tokens=True`).
        """
        if self.rows:
            for row, token_id in enumerate(value):
                self.put_row(row, token_id[None])
            return
        for row in range(len(value)):
            streamer = TextStreamer(self.tokenizer, **self.decode_kwargs)
            streamer.on_finalized_text = lambda text, stream_end=False, row=row: self.on_text(row, text, stream_end)
            self.rows.append(streamer)

    def put_row(self, row: int, ids: torch.Tensor) -> None:
        """Takes new ids [n] of one row."""
        for token_id in ids:
            self.rows[row].put(token_id[None])

    def end(self) -> None:
        for streamer in self.rows:
            streamer.end()
        self.rows = []
