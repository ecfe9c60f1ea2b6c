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
        ages: recurrences each position's state has had; 0 where it is to begin: its token is new to it, or it is tried
            again.
        num_unchanged: decode steps for which each position's token has stood.
        states: [A, W, E].
        embeds: [A, W, E] the averaged prelude outputs of the step before, None before the first.
        velocity: [A, W, E] how the step before moved the states, None before the first.
        noise: [A, W, V] what sampling adds to the scores a position predicts by; drawn once a position.
        num_seen: positions of each row that took part in the step before.
        is_continued: [A, W] whether a position's state goes on from the step before; of the step under way.
        is_retried: whether each row's position 0 is tried again.
    """

    def __init__(self, starts: list[int], first_ids: list[int], device: torch.device):
        self.device = device
        self.starts = starts
        self.fed_ids = [[token] for token in first_ids]
        self.counts = [[0] for _ in starts]
        self.ages = [[0] for _ in starts]
        self.num_unchanged = [[0] for _ in starts]
        self.num_seen = [0] * len(starts)
        self.is_retried = [False] * len(starts)
        self.states: torch.Tensor | None = None
        self.embeds: torch.Tensor | None = None
        self.velocity: torch.Tensor | None = None
        self.noise: torch.Tensor | None = None
        self.is_continued: torch.Tensor
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
        """Makes the tensors `width` positions wide. States, [n, ...], are drawn for those that begin, and noise for
        those that are new."""
        self.is_continued = self.filled([[age > 0 for age in ages] for ages in self.ages], width, torch.bool)
        begun = [(row, place) for row, ages in enumerate(self.ages) for place, age in enumerate(ages) if not age]
        self.states = self._drawn(self.states, begun, width, draw_states)
        if draw_noise is not None:
            new = [(row, place) for row, place in begun if place >= self.num_seen[row]]
            self.noise = self._drawn(self.noise, new, width, draw_noise)

    def _drawn(
        self, tensor: torch.Tensor | None, places: list[tuple[int, int]], width: int, draw: Callable
    ) -> torch.Tensor:
        """The tensor, [A, width, ...], with what is drawn at (row, place) pairs."""
        if not places:
            assert tensor is not None
            return of_width(tensor, width)
        rows, columns = [row for row, _ in places], [place for _, place in places]
        drawn = draw(rows, [self.starts[row] + place for row, place in places])
        tensor = drawn.new_zeros(len(self.starts), width, drawn.shape[-1]) if tensor is None else tensor
        tensor = of_width(tensor, width)
        tensor[torch.tensor(rows, device=self.device), torch.tensor(columns, device=self.device)] = drawn
        return tensor

    def ids(self, width: int) -> torch.Tensor:
        """[A, W] the tokens fed, 0 where a row is narrower."""
        return torch.tensor([ids + [0] * (width - len(ids)) for ids in self.fed_ids], device=self.device)

    def filled(self, numbers: list[list[int]], width: int, dtype: torch.dtype) -> torch.Tensor:
        """[A, W] of a list a row, 0 where a row is narrower."""
        rows = [row + [0] * (width - len(row)) for row in numbers]
        return torch.tensor(rows, device=self.device, dtype=dtype)

    def average_embeds(self, embeds: torch.Tensor, share: float) -> torch.Tensor:
        """Mixes [A, W, E] prelude outputs with those of the step before, at the positions that go on from it."""
        if share and self.embeds is not None:
            old = of_width(self.embeds, embeds.shape[1])
            embeds = torch.lerp(embeds, torch.where(self.is_continued[..., None], old, embeds), share)
        self.embeds = embeds
        return embeds

    def add_recurrences(self, num: int) -> None:
        """Counts `num` more recurrences of every position."""
        self.counts = [[count + num for count in counts] for counts in self.counts]
        self.ages = [[age + num for age in ages] for ages in self.ages]

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
            self.is_retried[row] &= not num
        self.next_ids = [ids[-1] for ids in predicted_ids]
        self._shift(num_frozen)

    def begin_anew(self, at_rest: list[bool], max_recurrences: int) -> None:
        """Tries a row's position 0 again from its initial state where it has had its recurrences and is not at rest."""
        for row, rests in enumerate(at_rest):
            is_exhausted = bool(self.ages[row]) and self.ages[row][0] >= max_recurrences
            if is_exhausted and not rests and not self.is_retried[row]:
                self.is_retried[row], self.ages[row][0] = True, 0

    def _shift(self, num_frozen: list[int]) -> None:
        """Moves each row's positions to the left. What stands after them is begun before it is read."""
        if not any(num_frozen):
            return
        is_even = min(num_frozen) == max(num_frozen)
        from_places = torch.tensor(num_frozen, device=self.device)[:, None, None]
        for name in ("states", "embeds", "noise", "velocity"):
            tensor = getattr(self, name)
            if tensor is not None and is_even:
                setattr(self, name, tensor.roll(-num_frozen[0], dims=1))
            elif tensor is not None:
                places = torch.arange(tensor.shape[1], device=self.device)[:, None] + from_places
                setattr(self, name, tensor.take_along_dim(places.clamp_(max=tensor.shape[1] - 1), dim=1))

    def keep_rows(self, places: list[int]) -> None:
        """Keeps the rows at `places`, drops the rest."""
        for name in ("starts", "fed_ids", "counts", "ages", "num_unchanged", "num_seen", "is_retried", "next_ids"):
            setattr(self, name, [getattr(self, name)[place] for place in places])
        for name in ("states", "embeds", "noise", "velocity"):
            tensor = getattr(self, name)
            setattr(self, name, tensor if tensor is None else tensor[places])


def of_width(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """The [A, W, ...] tensor cut, or filled up with zeros, to a width."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, width - tensor.shape[1])) if tensor.shape[1] != width else tensor
