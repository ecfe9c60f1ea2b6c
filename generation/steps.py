"""The logits and processed scores by which each token was decided, for callers who ask for them.

B rows, n tokens, V vocabulary.
"""

from typing import Any

import torch


class Steps:
    """Keeps them row by row, since rows are decided at paces of their own.

    Attributes:
        has_logits, has_scores: which of them was asked for.
        rows: for each row, a pair of [V] for each new token.
    """

    def __init__(self, batch_size: int, has_logits: bool = True, has_scores: bool = True):
        self.has_logits, self.has_scores = has_logits, has_scores
        self.rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(batch_size)]

    @classmethod
    def asked_for(cls, generation_config: Any, batch_size: int) -> "Steps | None":
        """What `output_logits` and `output_scores` ask for; None where neither does."""
        has_logits, has_scores = bool(generation_config.output_logits), bool(generation_config.output_scores)
        if not generation_config.return_dict_in_generate or not (has_logits or has_scores):
            return None
        return cls(batch_size, has_logits, has_scores)

    def add(self, row: int, logits: torch.Tensor, scores: torch.Tensor) -> None:
        """Those, [n, V], of the next n tokens of a row."""
        self.rows[row] += zip(logits.float().clone(), scores.float().clone(), strict=True)

    def column(self, place: int, num_new_tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and scores [B, V] of new column `place`, as transformers returns them; zeros where a row had ended."""
        nothing = (torch.zeros_like(self.rows[0][0][0]),) * 2
        pairs = [row[place] if place < num else nothing for row, num in zip(self.rows, num_new_tokens, strict=True)]
        logits, scores = zip(*pairs, strict=True)
        return torch.stack(logits), torch.stack(scores)

    def columns(
        self, num_new_tokens: list[int]
    ) -> tuple[tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, ...] | None]:
        """Those of every new column; None for what was not asked for."""
        columns = [self.column(place, num_new_tokens) for place in range(max(num_new_tokens))]
        logits, scores = zip(*columns, strict=True)
        return logits if self.has_logits else None, scores if self.has_scores else None
