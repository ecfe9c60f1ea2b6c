"""What forwards of several query tokens cost: a curve that never falls, or the word that the times are noise."""

from itertools import takewhile
from typing import Any

FREE = 1.25  # a forward of "free" query tokens takes at most this much of the time of a forward of one
DEEPEST_DIP = 0.8  # where a forward of more tokens takes less of the time of a smaller one, the times are noise


def forwards_with_costs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `time_forwards`, of each place in rising order of query tokens, with their `least_seconds` and
    their `cost`, in forwards of one query token of the same batch after the same prompts; None where the times of a
    place are noise."""
    found = []
    for place in dict.fromkeys(map(place_of, rows)):
        of_place = [row for row in rows if place_of(row) == place]
        least = [min(row["seconds"]) for row in of_place]
        costs = monotone_costs(least) or [None] * len(least)
        for row, seconds, cost in zip(of_place, least, costs, strict=True):
            found.append({**row, "least_seconds": seconds, "cost": cost})
    return found


def place_of(row: dict[str, Any]) -> tuple[int, int]:
    """Batch size and cached tokens of a timed forward."""
    return row["batch_size"], row["num_cached"]


def monotone_costs(seconds: list[float]) -> list[float] | None:
    """What forwards cost, in forwards of the first width.

    Other programs only ever add to a time, and more query tokens never take less. So the least time of all forwards of
    as many tokens or more is the best estimate from above.

    Args:
        seconds: the least time of each width, in rising order of query tokens.

    Returns:
        costs that never fall, or None where the times fall so much that they are noise (`deepest_dip`).
    """
    if (dip := deepest_dip(seconds)) is not None and dip[2] < DEEPEST_DIP:
        return None
    least = [min(seconds[place:]) for place in range(len(seconds))]
    return [one / least[0] for one in least]


def deepest_dip(seconds: list[float]) -> tuple[int, int, float] | None:
    """The places of a narrower and a wider forward, and the time of the wider in those of the narrower, where this is
    least and below 1."""
    dips = [
        (narrow, wide, seconds[wide] / seconds[narrow])
        for wide in range(len(seconds))
        for narrow in range(wide)
        if seconds[wide] < seconds[narrow]
    ]
    return min(dips, key=lambda dip: dip[2], default=None)


def free_query_tokens(forwards: list[dict[str, Any]]) -> dict[tuple[int, int], int | None]:
    """The most query tokens a row, of those tried, whose forward takes at most `FREE` times as long as one token's.

    Returns:
        numbers by (batch size, cached tokens); None where the times are noise.
    """
    free: dict[tuple[int, int], int | None] = {}
    for place in dict.fromkeys(map(place_of, forwards)):
        rows = [row for row in forwards if place_of(row) == place]
        if rows[0]["cost"] is None:
            free[place] = None
        else:
            free[place] = [row["num_query_tokens"] for row in takewhile(lambda row: row["cost"] <= FREE, rows)][-1]
    return free


def cost_note(rows: list[dict[str, Any]], free: int | None, is_packed: bool) -> str:
    """What the forwards of one place cost, in a sentence."""
    where = "batch {}, {} cached tokens".format(*place_of(rows[0]))
    if free is None:
        dip = deepest_dip([row["least_seconds"] for row in rows])
        assert dip is not None
        narrow, wide = (rows[place]["num_query_tokens"] for place in dip[:2])
        return (
            f"{where}: too noisy to say what query tokens cost: a forward of {wide} took {dip[2]:.2f} of the time of "
            f"one of {narrow}. Run this again on an idle machine."
        )
    costs = ", ".join(f"{row['num_query_tokens']}: {row['cost']:.2f}" for row in rows)
    packed = ", of packed weights" if is_packed else ""
    return (
        f"{where}: {free} query tokens a row are free here (at most {FREE} forwards of one); cost of a forward by "
        f"query tokens{packed}: {costs}."
    )
