"""Logits after the user's processors, each with the prefix of its own position.

A rows still being written, n positions, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from .transcript import Transcript


def classes_of(names: str) -> set[type | None]:
    """transformers' own processors of these names."""
    return {getattr(logits_process, name, None) for name in names.split()}


# They read only the scores of a position: one call serves all positions.
PREFIX_FREE = classes_of("""
    EpsilonLogitsWarper EtaLogitsWarper LogitNormalization MinPLogitsWarper SuppressTokensLogitsProcessor
    TemperatureLogitsWarper TopKLogitsWarper TopPLogitsWarper TypicalLogitsWarper""")
# Functions of the scores and the ids before them: they may be asked about any draft, any number of times.
PURE = PREFIX_FREE | classes_of("""
    EncoderNoRepeatNGramLogitsProcessor EncoderRepetitionPenaltyLogitsProcessor ExponentialDecayLengthPenalty
    ForcedBOSTokenLogitsProcessor ForcedEOSTokenLogitsProcessor InfNanRemoveLogitsProcessor MinLengthLogitsProcessor
    MinNewTokensLengthLogitsProcessor NoBadWordsLogitsProcessor NoRepeatNGramLogitsProcessor
    RepetitionPenaltyLogitsProcessor SequenceBiasLogitsProcessor SuppressTokensAtBeginLogitsProcessor TopHLogitsWarper
    WatermarkLogitsProcessor""")


class ProcessedScores:
    """Runs the user's logits processors as in plain decoding.

    Args:
        excluded_id: an id that is never generated: the mask token, if it has a logit.

    Attributes:
        depend_on_prefix: whether a processor reads the ids before a position.
        is_in_order: whether a processor may keep state or know only valid prefixes, as a user's own may. Then each
            prefix of the text must be shown once, in order, to the whole batch, as in plain decoding.
    """

    def __init__(self, processors: LogitsProcessorList, transcript: Transcript, excluded_id: int | None = None):
        self.processors = processors
        self.transcript = transcript
        self.excluded_id = excluded_id
        self.depend_on_prefix = any(type(processor) not in PREFIX_FREE for processor in processors)
        self.is_in_order = any(type(processor) not in PURE for processor in processors)

    def of_drafts(self) -> "ProcessedScores":
        """The same for drafts: without processors that may not be asked about them."""
        if not self.is_in_order:
            return self
        free = LogitsProcessorList(processor for processor in self.processors if type(processor) in PREFIX_FREE)
        return ProcessedScores(free, self.transcript, self.excluded_id)

    def __call__(self, logits: Tensor, starts: list[int] | None = None) -> Tensor:
        """Processed `logits` [A, n, V]. Processors see the whole batch, with one call per prefix length.

        Args:
            starts: for each active row, the number of ids before its first position; default: the length of its text.
                -1 leaves the row unprocessed.
        """
        if self.excluded_id is not None:
            logits[..., self.excluded_id] = -torch.inf
        if not self.processors or not logits.shape[1]:
            return logits
        if not self.depend_on_prefix:
            flat = logits.flatten(end_dim=1).to(torch.float32, copy=True)
            return self.processors(self.transcript.ids[:1].expand(len(flat), -1), flat).view(logits.shape)
        return self._on_prefixes(logits, self.transcript.starts() if starts is None else starts)

    def _on_prefixes(self, logits: Tensor, starts: list[int]) -> Tensor:
        ids, active = self.transcript.ids, self.transcript.active
        num_positions = logits.shape[1]
        scores = logits.to(torch.float32, copy=True)
        valid = [start for start in starts if start >= 0]
        for length in range(min(valid, default=0), max(valid, default=-num_positions) + num_positions):
            places = [place for place, start in enumerate(starts) if 0 <= start <= length < start + num_positions]
            if not places:
                continue
            positions = [length - starts[place] for place in places]
            rows = [active[place] for place in places]
            batch = torch.zeros(len(ids), logits.shape[2], dtype=torch.float32, device=logits.device)
            batch[rows] = logits[places, positions].float()
            scores[places, positions] = self.processors(ids[:, :length].contiguous(), batch)[rows]
        return scores
