"""One decode of a race: its text and its drafts, and when each came."""

import time
from bisect import bisect_right
from typing import Any, NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer

from ..growing_text import GrowingText


class StoppedRace(Exception):
    """Raised in a decode that nobody waits for any more."""


class Moment(NamedTuple):
    """What a lane shows from a time on.

    Attributes:
        seconds: since the decode began.
        num_pieces: of the lane's pieces of text, so many are there.
        draft: the text drafted after them.
        num_tokens: new tokens so far.
    """

    seconds: float
    num_pieces: int
    draft: str
    num_tokens: int


class Lane(BaseStreamer):
    """A streamer of one text that keeps what is shown when.

    Attributes:
        pieces: the text that each forward added, in order.
        moments: in order; the first is the empty text at 0 seconds.
        seconds: what the decode took in all; None while it runs.
        is_stopped: set by another thread, ends the decode at its next token by a `StoppedRace`.
    """

    def __init__(self, tokenizer: Any):
        self.growing = GrowingText(tokenizer)
        self.pieces: list[str] = []
        self.moments = [Moment(0.0, 0, "", 0)]
        self.start: float | None = None
        self.seconds: float | None = None
        self.is_stopped = False

    def begin(self) -> None:
        """Starts the lane's clock."""
        self.start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt [1, P], which is not shown, and then the ids [n] that each forward decided.

        Raises:
            StoppedRace: `is_stopped` was set.
        """
        if self.is_stopped:
            raise StoppedRace
        if value.dim() == 1:
            self.pieces.append(self.growing.add(value.tolist()))
            num_tokens = self.moments[-1].num_tokens + len(value)
            self.moments.append(Moment(self.elapsed(), len(self.pieces), "", num_tokens))

    def put_draft(self, value: torch.Tensor, **kwargs: Any) -> None:
        """Takes the draft [1, K] that follows the text. Raises as `put`."""
        if self.is_stopped:
            raise StoppedRace
        last = self.moments[-1]
        draft = self.growing.preview(value[0].tolist())
        self.moments.append(last._replace(seconds=self.elapsed(), draft=draft))

    def end(self) -> None:
        """Adds the rest of the text to the last piece. `finish` stops the clock."""
        if self.pieces:
            self.pieces[-1] += self.growing.rest()

    def finish(self) -> None:
        """Stops the lane's clock."""
        self.seconds = self.elapsed()

    def elapsed(self) -> float:
        """Seconds on the lane's clock."""
        if self.seconds is not None:
            return self.seconds
        return 0.0 if self.start is None else time.perf_counter() - self.start

    def at(self, seconds: float) -> Moment:
        """What the lane showed at a time of its clock."""
        return self.moments[bisect_right(self.moments, seconds, key=lambda moment: moment.seconds) - 1]
