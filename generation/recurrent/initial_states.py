"""The states that tokens begin with, in one decode: functions of a row's seed and a position.

A rows, T and n tokens, E channels.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .draws_recurrent import STATE, STATE_NOISE, Draws, hash_of

AHEAD = 32  # states drawn at once: as dear as one, since each operation on small tensors costs a call


class InitialStates:
    """Draws initial states of the rows still being written.

    Attributes:
        like: [1, 1, E], of the device and dtype of states.
        ahead: by seed, purpose and time of a draw, a position and the states [AHEAD, E] from there on.
    """

    def __init__(self, model: Any, init_scale: float, draws: Draws, dtype: torch.dtype):
        self.model, self.init_scale, self.draws = model, init_scale, draws
        self.like = torch.empty(1, 1, model.config.n_embd, dtype=dtype, device=draws.device)
        self.ahead: dict[tuple[int, int, int], tuple[int, Sequence[torch.Tensor]]] = {}

    def of(self, embeds: torch.Tensor, starts: list[int], seeds: list[int] | None = None) -> torch.Tensor:
        """[A, T, E] states of the tokens from the positions `starts` on, with prelude outputs `embeds`.

        `seeds` defaults to those of the rows still being written.
        """
        if not self.init_scale:
            return self.model.initial_states(embeds, 0.0)
        if seeds is None and embeds.shape[1] == 1 and self.model.reinjects_input:
            return self.at(range(len(starts)), starts)[:, None]
        rows = zip(self.draws.seeds if seeds is None else seeds, starts, strict=True)
        hashed = [[hash_of(seed, STATE, start + i, 0) for i in range(embeds.shape[1])] for seed, start in rows]
        return self.model.initial_states(embeds, self.init_scale, hashes=self._on_device(hashed))

    def packed(self, embeds: torch.Tensor, rows: list[int], positions: list[int]) -> torch.Tensor:
        """[n, 1, E] states of single tokens with prelude outputs `embeds`."""
        hashes = self.draws.hashes(STATE, rows, positions)[:, None]
        return self.model.initial_states(embeds, self.init_scale, hashes=hashes)

    def at(self, rows: Sequence[int], positions: list[int]) -> torch.Tensor:
        """[n, E] states of positions, whatever their input token (for models that read tokens at each recurrence)."""
        return self._drawn(STATE, rows, positions, [0] * len(positions))

    def noise(self, rows: Sequence[int], positions: list[int], times: list[int]) -> torch.Tensor:
        """[n, E] fresh states to mix with those of positions, others each time."""
        return self._drawn(STATE_NOISE, rows, positions, times)

    def _drawn(self, purpose: int, rows: Sequence[int], positions: list[int], times: list[int]) -> torch.Tensor:
        states = []
        for row, position, time in zip(rows, positions, times, strict=True):
            key = seed, _, _ = self.draws.seeds[row], purpose, time
            first, drawn = self.ahead.get(key, (0, ()))
            if not first <= position < first + len(drawn):
                first, like = position, self.like.expand(1, AHEAD, -1)
                hashes = self._on_device([[hash_of(seed, purpose, first + i, time) for i in range(AHEAD)]])
                (drawn,) = self.model.initial_states(like, self.init_scale, hashes=hashes)
                self.ahead[key] = first, drawn
            states.append(drawn[position - first])
        return torch.stack(states)

    def _on_device(self, hashed: list[list[int]]) -> torch.Tensor:
        return torch.tensor(hashed, device=self.draws.device)
