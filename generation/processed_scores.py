"""Logits after the user's processors, each with the prefix of its own position.

A rows still being written, n positions, V vocabulary.
"""

import re

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from .transcript import Transcript


def classes_of(names: str) -> set[type]:
    """transformers' own processors and warpers of these names."""
    own = vars(logits_process).items()
    return {kind for name, kind in own if re.sub("Logits(Processor|Warper)$", "", name) in names.split()}


# They read only scores: one call serves all positions.
PREFIX_FREE = classes_of("Epsilon Eta LogitNormalization MinP SuppressTokens Temperature TopK TopP Typical")
# Functions of scores and prefixes, which may be asked about any draft.
PURE = PREFIX_FREE | classes_of(
    "EncoderNoRepeatNGram EncoderRepetitionPenalty ExponentialDecayLengthPenalty ForcedBOSToken ForcedEOSToken "
    "InfNanRemove MinLength MinNewTokensLength NoBadWords NoRepeatNGram RepetitionPenalty SequenceBias "
    "SuppressTokensAtBegin TopH Watermark"
)


class ProcessedScores:
    """Runs the user's logits processors as in plain decoding.

    Args:
        excluded_id: an id that is never generated: the mask token, if it has a logit.

    Attributes:
        depend_on_prefix: whether a processor reads the ids before a position.
        is_in_order: whether one may keep state or know only valid prefixes, as a user's own. Then the whole batch is
            shown each prefix of its text once, in order.
    """

    def __init__(self, processors: LogitsProcessorList, transcript: Transcript, excluded_id: int | None = None):
        self.processors = processors
        self.transcript = transcript
        self.excluded_id = excluded_id
        kinds = {type(processor) for processor in processors}
        self.depend_on_prefix = not kinds <= PREFIX_FREE
        self.is_in_order = not kinds <= PURE

    def of_drafts(self) -> "ProcessedScores":
        """The same without processors that may not be asked about drafts."""
        if not self.is_in_order:
            return self
        free = LogitsProcessorList(processor for processor in self.processors if type(processor) in PREFIX_FREE)
        return ProcessedScores(free, self.transcript, self.excluded_id)

    def __call__(self, logits: Tensor, starts: list[int] | None = None) -> Tensor:
        """Processed `logits` [A, n, V]. Processors see the whole batch, with one call per prefix length.

        Args:
            starts: for each active row, the number of ids before its first position; default: the length of its text.
        """
        if self.excluded_id is not None:
            logits[..., self.excluded_id] = -torch.inf
        num_positions = logits.shape[1]
        if not self.processors or not num_positions:
            return logits
        ids, active, scores = self.transcript.ids, self.transcript.active, logits.to(torch.float32, copy=True)
        if not self.depend_on_prefix:
            flat = scores.flatten(end_dim=1)
            return self.processors(ids[:1].expand(len(flat), -1), flat).view(logits.shape)
        starts = starts or self.transcript.starts()
        for length in range(min(starts), max(starts) + num_positions):
            places = [place for place, start in enumerate(starts) if start <= length < start + num_positions]
            rows, positions = [active[place] for place in places], [length - starts[place] for place in places]
            batch = scores.new_zeros(len(ids), logits.shape[2])
            batch[rows] = scores[places, positions]
            shown = ids[:, :length].clone()
            scores[places, positions] = self.processors(shown, batch)[rows]
            if self.is_in_order and not torch.equal(shown, ids[:, :length]):
                raise ValueError(
                    f"`logits_processor` must leave `input_ids` as they are, but {names_of(self.processors)} "
                    "writes into them."
                )
        return scores


def names_of(processors: LogitsProcessorList) -> str:
    return ", ".join(type(processor).__name__ for processor in processors)


def refuse_none_allowed(scores: Tensor, processed: ProcessedScores) -> None:
    """Raises ValueError where processors leave a row no token to sample, by scores [..., V]."""
    if (~scores.isfinite()).all(dim=-1).any():
        raise ValueError(
            "`logits_processor` must leave each row a token to sample, but after "
            f"{min(processed.transcript.starts())} tokens {names_of(processed.processors)} leave a row none."
        )
