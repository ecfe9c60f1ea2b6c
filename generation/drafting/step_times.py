"""What a decode step takes on this machine, by its shape: measured once, and seen again at every step.

N tokens of a draft, M blocks of K masks.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

Shape = tuple[int, int, int]  # N, M, K
PLAIN_SHAPE: Shape = (1, 0, 0)
MEASURING_SECONDS = 1.0  # or five rounds, whichever takes longer
NEWEST, NEWEST_OF_SHAPE = 0.2, 0.1  # weight of the last forward in how slow the machine is, and its shape beside others
HELD_UP = 2.0  # a forward that took longer than so many of its kind was held up by something else
MOST_CREDIT, CREDIT_OF_A_TEXT = 20.0, 2.0  # plain forwards: what drafts have saved, and what one text may lose of it


@dataclass
class StepTimes:
    """Seconds of a forward of N clean tokens and M blocks of K masks, by (N, M, K).

    Attributes:
        slowness: what forwards take now, to what `seconds` say. It is shared: a machine that slows down while drafts
            are tried must not make plain decoding look cheap.
        plain_slowness: the same of plain forwards alone, None until one was seen: what drafts cost a text is told by
            it, so that a shape whose `seconds` are too few is not taken for a slow machine.
        credit: plain forwards that drafts have saved the texts before, up to `MOST_CREDIT`. The first text is lent what
            one may lose: finding out what the drafts of a model are worth is part of measuring it.
    """

    seconds: dict[Shape, float]
    slowness: float = 1.0
    plain_slowness: float | None = 1.0
    credit: float = 0.0

    @classmethod
    def measured(cls, shapes: list[Shape], seconds_of: Callable[[Shape], float]) -> "StepTimes":
        """Runs all shapes in turn, again and again. The first round warms up; of the others the quickest counts: what
        else a machine does only ever makes a forward slower."""
        for shape in shapes:
            seconds_of(shape)
        rounds: dict[Shape, list[float]] = {shape: [] for shape in shapes}
        start = time.perf_counter()
        while len(rounds[shapes[0]]) < 5 or time.perf_counter() - start < MEASURING_SECONDS:
            for shape in shapes:
                rounds[shape].append(seconds_of(shape))
        seconds = {shape: min(taken) for shape, taken in rounds.items()}
        return cls(seconds, plain_slowness=None, credit=CREDIT_OF_A_TEXT).smoothed()

    def smoothed(self) -> "StepTimes":
        """Halfway to the best straight line in the number of queries (and a step up where masks are among them): of
        many plans the one whose few forwards happened to be quick must not win by that."""
        about = torch.tensor([[1.0, float(m > 0), n + m * k] for n, m, k in self.seconds])
        measured = torch.tensor(list(self.seconds.values()))[:, None]
        line = (about @ torch.linalg.lstsq(about, measured, driver="gelsd").solution)[:, 0].tolist()
        halfway = [(x * max(y, x / 2)) ** 0.5 for x, y in zip(self.seconds.values(), line, strict=True)]
        return replace(self, seconds=dict(zip(self.seconds, halfway, strict=True)))

    def see(self, shape: Shape, seconds: float) -> None:
        """Takes in what a forward cost with all that is done around it; of a shape nobody measured it says nothing."""
        if shape == PLAIN_SHAPE:
            now = seconds / self.seconds[shape]
            known = now if self.plain_slowness is None else self.plain_slowness
            self.plain_slowness = known + NEWEST * (min(now, HELD_UP * known) - known)
        if shape in self.seconds:
            ratio = min(seconds / (self.seconds[shape] * self.slowness), HELD_UP)
            self.seconds[shape] *= 1 + NEWEST_OF_SHAPE * (ratio - 1)
            self.slowness *= 1 + NEWEST * (ratio - 1)
