"""The logits and processed scores by which each token was decided, for callers who ask for them.

B rows, n tokens, V vocabulary.
"""

import torch


class Steps:
    """Keeps them row by row, since rows are decided at paces of their own.

    Attributes:
        rows: for each row, a pair of [V] for each new token.
    """

    def __init__(self, batch_size: int):
        self.rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(batch_size)]

    def add(self, row: int, logits: torch.Tensor, scores: torch.Tensor) -> None:
        """Those, [n, V], of the next n tokens of a row."""
        self.rows[row] += zip(logits.float().clone(), scores.float().clone(), strict=True)

    def columns(self, num_new_tokens: list[int]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Logits and scores, [B, V] for each new column as transformers returns them; zeros where a row had ended."""
        nothing = (torch.zeros_like(self.rows[0][0][0]),) * 2
        columns = [
            [row[i] if i < num else nothing for row, num in zip(self.rows, num_new_tokens, strict=True)]
            for i in range(max(num_new_tokens))
        ]
        logits, scores = (tuple(torch.stack([pair[k] for pair in column]) for column in columns) for k in (0, 1))
        return logits, scores
