"""Which wavefront positions have settled: one function per criterion, and the rule that freezes them in order.

A rows, W wavefront positions, E channels. States are compared at the same position, one decode step apart.
"""

import torch
from torch.linalg import vector_norm


def latent_difference(states: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """|z - z'| / |z|: relative change of each state in one step, [..., W, E] to [..., W] (arXiv 2510.14961, eq. 4)."""
    return vector_norm(states - previous, dim=-1) / vector_norm(states, dim=-1)


def latent_acceleration(states: torch.Tensor, velocity: torch.Tensor, previous_velocity: torch.Tensor) -> torch.Tensor:
    """|v - v'| / |z|: relative change of each state's velocity v = z - z', [..., W, E] to [..., W]."""
    return vector_norm(velocity - previous_velocity, dim=-1) / vector_norm(states, dim=-1)


def token_stability(num_unchanged: list[int], patience: int) -> list[bool]:
    """Settled: a position's input token has not changed for more than `patience` decode steps."""
    return [num > patience for num in num_unchanged]


def fixed_recurrences(num_recurrences: list[int], enough: int) -> list[bool]:
    """Settled: a position has had `enough` recurrences since its token last changed, whatever its state."""
    return [num >= enough for num in num_recurrences]


def count_frozen(
    fed_ids: list[int],
    predicted_ids: list[int],
    is_settled: list[bool],
    is_exhausted: list[bool],
    is_final: list[bool],
    max_wavefront: int,
) -> int:
    """The number of tokens one row freezes: the longest run of final tokens from its left.

    Position 0 of the wavefront is the last frozen token; the state of position i predicts the token of position i + 1.
    The token of position i + 1 is final if the states of positions 0 .. i + 1 have settled, and its own state was
    computed from the token now predicted. That state need not settle if `is_exhausted` (at its maximum of recurrences).
    A wavefront of one position has no such state. A position that `is_final` has had all recurrences of plain
    decoding: after frozen tokens, its prediction freezes. A run ends at a token that differs from its position's
    input, since later positions followed another token.
    """
    num_frozen = 0
    while num_frozen < len(predicted_ids):
        here, there = num_frozen, num_frozen + 1
        has_place = there < len(fed_ids)
        is_unchanged = has_place and fed_ids[there] == predicted_ids[here]
        if has_place:
            has_settled = is_unchanged and is_settled[here] and (is_settled[there] or is_exhausted[there])
        else:
            has_settled = is_settled[here] and max_wavefront == 1
        if not (has_settled or is_final[here]):
            break
        num_frozen = there
        if not is_unchanged:
            break
    return num_frozen


def is_resting(fed_ids: list[int], predicted_ids: list[int], is_settled: list[bool], place: int) -> bool:
    """Whether position `place` has settled and still predicts the input token of the next position, if any."""
    if place >= len(fed_ids):
        return True
    has_news = place + 1 < len(fed_ids) and fed_ids[place + 1] != predicted_ids[place]
    return is_settled[place] and not has_news
