"""The exact wavefront: shallow drafts, full-depth verification, the text of full-depth decoding (arXiv 2609.17184).

Every position has a depth, and keys and values of each depth in the cache, so its trajectory equals that of plain
decoding. At each draft depth a position (re)writes the token after it, which starts or restarts the next position. At
full depth a position decides that token. When sampling, rejection sampling revises the token, so at each depth the
token has the distribution that this depth predicts. When greedy, the token is the likeliest of that depth.

N live positions of all rows together, E channels, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..acceptance import sample
from ..processed_scores import refuse_none_allowed
from .draws_recurrent import ACCEPTANCE, REPLACEMENT
from .outputs_recurrent import RecurrentGenerateOutput, WavefrontStep
from .rejection import accept_by_rejection, residual_probs
from .session_recurrent import Session, choose_first


@dataclass(eq=False)
class Branch:
    """A live position: its input token, its depth, and the token it has written after itself."""

    position: int
    token: int
    depth: int = 0
    next_id: int | None = None
    next_probs: torch.Tensor | None = None  # [V] distribution of next_id, when sampling


class Chains:
    """The live positions of each row, and their packed states: row after row, each from right to left (rising depth).

    Attributes:
        roots: (position, token) of each row's last decided token.
        rows: the branches of each row.
        states, embeds: [N, 1, E] of all branches, in the order of `packed`.
        window: the cache window of all branches.
        waiting: where processors are asked in order, the logits [V] of rows whose first position is at full depth. They
            rest until all rows wait.
    """

    def __init__(self, session: Session, first_ids: list[int]):
        self.session = session
        self.roots = [(session.num_columns - pad, token) for pad, token in zip(session.pads, first_ids, strict=True)]
        self.rows: list[list[Branch]] = [[] for _ in first_ids]
        self.packed: list[tuple[int, Branch]] = []
        self.window: Any = None
        self.waiting: dict[int, torch.Tensor] = {}
        self.states = self.embeds = torch.empty(
            0, 1, session.model.config.n_embd, dtype=session.model.dtype, device=session.device
        )

    def keep_rows(self, places: list[int]) -> None:
        """Keeps the rows at `places`."""
        self.roots = [self.roots[place] for place in places]
        self.rows = [self.rows[place] for place in places]

    def begin(self) -> None:
        """Starts the next position of each row if its token exists and can affect the text, then repacks."""
        begun = [(row, Branch(*place)) for row, place in self._next_places()]
        for row, branch in begun:
            self.rows[row].append(branch)
        where = {id(branch): i for i, (_, branch) in enumerate([*self.packed, *begun])}
        packed = [(row, branch) for row, branches in enumerate(self.rows) for branch in reversed(branches)]
        index = [where[id(branch)] for _, branch in packed]
        if begun:
            window = self._window(begun)
            ids = torch.tensor([[branch.token] for _, branch in begun], device=self.session.device)
            embeds = self.session.model.prelude(ids, window)
            rows, positions = [row for row, _ in begun], [branch.position for _, branch in begun]
            states = self.session.states.packed(embeds, rows, positions)
            self.embeds, self.states = torch.cat([self.embeds, embeds]), torch.cat([self.states, states])
        if index != list(range(len(self.states))):
            self.embeds, self.states = self.embeds[index], self.states[index]
        if begun or packed != self.packed:
            self.packed, self.window = packed, self._window(packed)

    def _next_places(self) -> Iterator[tuple[int, tuple[int, int]]]:
        transcript, options = self.session.transcript, self.session.options
        for row, branches in enumerate(self.rows):
            if row in self.waiting:
                continue
            if not branches:
                yield row, self.roots[row]
                continue
            tail = branches[-1]
            column = tail.position + 1 + self.session.pads[row]
            is_needed = tail.next_id not in transcript.eos_token_ids and column < transcript.max_length - 1
            if tail.next_id is not None and is_needed and len(branches) < options.max_wavefront:
                yield row, (tail.position + 1, tail.next_id)

    def _window(self, branches: list[tuple[int, Branch]]) -> Any:
        rows, positions = [row for row, _ in branches], [branch.position for _, branch in branches]
        return self.session.model.packed_window(rows, positions, self.session.cache)

    def recur(self) -> None:
        """One recurrence of every live position, each at its own depth."""
        index = [i for i, (row, _) in enumerate(self.packed) if row not in self.waiting]
        moving = [self.packed[i] for i in index]
        for row, branch in moving:
            branch.depth += 1
            self.session.costs.add_recurrence(
                self.session.transcript.active[row], self.session.place_of(row, branch.position)
            )
        window = self._window(moving) if self.waiting else self.window
        window = window.at([branch.depth for _, branch in moving])
        self.states[index] = self.session.model.core_step(self.states[index], self.embeds[index], window)
        rows = [batch_row for row, batch_row in enumerate(self.session.rows) if row not in self.waiting]
        self.session.costs.add_core_pass(len(moving), rows)

    def decode(self, depths: set[int]) -> tuple[list[tuple[int, Branch]], torch.Tensor | None]:
        """The branches at one of `depths`, and the logits [n, V] after them."""
        packed = enumerate(self.packed)
        index = [i for i, (row, branch) in packed if branch.depth in depths and row not in self.waiting]
        if not index:
            return [], None
        due = [self.packed[i] for i in index]
        if len(due) == len(self.packed):
            return due, self.session.model.coda(self.states, self.window)[:, 0]
        return due, self.session.model.coda(self.states[index], self._window(due))[:, 0]


@torch.no_grad()
def decode_exact(session: Session) -> RecurrentGenerateOutput:
    """Decodes every row of the session."""
    transcript, options, costs = session.transcript, session.options, session.costs
    full_depth = options.num_recurrences
    decode_depths = {*options.draft_recurrences, full_depth}
    trace = []

    chains = Chains(session, choose_first(session, session.prefill()))
    while places := transcript.drop_ended():
        if len(places) < len(chains.rows):
            session.keep_rows(places)
            chains.keep_rows(places)
        # 1. Start a position after each newly written token.  2. Recur, each position at its own depth.
        chains.begin()
        chains.recur()
        # 3. Decode the positions that have reached a draft depth, or full depth.
        due, logits = chains.decode(decode_depths)
        if due and session.scores.is_in_order:
            due, logits = await_all_rows(chains, due, logits, full_depth)
        if not due:
            continue
        costs.add_step()
        # 4. Write the tokens after them. The only host sync.
        scores = processed(session, due, logits, full_depth)
        written = write_greedily(due, scores) if not session.do_sample else write_sampled(session, due, scores)
        # 5. Decide tokens written at full depth; prune positions after a changed token.
        if options.record_wavefront and transcript.active[0] == 0:
            trace.append(snapshot(chains.rows[0]))
        frozen_ids = [decide(chains, row, written, full_depth) for row in range(len(chains.rows))]
        if options.record_wavefront and transcript.active[0] == 0:
            trace[-1].num_frozen = len(frozen_ids[0])
        keep_steps(session, due, logits, scores, frozen_ids, full_depth)
        transcript.write(frozen_ids)
        session.show_draft(0, [branch.next_id for branch in chains.rows[0] if branch.next_id is not None])
    return session.output(wavefront=trace if options.record_wavefront else None)


def write_greedily(due: list[tuple[int, Branch]], scores: torch.Tensor) -> dict[Branch, int]:
    """The likeliest token after each branch that is due, by [n, V] scores."""
    ids = scores.argmax(dim=-1).tolist()
    return {branch: token for (_, branch), token in zip(due, ids, strict=True)}


def write_sampled(session: Session, due: list[tuple[int, Branch]], scores: torch.Tensor) -> dict[Branch, int]:
    """A sampled token after each branch that is due: the earlier one if accepted (arXiv 2211.17192)."""
    probs = scores.softmax(dim=-1)
    nothing = torch.zeros_like(probs[0])
    old_probs = torch.stack([nothing if branch.next_probs is None else branch.next_probs for _, branch in due])
    old_ids = torch.tensor([[0, branch.next_id or 0] for _, branch in due], device=session.device)
    twice = probs[:, None].expand(-1, 2, -1)  # verified as drafts of one token each
    # A restarted position repeats its draws at each depth. The text stays unbiased, since choices from the discarded
    # token are gone.
    rows, branches = zip(*due, strict=True)
    key = list(rows), [branch.position for branch in branches], [branch.depth for branch in branches]
    stands = accept_by_rejection(old_ids, twice, old_probs[:, None], session.draws.uniform(ACCEPTANCE, *key)[:, None])
    fresh = residual_probs(twice, old_probs[:, None], torch.ones_like(old_ids[:, 0]))
    drawn = sample(fresh, session.draws.uniform(REPLACEMENT, *key))
    has_old = torch.tensor([branch.next_id is not None for _, branch in due], device=session.device)
    ids = torch.where((stands == 2) & has_old, old_ids[:, 1], drawn).tolist()
    for (_, branch), own_probs in zip(due, probs, strict=True):
        branch.next_probs = own_probs
    return {branch: token for (_, branch), token in zip(due, ids, strict=True)}


def await_all_rows(
    chains: Chains, due: list[tuple[int, Branch]], logits: torch.Tensor, full_depth: int
) -> tuple[list[tuple[int, Branch]], torch.Tensor]:
    """The branches that are due, and logits [n, V]: at full depth those of all rows, or none."""
    drafts = [i for i, (_, branch) in enumerate(due) if branch.depth < full_depth]
    chains.waiting |= {row: logits[i] for i, (row, _) in enumerate(due) if i not in drafts}
    due, logits = [due[i] for i in drafts], logits[drafts]
    if len(chains.waiting) == len(chains.rows):
        due += [(row, branches[0]) for row, branches in enumerate(chains.rows)]
        logits = torch.cat([logits, torch.stack([chains.waiting[row] for row in range(len(chains.rows))])])
        chains.waiting = {}
    return due, logits


def processed(session: Session, due: list[tuple[int, Branch]], logits: torch.Tensor, full_depth: int) -> torch.Tensor:
    """[n, V] scores, each processed with its own prefix of decided and drafted tokens."""
    columns = [branch.position + 1 + session.pads[row] for row, branch in due]
    scores = session.process_packed(logits, [row for row, _ in due], columns)
    is_decided = [branch.depth == full_depth for _, branch in due]
    if session.scores.is_in_order and any(is_decided):
        scores = scores.clone()
        scores[is_decided] = session.scores(logits[is_decided][:, None])[:, 0]
    if session.do_sample and any(is_decided):
        refuse_none_allowed(scores[is_decided], session.scores)
    return scores


def keep_steps(
    session: Session,
    due: list[tuple[int, Branch]],
    logits: torch.Tensor,
    scores: torch.Tensor,
    frozen_ids: list[list[int]],
    full_depth: int,
) -> None:
    """Records the logits and scores of the frozen tokens, if requested."""
    if session.steps is not None:
        places = {row: i for i, (row, branch) in enumerate(due) if branch.depth == full_depth}
        for row, ids in enumerate(frozen_ids):
            if ids:
                session.steps.add(session.rows[row], logits[places[row]][None], scores[places[row]][None])


def decide(chains: Chains, row: int, written: dict[Branch, int], full_depth: int) -> list[int]:
    """Applies the tokens written by one row's branches, from the left. Returns the token its first one decided."""
    branches = chains.rows[row]
    for place, branch in enumerate(branches):
        if branch not in written:
            continue
        has_changed = branch.next_id != written[branch]
        branch.next_id = written[branch]
        chains.session.write_draft(row, branch.position + 1, branch.next_id)
        if has_changed:
            del branches[place + 1 :]
            break
    first = branches[0]
    if first.depth < full_depth or first not in written:
        return []
    chains.roots[row] = first.position + 1, first.next_id
    del branches[0]
    return [first.next_id]


def snapshot(branches: list[Branch]) -> WavefrontStep:
    """The row's wavefront before this decode is applied."""
    ids = [branch.token for branch in branches]
    tail = branches[-1].next_id
    return WavefrontStep(branches[0].position, ids, ids[1:] + ([] if tail is None else [tail]), 0)
