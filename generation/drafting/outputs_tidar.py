"""What a decode returns: the sequences, and how they were won."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..stock_model import CACHE
from ..transcript import Transcript


@dataclass
class TiDARGenerateOutput(GenerateDecoderOnlyOutput):
    """`generate(return_dict_in_generate=True)` of a model that drafts. B sequences, K drafted tokens.

    Attributes:
        sequences: [B, P + N] prompt and new ids, padded behind each row's end.
        num_forwards: decode forwards of the whole batch; the prefill is counted apart.
        num_prefill_forwards: forwards that read the prompt, and one for what the returned cache would lack: the last
            tokens of rows that ended before others.
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
    """What each forward of a batch accepted.

    Attributes:
        accepted_lengths: [B, K] how often a forward of the row accepted 1, 2, ..., K tokens.
        num_forwards: decode forwards so far, one a step.
    """

    def __init__(self, batch_size: int, draft_length: int, generation_config: GenerationConfig):
        self.num_forwards = 0
        self.generation_config = generation_config
        self.accepted_lengths = torch.zeros(batch_size, draft_length, dtype=torch.long)

    def add_forward(self, rows: list[int], num_accepted: list[int]) -> None:
        self.num_forwards += 1
        for row, count in zip(rows, num_accepted, strict=True):
            self.accepted_lengths[row, count - 1] += 1

    def output(self, transcript: Transcript, network: Any, cache: DynamicCache | None) -> Any:
        """The ids [B, P + N], or all there is to tell of them."""
        if not self.generation_config.return_dict_in_generate:
            return transcript.sequences()
        num_new_tokens = transcript.num_new_tokens
        kept = transcript.token_scores
        logits, scores = kept.columns(num_new_tokens) if kept else (None, None)
        return TiDARGenerateOutput(
            sequences=transcript.sequences(),
            scores=scores,
            logits=logits,
            num_forwards=self.num_forwards,
            num_prefill_forwards=network.num_prefill_forwards,
            num_tie_forwards=network.num_tie_forwards,
            tokens_per_forward=(torch.tensor(num_new_tokens) - 1) / self.accepted_lengths.sum(dim=1),
            accepted_lengths=self.accepted_lengths,
            **{CACHE: cache},
        )
