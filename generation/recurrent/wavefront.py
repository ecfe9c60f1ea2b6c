"""The wavefront: the positions begun and not frozen, of every row still being written.

A rows, W wavefront positions (of the widest row; narrower rows are padded), E channels, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch

LISTS = ("starts", "fed_ids", "counts", "ages", "num_unchanged", "num_seen", "is_retried", "next_ids")
TENSORS = ("states", "embeds", "noise", "velocity")


class Wavefront:
    """The state of every wavefront position between decode steps.

    Position 0 of a row is its last frozen token, whose state predicts the first unfrozen one. The host stores ids and
    counts, the device states and embeddings. A step transfers only the new ids and two flags per position.

    Attributes:
        starts: the place of each row's position 0 in its row, counting the prompt.
        fed_ids: input tokens of the positions, one list per row.
        counts: recurrences of each position, one list per row.
        ages: recurrences of each position's state; 0 if it must start, for a new token or a retry.
        num_unchanged: decode steps for which each position's token has not changed.
        states: [A, W, E].
        embeds: [A, W, E] the averaged prelude outputs of the previous step, None before the first.
        velocity: [A, W, E] the change of the states in the previous step, None before the first.
        noise: [A, W, V] the noise that sampling adds to the scores, drawn once per position.
        num_seen: positions of each row that took part in the previous step.
        is_continued: [A, W] whether a position's state in this step continues from the previous one.
        is_retried: whether each row's position 0 is being retried.
        num_done: tokens of each row that were written in a step that it repeats.
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
        self.num_done = [0] * len(starts)
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
        """Starts up to `headway` positions per row within its limit. Returns the width of the widest row.

        All new positions get the last predicted token, for want of a better guess.
        """
        for row, limit in enumerate(limits):
            num_new = min(headway, limit - len(self.fed_ids[row])) if self.num_seen[row] else 0
            num_new = max(num_new, 1 - len(self.fed_ids[row]))
            self.fed_ids[row] += [self.next_ids[row]] * num_new
            for numbers in (self.counts[row], self.ages[row], self.num_unchanged[row]):
                numbers += [0] * num_new
        return max(self.widths)

    def fit(self, width: int, draw_states: Callable, draw_noise: Callable | None) -> None:
        """Resizes the tensors to `width` positions. Draws states, [n, ...], of starting positions and noise of new
        ones."""
        self.is_continued = self.filled([[age > 0 for age in ages] for ages in self.ages], width, torch.bool)
        begun = [(row, place) for row, ages in enumerate(self.ages) for place, age in enumerate(ages) if not age]
        self.states = self._drawn(self.states, begun, width, draw_states)
        if draw_noise is not None:
            new = [(row, place) for row, place in begun if place >= self.num_seen[row]]
            self.noise = self._drawn(self.noise, new, width, draw_noise)

    def _drawn(
        self, tensor: torch.Tensor | None, places: list[tuple[int, int]], width: int, draw: Callable
    ) -> torch.Tensor:
        """The tensor, [A, width, ...], with new draws at (row, place) pairs."""
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
        """[A, W] the input tokens, 0 where a row is narrower."""
        return torch.tensor([ids + [0] * (width - len(ids)) for ids in self.fed_ids], device=self.device)

    def filled(self, numbers: list[list[int]], width: int, dtype: torch.dtype) -> torch.Tensor:
        """[A, W] from one list per row, 0 where a row is narrower."""
        rows = [row + [0] * (width - len(row)) for row in numbers]
        return torch.tensor(rows, device=self.device, dtype=dtype)

    def earlier_embeds(self, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The previous step's embeddings [A, W, E], and their weights [A, W, 1]: `share` where a position continues."""
        assert self.states is not None
        old = torch.zeros_like(self.states) if self.embeds is None else of_width(self.embeds, self.states.shape[1])
        return old, (share * self.is_continued[..., None]).to(old.dtype)

    def add_recurrences(self, num: int) -> None:
        """Adds `num` recurrences to every position's counts."""
        self.counts = [[count + num for count in counts] for counts in self.counts]
        self.ages = [[age + num for age in ages] for ages in self.ages]

    def advance(self, num_frozen: list[int], predicted_ids: list[list[int]]) -> None:
        """Removes each row's first `num_frozen` positions and sets the others' input tokens to the predictions."""
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
        """Restarts a row's position 0 from its initial state if it has used up its recurrences without settling."""
        for row, rests in enumerate(at_rest):
            is_exhausted = bool(self.ages[row]) and self.ages[row][0] >= max_recurrences
            if is_exhausted and not rests and not self.is_retried[row]:
                self.is_retried[row], self.ages[row][0] = True, 0

    def _shift(self, num_frozen: list[int]) -> None:
        """Shifts each row's positions left. Positions to their right restart before they are read."""
        if not any(num_frozen):
            return
        is_even = min(num_frozen) == max(num_frozen)
        from_places = torch.tensor(num_frozen, device=self.device)[:, None, None]
        for name in TENSORS:
            tensor = getattr(self, name)
            if tensor is not None and is_even:
                setattr(self, name, tensor.roll(-num_frozen[0], dims=1))
            elif tensor is not None:
                places = torch.arange(tensor.shape[1], device=self.device)[:, None] + from_places
                setattr(self, name, tensor.take_along_dim(places.clamp_(max=tensor.shape[1] - 1), dim=1))

    def keep_rows(self, places: list[int]) -> None:
        """Keeps the rows at `places` and drops the rest."""
        for name in (*LISTS, "num_done"):
            setattr(self, name, [getattr(self, name)[place] for place in places])
        for name in TENSORS:
            tensor = getattr(self, name)
            setattr(self, name, tensor if tensor is None else tensor[places])

    def repeat_step(self, before: "Wavefront", rows: list[int]) -> None:
        """Puts rows back to what they were before a step."""
        for name in LISTS:
            for row in rows:
                getattr(self, name)[row] = getattr(before, name)[row]
        for name in TENSORS:
            if (tensor := getattr(before, name)) is not None:
                getattr(self, name)[rows] = of_width(tensor, getattr(self, name).shape[1])[rows]


def wavefront_step(
    parts: Any,
    input_ids: torch.Tensor,
    latent_states: torch.Tensor,
    window: Any,
    earlier: tuple[torch.Tensor, torch.Tensor],
    num_steps: int,
) -> tuple[torch.Tensor, ...]:
    """Embeds tokens, averages with earlier embeddings, recurs and decodes.

    Args:
        parts: a model, or `StaticParts`.
        input_ids: [A, T].
        latent_states: [A, T, E].
        earlier: embeddings [A, T, E] of the step before, and their weights [A, T, 1].

    Returns:
        averaged embeddings [A, T, E], states [A, T, E] after `num_steps` core steps, their fp32 logits [A, T, V].
    """
    embeds = torch.lerp(parts.prelude(input_ids, window), *earlier)
    states = parts.core_steps(latent_states, embeds, window, num_steps)
    return embeds, states, parts.coda(states, window)


def of_width(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """The [A, W, ...] tensor cut or zero-padded to a width.

    `pad` would keep the strides of a single row it cuts, and code is compiled for strides.
    """
    if tensor.shape[1] == width:
        return tensor
    fitted = tensor.new_zeros(len(tensor), width, *tensor.shape[2:])
    kept = min(width, tensor.shape[1])
    fitted[:, :kept] = tensor[:, :kept]
    return fitted
