"""The output of decoding a recurrent-depth model: the sequences and their costs."""

from dataclasses import dataclass

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass
class RecurrentGenerateOutput(GenerateDecoderOnlyOutput):
    """`generate(return_dict_in_generate=True)` of a recurrent-depth model. B sequences, N new tokens.

    Attributes:
        sequences: [B, P + N] prompt and new ids, padded after each row's end.
        num_core_passes: calls of the core after the prefill (with `reference_compat` the prefill counts as one, as in
            the published code).
        num_prefill_core_passes: calls of the core that read the prompt and, for the returned cache, the last tokens of
            rows that ended early.
        num_prefill_positions: tokens read by the prefill, without those already in the caller's cache.
        num_steps: decodes after the prefill: passes through the coda that predicted tokens.
        num_positions: tokens that passed through the core, summed over its calls after the prefill. This measures the
            work, `num_core_passes` the time.
        recurrences_per_position: [B, N] core passes of each new token, -1 where a row has no such token. The last token
            needs none.
        tokens_per_forward: [B] new tokens per forward of full depth. Forwards are the core passes of the row divided by
            `num_recurrences`. Plain decoding has 1.0. The token decided by the prefill is not counted. NaN for a row
            without core passes.
        wavefront: with `record_wavefront`, the first row's wavefront at each step.
    """

    num_core_passes: int | None = None
    num_prefill_core_passes: int | None = None
    num_prefill_positions: int | None = None
    num_steps: int | None = None
    num_positions: int | None = None
    recurrences_per_position: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    wavefront: "list[WavefrontStep] | None" = None


@dataclass
class WavefrontStep:
    """One row's wavefront at one decode step.

    Attributes:
        start: first position, that of the last token frozen before the step.
        fed_ids: input tokens of the positions.
        predicted_ids: each position's prediction for the next position.
        num_frozen: tokens frozen in the step.
    """

    start: int
    fed_ids: list[int]
    predicted_ids: list[int]
    num_frozen: int


class Costs:
    """Counts the costs of a decode for `RecurrentGenerateOutput`."""

    def __init__(self, batch_size: int, num_recurrences: int):
        self.num_recurrences = num_recurrences
        self.num_core_passes = 0
        self.num_prefill_core_passes = num_recurrences
        self.num_prefill_positions: int | None = None
        self.num_steps = 0
        self.num_positions = 0
        self.row_passes = [0] * batch_size
        self.recurrences: list[dict[int, int]] = [{} for _ in range(batch_size)]  # by index among the new tokens

    def add_core_pass(self, num_positions: int, rows: list[int]) -> None:
        """Counts one call of the core on `num_positions` positions of these rows."""
        self.num_core_passes += 1
        self.num_positions += num_positions
        for row in rows:
            self.row_passes[row] += 1

    def add_recurrence(self, row: int, place: int) -> None:
        """Counts one core pass of the new token at `place` of a row."""
        self.recurrences[row][place] = self.recurrences[row].get(place, 0) + 1

    def add_step(self) -> None:
        """Counts one decode."""
        self.num_steps += 1

    def output(self, sequences: torch.Tensor, num_new_tokens: list[int], **extra) -> RecurrentGenerateOutput:
        """The sequences with all counts."""
        longest = max(num_new_tokens)
        forwards = torch.tensor(self.row_passes) / self.num_recurrences
        recurrences = torch.full((len(num_new_tokens), longest), -1)
        for row, counts in enumerate(self.recurrences):
            for place in range(num_new_tokens[row]):
                recurrences[row, place] = counts.get(place, 0)
        return RecurrentGenerateOutput(
            sequences=sequences,
            num_core_passes=self.num_core_passes,
            num_prefill_core_passes=self.num_prefill_core_passes,
            num_prefill_positions=self.num_prefill_positions,
            num_steps=self.num_steps,
            num_positions=self.num_positions,
            recurrences_per_position=recurrences,
            tokens_per_forward=(torch.tensor(num_new_tokens) - 1) / forwards,
            **extra,
        )
