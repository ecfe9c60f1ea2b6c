"""Diffusion forcing for recurrent-depth models: the wavefront adds headway, recurs, freezes (arXiv 2510.14961).

Corrects these errors of the published code, which `decode_published` reproduces. Positions freeze only in a run from
the left. A token freezes only if its state was computed from it since the first recurrence: a state begun from another
token may settle where that token led. States are compared at the same position. A position that does not settle
starts again after frozen tokens, and freezes at full depth. A position's first embedding is not averaged. Sampling
noise is drawn once per position, so a token changes only with its scores. Rows end at their end tokens.

A rows, W wavefront positions, E channels, V vocabulary.
"""

import copy
from collections.abc import Callable

import torch

from .freezing import (
    count_frozen,
    fixed_recurrences,
    is_resting,
    latent_acceleration,
    latent_difference,
    token_stability,
)
from .outputs_recurrent import RecurrentGenerateOutput, WavefrontStep
from .session_recurrent import Session, choose_first, write_in_order
from .wavefront import Wavefront, of_width


@torch.no_grad()
def decode_diffusion_forcing(session: Session) -> RecurrentGenerateOutput:
    """Decodes every row of the session by the paper's algorithm 2, corrected."""
    parts, options, transcript, costs = session.parts, session.options, session.transcript, session.costs
    draw_noise = session.draw_gumbel if session.do_sample else None
    trace, is_in_order = [], session.scores.is_in_order

    first_ids = choose_first(session, session.prefill(is_filled=True))
    starts = [session.num_columns - pad for pad in session.pads]
    wavefront = Wavefront(starts, first_ids, session.device)
    while places := transcript.drop_ended():
        if len(places) < len(wavefront.starts):
            session.keep_rows(places)
            wavefront.keep_rows(places)
        before = copy.deepcopy(wavefront) if is_in_order else wavefront
        # 1. Add headway.
        room = [transcript.max_length - pad - start for pad, start in zip(session.pads, wavefront.starts, strict=True)]
        widest = wavefront.add_headway(options.headway, [min(options.max_wavefront, columns) for columns in room])
        width = session.parts.padded_width(widest, session.device)
        wavefront.fit(width, session.states.at, draw_noise)
        # 2. Embed, averaging with the previous step; recur; decode.
        window = parts.filled_window(wavefront.starts, width, session.cache)
        previous, states = wavefront.states, add_noise(wavefront, session)
        wavefront.embeds, wavefront.states, logits = parts.wavefront_step(
            wavefront.ids(width),
            states,
            window,
            wavefront.earlier_embeds(options.embedding_ema),
            options.inner_recurrence,
        )
        for _ in range(options.inner_recurrence):
            costs.add_core_pass(sum(wavefront.widths), session.rows)
        wavefront.add_recurrences(options.inner_recurrence)
        # 3. Predict a token for each position.
        scores, predicted = choose(session, wavefront, logits)
        change = measure_change(wavefront, previous, options.freeze_criterion)
        costs.add_step()
        # 4. Freeze. The only host sync.
        predicted_ids, changes = to_host(predicted, change, wavefront.widths)
        num_frozen, at_rest = freeze(wavefront, session, predicted_ids, changes)
        waiting = decide_in_order(session, wavefront, logits, predicted_ids, num_frozen) if is_in_order else []
        if options.record_wavefront and transcript.active[0] == 0:
            fed, ids = wavefront.fed_ids[0], predicted_ids[0]
            trace.append(WavefrontStep(wavefront.starts[0], fed, ids, num_frozen[0]))
        record_recurrences(wavefront, session)
        wavefront.advance(num_frozen, predicted_ids)
        wavefront.begin_anew(at_rest, options.max_recurrences)
        if not is_in_order:
            frozen_ids = [ids[:num] for ids, num in zip(predicted_ids, num_frozen, strict=True)]
            session.keep_steps(frozen_ids, logits, scores)
            transcript.write(frozen_ids)
        elif waiting:
            wavefront.repeat_step(before, waiting)
        session.show_draft(0, [*wavefront.fed_ids[0][1:], wavefront.next_ids[0]])
    return session.output(wavefront=trace if options.record_wavefront else None)


def add_noise(wavefront: Wavefront, session: Session) -> torch.Tensor:
    """States [A, W, E] mixed with fresh initial states in the shares of the schedule."""
    options, states = session.options, wavefront.states
    if not options.state_noise:
        return states
    counts = wavefront.filled(wavefront.counts, states.shape[1], states.dtype)
    kept, fresh = noise_share(options.noise_schedule, options.state_noise, counts, options.num_recurrences)
    live = [(row, place) for row, width in enumerate(wavefront.widths) for place in range(width)]
    rows, places = [row for row, _ in live], [place for _, place in live]
    positions = [wavefront.starts[row] + place for row, place in live]
    noise = torch.zeros_like(states)
    times = [wavefront.counts[row][place] for row, place in live]
    noise[rows, places] = session.states.noise(rows, positions, times)
    return kept * states + fresh * noise


