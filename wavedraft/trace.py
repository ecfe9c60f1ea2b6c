"""What each forward of a decode drafted and wrote, for a picture of it."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class TracedForward:
    """
    Attributes:
        draft_ids: what was drafted after the text, up to K tokens.
        new_ids: what the forward decided: the part of the draft that stands, and one more unless the text ended.
    """

    draft_ids: list[int]
    new_ids: list[int]

    @property
    def num_accepted(self) -> int:
        """Drafted tokens that stand."""
        pairs = zip(self.draft_ids, self.new_ids, strict=False)
        return next((place for place, (drafted, new) in enumerate(pairs) if drafted != new), self.num_comparable)

    @property
    def num_comparable(self) -> int:
        return min(len(self.draft_ids), len(self.new_ids))

    @property
    def num_judged(self) -> int:
        """Drafted tokens that were accepted or rejected. A text that ends judges nothing after its end."""
        has_ended = self.num_accepted == len(self.new_ids)
        return self.num_accepted if has_ended else len(self.draft_ids)


class TraceStreamer(BaseStreamer):
    """A streamer that records what a decode of one row drafted and wrote. It passes everything on.

    Args:
        other: the streamer that shows the text, if any.

    Attributes:
        forwards: the first is the prefill.
    """

    def __init__(self, other: Any = None):
        self.other = other
        self.forwards: list[TracedForward] = []
        self.draft_ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt [1, P] and then the ids [n] that each forward decided."""
        if value.dim() == 1:
            self.forwards.append(TracedForward(self.draft_ids, value.tolist()))
            self.draft_ids = []
        if self.other is not None:
            self.other.put(value)

    def put_draft(self, value: torch.Tensor, **kwargs: Any) -> None:
        """Takes the draft [1, K] that the next forward verifies."""
        self.draft_ids = value[0].tolist()
        if hasattr(self.other, "put_draft"):
            self.other.put_draft(value, **kwargs)

    def end(self) -> None:
        if self.other is not None:
            self.other.end()


@dataclass(frozen=True)
class Trace:
    """One prompt's decode.

    Attributes:
        told: its counts, as one line.
        forwards: in order; the first is the prefill.
        wavefront: of a recurrent-depth model's wavefront, a `WavefrontStep` for each decode step, or None.
    """

    prompt: str
    told: str
    forwards: list[TracedForward]
    wavefront: list[Any] | None = None

    def slots(self) -> list[tuple[int, int]]:
        """For each place of the drafts: how many forwards accepted the token there, and how many judged one."""
        longest = max((len(forward.draft_ids) for forward in self.forwards), default=0)
        return [
            (
                sum(forward.num_accepted > place for forward in self.forwards),
                sum(forward.num_judged > place for forward in self.forwards),
            )
            for place in range(longest)
        ]


@dataclass(frozen=True)
class WavefrontCell:
    """What a decode step did to the token at one place after the prompt: it was guessed, changed, kept or frozen."""

    place: int
    token_id: int
    state: str


def wavefront_cells(steps: list[Any]) -> list[list[WavefrontCell]]:
    """The tokens that each `WavefrontStep` predicted, by their places among the new tokens."""
    first, cells = steps[0].start, []
    before: dict[int, int] = {}
    for step in steps:
        after = {step.start + i + 1: token for i, token in enumerate(step.predicted_ids)}
        row = []
        for position, token in after.items():
            if position <= step.start + step.num_frozen:
                state = "frozen"
            elif position not in before:
                state = "guessed"
            else:
                state = "kept" if before[position] == token else "changed"
            row.append(WavefrontCell(position - first, token, state))
        cells.append(row)
        before = after
    return cells
