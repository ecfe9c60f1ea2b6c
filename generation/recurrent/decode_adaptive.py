"""Adaptive depth: each token recurs until its state settles. A baseline for the wavefront.

A rows, E channels.
"""

from typing import Any

import torch

from .freezing import latent_difference
from .outputs_recurrent import RecurrentGenerateOutput
from .session_recurrent import Session, choose_first


@torch.no_grad()
def decode_adaptive(session: Session) -> RecurrentGenerateOutput:
    """Decodes token by token. A token recurs until its state changes by less than `exit_threshold`, or full depth."""
    transcript, costs, options = session.transcript, session.costs, session.options
    until = options.exit_threshold if options.reference_compat else 0.0
    next_ids = choose_first(session, session.prefill(until))
    starts = [session.num_columns - pad for pad in session.pads]
    while places := transcript.drop_ended():
        if len(places) < len(starts):
            session.keep_rows(places)
            starts, next_ids = [starts[place] for place in places], [next_ids[place] for place in places]
        window = session.parts.window_at(starts, 1, session.cache)
        embeds = session.parts.prelude(torch.tensor(next_ids, device=session.device)[:, None], window)
        is_packed = session.parts is session.model
        recur = recur_while_moving if is_packed else recur_in_one_shape
        states = recur(session, embeds, starts, window)
        logits = session.parts.coda(states, window)
        costs.add_step()
        next_ids = session.choose(logits, starts)
        starts = [start + 1 for start in starts]
    return session.output()


def recur_in_one_shape(session: Session, embeds: torch.Tensor, starts: list[int], window: Any) -> torch.Tensor:
    """[A, 1, E] states of the tokens at `starts`. Settled rows are still computed; their results are discarded."""
    states = session.states.of(embeds, starts)
    moving, is_settled = list(range(len(starts))), None
    for recurrence in range(1, session.options.num_recurrences + 1):
        after = session.parts.core_step(states, embeds, window, recurrence)
        change = latent_difference(after, states)[:, 0]
        states = after if is_settled is None else torch.where(is_settled[:, None, None], states, after)
        count_recurrence(session, moving, starts)
        settles = (change < session.options.exit_threshold).tolist()
        num_moving, moving = len(moving), [row for row in moving if not settles[row]]
        if not moving:
            break
        if len(moving) < num_moving:
            is_settled = torch.tensor([row not in moving for row in range(len(starts))], device=session.device)
            window = window.without(is_settled)
    return states


def count_recurrence(session: Session, moving: list[int], starts: list[int]) -> None:
    """Counts one more core pass for the tokens at `starts` of the `moving` rows."""
    session.costs.add_core_pass(len(moving), [session.rows[row] for row in moving])
    for row in moving:
        session.costs.add_recurrence(session.transcript.active[row], session.place_of(row, starts[row]))


def recur_while_moving(session: Session, embeds: torch.Tensor, starts: list[int], window: Any) -> torch.Tensor:
    """[A, 1, E] states of the tokens at `starts`. Settled rows are no longer computed."""
    options = session.options
    states = session.states.of(embeds, starts)
    moving, window = list(range(len(starts))), None
    for recurrence in range(1, options.num_recurrences + 1):
        if window is None:
            window = session.model.packed_window(moving, [starts[row] for row in moving], session.cache)
        before = states[moving]
        after = session.model.core_step(before, embeds[moving], window.at([recurrence] * len(moving)))
        states[moving] = after
        count_recurrence(session, moving, starts)
        has_settled = (latent_difference(after, before)[:, 0] < options.exit_threshold).tolist()
        if any(has_settled):
            moving = [row for row, settled in zip(moving, has_settled, strict=True) if not settled]
            window = None
        if not moving:
            break
    return states