def noise_share(
    schedule: str, state_noise: float, counts: torch.Tensor, num_recurrences: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [..., 1] of the state and of the fresh state, for positions with `counts` [...] recurrences."""
    shares: dict[str, Callable] = {
        "constant": lambda: torch.full_like(counts, state_noise),
        "dampened": lambda: state_noise / (1 + counts),
        "linear": lambda: state_noise * (1 - counts / num_recurrences).clamp(min=0),
        "sqrt": lambda: state_noise / (1 + counts),
    }
    share = shares[schedule]()[..., None]
    if schedule == "sqrt":
        return (1 - share).sqrt(), share.sqrt()
    return 1 - share, share


def choose(session: Session, wavefront: Wavefront, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Processed scores of [A, W, V] logits, and the tokens [A, W] that they predict."""
    if not session.is_prefix_free:
        session.transcript.write_undecided(wavefront.ids(logits.shape[1])[:, 1:])
    scores = session.draft_scores(logits)
    return scores, (scores if wavefront.noise is None else scores + wavefront.noise).argmax(dim=-1)


def measure_change(wavefront: Wavefront, previous: torch.Tensor, criterion: str) -> torch.Tensor | None:
    """[A, W] the change that the criterion compares with `exit_threshold`; None for criteria without states."""
    if criterion == "latent-difference":
        return latent_difference(wavefront.states, previous)
    if not criterion.startswith("latent-acceleration"):
        return None
    velocity, earlier = wavefront.states - previous, wavefront.velocity
    wavefront.velocity = velocity
    if earlier is None:
        return velocity.new_full(velocity.shape[:2], torch.inf)
    change = latent_acceleration(wavefront.states, velocity, of_width(earlier, velocity.shape[1]))
    return change.masked_fill(~wavefront.is_continued, torch.inf)


def to_host(
    predicted: torch.Tensor, change: torch.Tensor | None, widths: list[int]
) -> tuple[list[list[int]], list[list[float]]]:
    """Predictions and changes as lists of each row's width, in one transfer."""
    if change is None:
        rows = predicted.tolist()
        return [row[:width] for row, width in zip(rows, widths, strict=True)], [[] for _ in widths]
    ids, changes = torch.stack([predicted.double(), change.double()]).tolist()
    ids = [[int(token) for token in row[:width]] for row, width in zip(ids, widths, strict=True)]
    return ids, [row[:width] for row, width in zip(changes, widths, strict=True)]


def freeze(
    wavefront: Wavefront, session: Session, predicted_ids: list[list[int]], changes: list[list[float]]
) -> tuple[list[int], list[bool]]:
    """The number of tokens each row freezes, and whether its next first position has settled."""
    options = session.options
    criterion = options.freeze_criterion
    num_frozen, at_rest = [], []
    for row, ids in enumerate(predicted_ids):
        fed, ages = wavefront.fed_ids[row], wavefront.ages[row]
        is_final = [False] * len(fed)
        is_final[0] = wavefront.is_retried[row] and ages[0] >= options.num_recurrences
        if criterion == "token-stability":
            patience = options.num_recurrences // options.inner_recurrence
            is_settled = token_stability(wavefront.num_unchanged[row], patience)
        elif criterion == "fixed":
            is_settled = fixed_recurrences(ages, options.num_recurrences)
        else:
            has_former = [age > options.inner_recurrence for age in ages]  # an earlier state to compare with
            pairs = zip(changes[row], has_former, strict=True)
            is_settled = [change < options.exit_threshold and former for change, former in pairs]
        is_settled[0] = is_settled[0] and not wavefront.is_retried[row]
        is_exhausted = [age >= options.max_recurrences for age in ages]
        num = count_frozen(fed, ids, is_settled, is_exhausted, is_final, options.max_wavefront)
        num_frozen.append(num)
        at_rest.append(is_resting(fed, ids, is_settled if changes[row] else [True] * len(fed), num))
    return num_frozen, at_rest


def decide_in_order(
    session: Session,
    wavefront: Wavefront,
    logits: torch.Tensor,
    predicted_ids: list[list[int]],
    num_frozen: list[int],
) -> list[int]:
    """Writes the tokens that freeze, asking processors once a token, in order. Corrects both lists.

    Another token in place of a predicted one freezes too, and is the row's last of this step.

    Returns:
        The rows that repeat this step, since they wait for other rows to write the rest of their tokens.
    """
    drafts = [ids[:num] for ids, num in zip(predicted_ids, num_frozen, strict=True)]
    written = write_in_order(session, logits, wavefront.starts, drafts, wavefront.num_done)
    waiting = []
    for row, ids in enumerate(written):
        num_done = wavefront.num_done[row] + len(ids)
        predicted_ids[row][wavefront.num_done[row] : num_done] = ids
        is_whole = predicted_ids[row][:num_done] == drafts[row][:num_done]
        if is_whole and num_done < num_frozen[row]:
            waiting.append(row)
            wavefront.num_done[row] = num_done
        else:
            wavefront.num_done[row], num_frozen[row] = 0, num_done
    return waiting


def record_recurrences(wavefront: Wavefront, session: Session) -> None:
    """Records each position's recurrences so far for the statistics."""
    for place, row in enumerate(session.transcript.active):
        first = session.place_of(place, wavefront.starts[place])
        session.costs.recurrences[row].update(enumerate(wavefront.counts[place], first))
