"""Self-speculation: a shallow depth drafts, full depth verifies. A baseline for the wavefront.

A rows, T tokens, K drafted tokens, V vocabulary.
"""

import torch

from ..acceptance import accept_by_equality, sample
from .draws_recurrent import ACCEPTANCE, DRAFT, REPLACEMENT
from .outputs_recurrent import RecurrentGenerateOutput
from .rejection import accept_by_rejection, residual_probs
from .session_recurrent import Session, choose_first, with_noise, write_in_order


@torch.no_grad()
def decode_self_speculative(session: Session) -> RecurrentGenerateOutput:
    """Drafts K tokens at a shallow depth, verifies them in one full-depth pass (algorithm 1 of arXiv 2211.17192)."""
    transcript = session.transcript
    next_ids = choose_first(session, session.prefill())
    starts = [session.num_columns - pad for pad in session.pads]
    while places := transcript.drop_ended():
        if len(places) < len(starts):
            session.keep_rows(places)
            starts, next_ids = [starts[place] for place in places], [next_ids[place] for place in places]
        draft_ids, draft_probs = draft(session, starts, next_ids)
        transcript.show_draft(draft_ids)
        logits = recur(session, draft_ids, starts, session.options.num_recurrences)
        session.costs.add_step()
        if session.scores.is_in_order:
            drafts = [[*ids, -1] for ids in draft_ids[:, 1:].tolist()]
            written = write_in_order(session, logits, starts, drafts, [0] * len(starts))
        else:
            scores = session.scores(logits)
            written = verify(session, starts, draft_ids, draft_probs, scores)
            session.keep_steps(written, logits, scores)
            transcript.write(written)
        next_ids = [ids[-1] for ids in written]
        starts = [start + len(ids) for start, ids in zip(starts, written, strict=True)]
    return session.output()


def draft(session: Session, starts: list[int], next_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The last decided token and K drafted ones, [A, K + 1], and their distributions, [A, K, V], if sampled."""
    ids = torch.tensor(next_ids, device=session.device)[:, None]
    probs = []
    for step in range(session.options.draft_length):
        at = [start + step for start in starts]
        logits = recur(session, ids[:, -1:], at, session.options.draft_recurrences[0])
        ends = session.transcript.starts(step)
        scores = session.draft_scores(logits, ends)
        if session.scores.is_in_order:
            drawn = with_noise(session, scores, at).argmax(dim=-1)
        elif session.do_sample:
            probs.append(scores.softmax(dim=-1))
            drawn = sample(probs[-1][:, 0], session.draws.uniform(DRAFT, list(range(len(starts))), at))[:, None]
        else:
            drawn = scores.argmax(dim=-1)
        session.transcript.write_undecided(drawn, ends)
        ids = torch.cat([ids, drawn], dim=1)
    return ids, torch.cat(probs, dim=1) if probs else None


def recur(session: Session, ids: torch.Tensor, starts: list[int], num_recurrences: int) -> torch.Tensor:
    """Logits [A, T, V] of [A, T] tokens from the positions `starts` on, at `num_recurrences`."""
    parts = session.parts
    window = parts.window_at(starts, ids.shape[1], session.cache)
    embeds = parts.prelude(ids, window)
    states = parts.core_steps(session.states.of(embeds, starts), embeds, window, num_recurrences)
    for _ in range(num_recurrences):
        session.costs.add_core_pass(ids.numel(), session.rows)
    for row, start in enumerate(starts):
        place = session.place_of(row, start)
        counts = session.costs.recurrences[session.transcript.active[row]]
        counts.update({place + i: counts.get(place + i, 0) + num_recurrences for i in range(ids.shape[1])})
    return parts.coda(states, window)


def verify(
    session: Session,
    starts: list[int],
    draft_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    scores: torch.Tensor,
) -> list[list[int]]:
    """The tokens each row decides from full-depth scores: the accepted drafted tokens, and one more."""
    if draft_probs is None:
        target_ids = scores.argmax(dim=-1)
        num_accepted = accept_by_equality(draft_ids, target_ids)
        more = target_ids.gather(1, num_accepted[:, None] - 1)
    else:
        probs = scores.softmax(dim=-1)
        num_rows, num_drafted = draft_probs.shape[:2]
        rows = [row for row in range(num_rows) for _ in range(num_drafted)]
        positions = [start + i for start in starts for i in range(num_drafted)]
        uniforms = session.draws.uniform(ACCEPTANCE, rows, positions).view(num_rows, num_drafted)
        num_accepted = accept_by_rejection(draft_ids, probs, draft_probs, uniforms)
        left = residual_probs(probs, draft_probs, num_accepted)
        more = sample(left, session.draws.uniform(REPLACEMENT, list(range(num_rows)), starts))[:, None]
    on_host = torch.cat([num_accepted[:, None], more, draft_ids[:, 1:]], dim=1).tolist()
    return [[*drafted[: count - 1], last] for count, last, *drafted in on_host]
