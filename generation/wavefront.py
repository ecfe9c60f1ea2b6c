"""The wavefront: positions begun and not frozen, of every row that is still being written.

A rows, W wavefront positions (the widest row's; narrower rows are filled up), E channels, V vocabulary.
"""

from collections.abc import Callable

import torch


class Wavefront:
    """What each position of the wavefront carries from one decode step to the next.

    Position 0 of a row holds its last frozen token, whose state predicts the first token that is not. The host keeps
    what decides (ids, counts), the device what is computed (states, embeddings); a step moves nothing but the new ids
    and two flags a position between them.

    Attributes:
        starts: position in its row, prompt included, of each row's position 0.
        fed_ids: the tokens the positions hold, a list a row.
        counts: recurrences each position has had, a list a row.
        ages: recurrences each position has had since its token last changed.
        num_unchanged: decode steps for which each position's token has stood.
        states: [A, W, E].
        embeds: [A, W, E] the averaged prelude outputs of the step before, None before the first.
        velocity: [A, W, E] how the step before moved the states, None before the first.
        noise: [A, W, V] what sampling adds to the scores a position predicts by; drawn once a position.
        num_seen: positions of each row that took part in the step before.
        retries: recurrences each row's position 0 has had since it was begun anew, None where it was not.
    """

    def __init__(self, starts: list[int], first_ids: list[int], device: torch.device):
        self.device = device
        self.starts = starts
        self.fed_ids = [[token] for token in first_ids]
        self.counts = [[0] for _ in starts]
        self.ages = [[0] for _ in starts]
        self.num_unchanged = [[0] for _ in starts]
        self.num_seen = [0] * len(starts)
        self.retries: list[int | None] = [None] * len(starts)
        self.states: torch.Tensor | None = None
        self.embeds: torch.Tensor | None = None
        self.velocity: torch.Tensor | None = None
        self.noise: torch.Tensor | None = None
        self.next_ids = list(first_ids)

    @property
    def widths(self) -> list[int]:
        """Positions of each row."""
        return [len(ids) for ids in self.fed_ids]

    def add_headway(self, headway: int, limits: list[int]) -> int:
        """Begins `headway` positions a row, as far as its limit allows. Returns the widest row's width.

        A new position is fed the token last predicted; positions beyond it hold the same, for want of a better guess.
        """
        for row, limit in enumerate(limits):
            num_new = min(headway, limit - len(self.fed_ids[row])) if self.num_seen[row] else 0
            num_new = max(num_new, 1 - len(self.fed_ids[row]))
            self.fed_ids[row] += [self.next_ids[row]] * num_new
            for numbers in (self.counts[row], self.ages[row], self.num_unchanged[row]):
                numbers += [0] * num_new
        return max(self.widths)

    def fit(self, width: int, draw_states: Callable, draw_noise: Callable | None) -> None:
        """Widens the tensors to `width` positions. States and noise, [n, ...], are drawn for those that begin."""
        begun = [(row, place) for row, end in enumerate(self.widths) for place in range(self.num_seen[row], end)]
        begun += [(row, 0) for row, retried in enumerate(self.retries) if retried == 0]
        rows, positions = [row for row, _ in begun], [self.starts[row] + place for row, place in begun]
        index = torch.tensor(begun, device=self.device).view(-1, 2).unbind(1)
        for name, draw in (("states", draw_states), ("noise", draw_noise)):
            if draw is None:
                continue
            old, drawn = getattr(self, name), draw(rows, positions) if begun else None
            have = 0 if old is None else old.shape[1]
            if have < width:
                like = drawn if old is None else old
                filling = like.new_zeros(len(self.starts), width - have, like.shape[-1])
                old = filling if old is None else torch.cat([old, filling], dim=1)
            if begun:
                old[index] = drawn
            setattr(self, name, old)

    def is_seen(self, width: int) -> torch.Tensor:
        """[A, W] whether a position took part in the step before."""
        return torch.arange(width, device=self.device) < torch.tensor(self.num_seen, device=self.device)[:, None]

    def ids(self, width: int) -> torch.Tensor:
        """[A, W] the tokens fed, 0 where a row is narrower."""
        return torch.tensor([ids + [0] * (width - len(ids)) for ids in self.fed_ids], device=self.device)

    def filled(self, numbers: list[list[int]], width: int) -> torch.Tensor:
        """[A, W] of a list a row, 0 where a row is narrower, as states take them."""
        rows = [row + [0] * (width - len(row)) for row in numbers]
        assert self.states is not None
        return torch.tensor(rows, device=self.device, dtype=self.states.dtype)

    def average_embeds(self, embeds: torch.Tensor, share: float) -> torch.Tensor:
        """Mixes [A, W, E] prelude outputs with those of the step before, at the positions that had one."""
        if share and self.embeds is not None:
            width = embeds.shape[1]  # all of it, so that what a position comes to does not depend on how many were seen
            old = torch.nn.functional.pad(self.embeds, (0, 0, 0, width - self.embeds.shape[1]))
            embeds = torch.lerp(embeds, torch.where(self.is_seen(width)[..., None], old, embeds), share)
        self.embeds = embeds
        return embeds

    def add_recurrences(self, num: int) -> None:
        """Counts `num` more recurrences of every position."""
        self.counts = [[count + num for count in counts] for counts in self.counts]
        self.ages = [[age + num for age in ages] for ages in self.ages]
        self.retries = [None if retried is None else retried + num for retried in self.retries]

    def advance(self, num_frozen: list[int], predicted_ids: list[list[int]]) -> None:
        """Lets go of each row's first `num_frozen` positions and feeds the others what is now predicted for them."""
        for row, num in enumerate(num_frozen):
            new_ids = [*self.fed_ids[row][:1], *predicted_ids[row]][: len(self.fed_ids[row])]
            pairs = list(zip(self.fed_ids[row], new_ids, strict=True))
            ages = [age if old == new else 0 for age, (old, new) in zip(self.ages[row], pairs, strict=True)]
            steps = [n + 1 if old == new else 0 for n, (old, new) in zip(self.num_unchanged[row], pairs, strict=True)]
            self.fed_ids[row], self.ages[row], self.num_unchanged[row] = new_ids[num:], ages[num:], steps[num:]
            self.counts[row] = self.counts[row][num:]
            self.num_seen[row] = len(self.fed_ids[row])
            self.starts[row] += num
            self.retries[row] = None if num else self.retries[row]
        self.next_ids = [ids[-1] for ids in predicted_ids]
        self._shift(num_frozen)

    def begin_anew(self, at_rest: list[bool], max_recurrences: int) -> None:
        """Gives a row's position 0 its initial state again, where it has had its recurrences and is not at rest."""
        for row, rests in enumerate(at_rest):
            is_exhausted = bool(self.ages[row]) and self.ages[row][0] >= max_recurrences
            if is_exhausted and not rests and self.retries[row] is None:
                self.retries[row] = 0

    def _shift(self, num_frozen: list[int]) -> None:
        kept = max(self.num_seen)
        names = ("states", "embeds", "noise", "velocity")
        if not any(num_frozen):
            moved = {name: getattr(self, name) for name in names}
        elif min(num_frozen) == max(num_frozen):
            moved = {name: _slice(getattr(self, name), num_frozen[0]) for name in names}
        else:
            index = torch.tensor(num_frozen, device=self.device)[:, None] + torch.arange(kept, device=self.device)
            index = index.clamp(max=self.states.shape[1] - 1)[..., None]
            moved = {name: _take(getattr(self, name), index) for name in names}
        for name, tensor in moved.items():
            setattr(self, name, tensor if tensor is None else tensor[:, :kept])

    def keep_rows(self, places: list[int]) -> None:
        """Keeps the rows at `places`, drops the rest."""
        for name in ("starts", "fed_ids", "counts", "ages", "num_unchanged", "num_seen", "retries", "next_ids"):
            setattr(self, name, [getattr(self, name)[place] for place in places])
        kept = max(self.num_seen)  # the widest row may be gone
        for name in ("states", "embeds", "noise", "velocity"):
            tensor = getattr(self, name)
            setattr(self, name, tensor if tensor is None else tensor[places, :kept])


def _slice(tensor: torch.Tensor | None, start: int) -> torch.Tensor | None:
    return None if tensor is None else tensor[:, start:]


def _take(tensor: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor.take_along_dim(index.clamp(max=tensor.shape[1] - 1), dim=1)
