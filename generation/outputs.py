"""What a decode returns: the sequences, and how they were won."""

from dataclasses import dataclass

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass
class TiDARGenerateOutput(GenerateDecoderOnlyOutput):
    """`generate(return_dict_in_generate=True)` of a model that drafts. B sequences, K drafted tokens.

    Attributes:
        sequences: [B, P + N] prompt and new ids, padded behind each row's end.
        num_forwards: decode forwards of the whole batch; the prefill is counted apart.
        num_prefill_forwards: forwards that read the prompt.
        tokens_per_forward: [B] tokens each row got from its decode forwards, by their number. Plain decoding has
            1.0. The token the prefill decides is not counted, nor what was drafted behind the end of the text.
        accepted_lengths: [B, K] how often a forward of the row accepted 1, 2, ..., K tokens.
    """

    num_forwards: int | None = None
    num_prefill_forwards: int | None = None
    tokens_per_forward: torch.Tensor | None = None
    accepted_lengths: torch.Tensor | None = None


class StepScores:
    """Collects each new token's logits and processed scores, row by row, as `output_logits` and `output_scores` ask."""

    def __init__(self, batch_size: int):
        self.rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(batch_size)]

    def add(self, rows: list[int], counts: list[int], logits: torch.Tensor, scores: torch.Tensor) -> None:
        """Takes the first `counts` of [A, n, V] logits and scores, in the order in which their tokens were decided."""
        for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
            self.rows[row] += [(logits[place, i].float(), scores[place, i].float()) for i in range(count)]

    def steps(self, num_new_tokens: list[int]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Logits and scores, a [B, V] tensor for each new column; zeros where a row had ended."""
        nothing = (torch.zeros_like(self.rows[0][0][0]),) * 2
        columns = [
            [row[i] if i < min(len(row), num) else nothing for row, num in zip(self.rows, num_new_tokens, strict=True)]
            for i in range(max(num_new_tokens))
        ]
        logits, scores = (tuple(torch.stack([pair[k] for pair in column]) for column in columns) for k in (0, 1))
        return logits, scores


class Statistics:
    """Counts, row by row, what each decode forward accepted."""

    def __init__(self, batch_size: int, draft_length: int):
        self.accepted_lengths = torch.zeros(batch_size, draft_length, dtype=torch.long)

    def add(self, rows: list[int], num_accepted: list[int]) -> None:
        for row, count in zip(rows, num_accepted, strict=True):
            self.accepted_lengths[row, count - 1] += 1

    def tokens_per_forward(self, num_new_tokens: list[int]) -> torch.Tensor:
        """[B] tokens by forwards, the prefill's token left out; NaN for a row that needed no decode forward."""
        return (torch.tensor(num_new_tokens) - 1) / self.accepted_lengths.sum(dim=1)
