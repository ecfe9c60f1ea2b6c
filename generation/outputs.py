"""What a decode returns: the sequences, and how they were won."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .transcript import Transcript


@dataclass
class TiDARGenerateOutput(GenerateDecoderOnlyOutput):
    """`generate(return_dict_in_generate=True)` of a model that drafts. B sequences, K drafted tokens.

    Attributes:
        sequences: [B, P + N] prompt and new ids, padded behind each row's end.
        num_forwards: decode forwards of the whole batch; the prefill is counted apart.
        num_prefill_forwards: forwards that read the prompt.
        num_tie_forwards: with `exact="tie-safe"`, forwards of one token of one row that decided near-ties; counted
            beside `num_forwards`, not in it. 0 otherwise.
        tokens_per_forward: [B] tokens each row got from its decode forwards, by their number. Plain decoding has
            1.0. The token the prefill decides is not counted, nor what was drafted behind the end of the text; NaN
            for a row that needed no decode forward.
        accepted_lengths: [B, K] how often a forward of the row accepted 1, 2, ..., K tokens.
    """

    num_forwards: int | None = None
    num_prefill_forwards: int | None = None
    num_tie_forwards: int | None = None
    tokens_per_forward: torch.Tensor | None = None
    accepted_lengths: torch.Tensor | None = None


class Record:
    """What happens while a batch is decoded: what each forward accepted, and the scores a caller asked for.

    Attributes:
        accepted_lengths: [B, K] how often a forward of the row accepted 1, 2, ..., K tokens.
        steps: for each row, logits and processed scores [V] of each decided token; None where nobody asked.
    """

    def __init__(self, batch_size: int, draft_length: int, generation_config: GenerationConfig):
        self.generation_config = generation_config
        self.accepted_lengths = torch.zeros(batch_size, draft_length, dtype=torch.long)
        wants_dict = generation_config.return_dict_in_generate
        wants_steps = wants_dict and (generation_config.output_scores or generation_config.output_logits)
        self.steps: list[list[tuple[torch.Tensor, torch.Tensor]]] | None = None
        if wants_steps:
            self.steps = [[] for _ in range(batch_size)]

    def add_forward(self, rows: list[int], num_accepted: list[int]) -> None:
        for row, count in zip(rows, num_accepted, strict=True):
            self.accepted_lengths[row, count - 1] += 1

    def add_scores(self, rows: list[int], num_decided: list[int], logits: torch.Tensor, scores: torch.Tensor) -> None:
        """Takes the first `num_decided` of [A, n, V] logits and processed scores: those their tokens were chosen by."""
        if self.steps is not None:
            for place, (row, count) in enumerate(zip(rows, num_decided, strict=True)):
                self.steps[row] += [(logits[place, i].float(), scores[place, i].float()) for i in range(count)]

    def output(self, transcript: Transcript, forward: Any, cache: DynamicCache | None) -> Any:
        """The ids [B, P + N], or all there is to tell of them."""
        if not self.generation_config.return_dict_in_generate:
            return transcript.sequences()
        num_new_tokens = transcript.num_new_tokens
        logits, scores = self._columns(num_new_tokens)
        return TiDARGenerateOutput(
            sequences=transcript.sequences(),
            scores=scores if self.generation_config.output_scores else None,
            logits=logits if self.generation_config.output_logits else None,
            past_key_values=cache,
            num_forwards=forward.num_forwards,
            num_prefill_forwards=forward.num_prefill_forwards,
            num_tie_forwards=forward.num_tie_forwards,
            tokens_per_forward=(torch.tensor(num_new_tokens) - 1) / self.accepted_lengths.sum(dim=1),
            accepted_lengths=self.accepted_lengths,
        )

    def _columns(self, num_new_tokens: list[int]) -> tuple[Any, Any]:
        """Logits and scores, a [B, V] tensor for each new column; zeros where a row had ended."""
        if self.steps is None:
            return None, None
        nothing = (torch.zeros_like(self.steps[0][0][0]),) * 2
        columns = [
            [row[i] if i < num else nothing for row, num in zip(self.steps, num_new_tokens, strict=True)]
            for i in range(max(num_new_tokens))
        ]
        logits, scores = (tuple(torch.stack([pair[k] for pair in column]) for column in columns) for k in (0, 1))
        return logits, scores
