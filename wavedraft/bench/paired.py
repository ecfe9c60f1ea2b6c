"""Paired ratios with intervals: what other programs on the machine disturb little.

Every way decodes one prompt before any decodes the next, so what slows one of a pair down mostly slows the other too.
"""

import random
from collections.abc import Callable, Sequence
from math import exp, log
from statistics import fmean, median
from typing import Any, TypeVar

NUM_DRAWS = 2000  # of the bootstrap: the ends of the interval then move by about a hundredth of its width
FEWEST_PAIRS = 5  # of fewer, the bootstrap has too few different draws for an interval of 95 %
WIDEST = 1.5  # greatest over least end of an interval: a wider one cannot tell "no gain" from "half as fast again"
BUSY = 0.05  # share of the time in which threads that could run waited for a core

Item = TypeVar("Item")


def bootstrap(items: Sequence[Item], figure_of: Callable[[list[Item]], float]) -> tuple[float, float] | None:
    """The ends of a figure's 95 % interval, items being drawn with replacement; None of fewer than `FEWEST_PAIRS`."""
    if len(items) < FEWEST_PAIRS:
        return None
    draw = random.Random(0)
    figures = sorted(figure_of(draw.choices(items, k=len(items))) for _ in range(NUM_DRAWS))
    edge = NUM_DRAWS // 40
    return figures[edge], figures[-1 - edge]


def paired_ratio(pairs: dict[Any, list[tuple[float, float]]]) -> dict[str, Any]:
    """How many times the second of each pair goes into the first.

    Args:
        pairs: for each batch of prompts, the seconds of plain decoding and of another way, one pair a round.

    Returns:
        `mean`, geometric over batches, each of which counts by the median of its rounds; `low` and `high`, the ends of
        the 95 % interval by a bootstrap over batches, None where there are fewer than `FEWEST_PAIRS`; `num_pairs`.
    """
    logs = [median(log(plain / own) for plain, own in rounds) for rounds in pairs.values()]
    found: dict[str, Any] = {"mean": exp(fmean(logs)), "low": None, "high": None, "num_pairs": len(logs)}
    if (interval := bootstrap(logs, fmean)) is not None:
        found |= {"low": exp(interval[0]), "high": exp(interval[1])}
    return found


def is_noisy(ratio: dict[str, Any]) -> bool:
    """Whether the interval of a `paired_ratio` is too wide to say much; False where there is none."""
    return ratio["low"] is not None and ratio["high"] > WIDEST * ratio["low"]
