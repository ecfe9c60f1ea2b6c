"""The text being written: the decided tokens, the end of each row, and streaming.

B sequences, A rows still being written, L columns (prompt and new tokens), V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria


class TokenScores:
    """The logits and processed scores that decided each token, if requested.

    Attributes:
        has_logits, has_scores: which of the two were requested.
        rows: for each row, a pair of [V] for each new token.
    """

    def __init__(self, batch_size: int, has_logits: bool = True, has_scores: bool = True):
        self.has_logits, self.has_scores = has_logits, has_scores
        self.rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(batch_size)]

    @classmethod
    def asked_for(cls, generation_config: Any, batch_size: int) -> "TokenScores | None":
        has_logits, has_scores = bool(generation_config.output_logits), bool(generation_config.output_scores)
        if not generation_config.return_dict_in_generate or not (has_logits or has_scores):
            return None
        return cls(batch_size, has_logits, has_scores)

    def add(self, row: int, logits: Tensor, scores: Tensor) -> None:
        """Records logits and scores [n, V] of a row's next n tokens."""
        self.rows[row] += zip(logits.float().clone(), scores.float().clone(), strict=True)

    def column(self, place: int, num_new_tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Logits and scores [B, V] of new column `place`; zeros where a row had ended."""
        nothing = (torch.zeros_like(self.rows[0][0][0]),) * 2
        pairs = [row[place] if place < num else nothing for row, num in zip(self.rows, num_new_tokens, strict=True)]
        logits, scores = zip(*pairs, strict=True)
        return torch.stack(logits), torch.stack(scores)

    def columns(self, num_new_tokens: list[int]) -> tuple[tuple[Tensor, ...] | None, ...]:
        """Logits and scores of every new column; None if not requested."""
        columns = [self.column(place, num_new_tokens) for place in range(max(num_new_tokens))]
        logits, scores = zip(*columns, strict=True)
        return logits if self.has_logits else None, scores if self.has_scores else None


class Transcript:
    """Rows of ids that grow and end independently.

    Attributes:
        ids: [B, L] the prompt and the decided tokens; columns after a row's length are undecided.
        lengths: columns in use in each row, a host list.
        new_ids: decided tokens on the host, for a reader that takes them out.
        active: the A rows still being written, in order.
        rows_end_alone: false without end tokens. Then, as in transformers, every row continues until the last one
            stops.
    """

    def __init__(
        self,
        input_ids: Tensor,
        stopping_criteria: StoppingCriteriaList,
        pad_token_id: int | None,
        draft_length: int,
        streamer: Any = None,
        token_scores: TokenScores | None = None,
    ):
        batch_size, self.prompt_length = input_ids.shape
        self.max_length = min(c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria)
        self.max_length = max(self.max_length, self.prompt_length + 1)  # criteria run after a token
        self.ids = torch.nn.functional.pad(input_ids.long(), (0, self.max_length - self.prompt_length + draft_length))
        self.lengths = [self.prompt_length] * batch_size
        self.new_ids: list[list[int]] = [[] for _ in range(batch_size)]
        self.active = list(range(batch_size))
        self.pad_token_id = pad_token_id
        self.token_scores = token_scores
        self.streamer = streamer
        self.num_streamed = [self.prompt_length] * batch_size
        if streamer is not None and batch_size > 1 and not hasattr(streamer, "put_row"):
            raise ValueError(
                f"{type(streamer).__name__} shows one text, but the batch has {batch_size} rows (prompts times "
                "`num_return_sequences`). Give a streamer with `put_row(row, ids)`, such as wavedraft's `RowStreamer`."
            )
        if getattr(streamer, "_takes_logits", False):
            raise ValueError(
                f"{type(streamer).__name__}'s `_takes_logits` must be False: drafts are shown as "
                "tokens, not as logits. Leave it as transformers' `TextDiffusionStreamer` has it."
            )
        of_eos = [c.eos_token_id.tolist() for c in stopping_criteria if type(c) is EosTokenCriteria]
        self.eos_token_ids = {int(token) for ids in of_eos for token in ids}
        others = [c for c in stopping_criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
        self.criteria = StoppingCriteriaList(others)
        self.rows_end_alone = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        if self.rows_end_alone and batch_size > 1 and pad_token_id is None:
            raise ValueError(
                f"`pad_token_id` must be set where the {batch_size} rows of a batch may end at different lengths (a "
                "stopping criterion has an `eos_token_id`), but is None. Pass `pad_token_id`, or one row at a time."
            )
        self.num_checked = self.prompt_length  # columns the criteria have seen
        self.shown_scores: tuple[Tensor, ...] = ()  # of these columns
        self.is_stopped = [False] * batch_size  # by a criterion
        self.is_ended = [False] * batch_size

    def write_undecided(self, undecided_ids: Tensor, starts: list[int] | None = None) -> None:
        """Writes [A, n] ids from columns `starts` on, by default after each text."""
        for row, start, ids in zip(self.active, starts or self.starts(), undecided_ids, strict=True):
            columns = self.ids[row, start : start + len(ids)]
            columns.copy_(ids[: len(columns)])

    def starts(self, offset: int = 0, ahead: list[int] | None = None) -> list[int]:
        """The column after each active row's text, plus `offset` and `ahead`."""
        ahead = ahead or [0] * len(self.active)
        return [self.lengths[row] + more + offset for row, more in zip(self.active, ahead, strict=True)]

    def extend(
        self, decided_ids: Tensor, num_decided: Tensor, also: Tensor, chosen_by: tuple[Tensor, Tensor] | None
    ) -> tuple[list[int], list[int]]:
        """Adds the first `num_decided` [A] of `decided_ids` [A, K] to the active rows: the one host sync per forward.

        Args:
            also: [A] other numbers for the host.
            chosen_by: logits and processed scores [A, K, V], recorded if requested.

        Returns:
            `num_decided` (a row that ends keeps fewer) and `also`, on the host.
        """
        self.write_undecided(decided_ids)
        on_host = torch.cat([num_decided[:, None], also[:, None], decided_ids], dim=1).tolist()
        for place, (row, (count, _, *tokens)) in enumerate(zip(self.active, on_host, strict=True)):
            self._lengthen(row, tokens[:count])
            if self.token_scores and chosen_by:
                self.token_scores.add(row, *(tensor[place, :count] for tensor in chosen_by))
        self._tell()
        return [count for count, *_ in on_host], [number for _, number, *_ in on_host]

    def write(self, decided_ids: list[list[int]]) -> None:
        """Adds tokens from the host to each active row, without a sync."""
        for row, tokens in zip(self.active, decided_ids, strict=True):
            start = self.lengths[row]
            self._lengthen(row, tokens)
            end = self.lengths[row]
            self.ids[row, start:end] = torch.tensor(tokens[: end - start], device=self.ids.device)
        if any(decided_ids):
            self._tell()

    def _lengthen(self, row: int, tokens: list[int]) -> None:
        """Adds a row's tokens to its length, up to its end."""
        for token in tokens:
            self.lengths[row] += 1
            self.new_ids[row].append(token)
            if token in self.eos_token_ids or self.lengths[row] >= self.max_length:
                self._end(row)
                break

    def _end(self, row: int) -> None:
        """Ends a row, and pads it."""
        self.is_ended[row] = True
        self.ids[row, self.lengths[row] :] = self.pad_token_id or 0

    def _tell(self) -> None:
        if self.criteria:
            self._apply_criteria()
        self._stream()

    def _apply_criteria(self) -> None:
        """Runs the criteria on each new column of the whole batch, once every unfinished row has reached it."""
        while self.num_checked < self.max_length:
            column = self.num_checked + 1
            unfinished = [row for row, n in enumerate(self.lengths) if n >= column or not self.is_ended[row]]
            if not unfinished or any(self.lengths[row] < column for row in unfinished):
                return
            if self.token_scores is not None and self.token_scores.has_scores:
                place = column - 1 - self.prompt_length
                self.shown_scores += (self.token_scores.column(place, self.num_new_tokens)[1],)
            stops = self.criteria(self.ids[:, :column].clone(), self.shown_scores or None).tolist()
            self.num_checked = column
            self.is_stopped = [before or now for before, now in zip(self.is_stopped, stops, strict=True)]
            for row in unfinished:
                if self.is_stopped[row] and (self.rows_end_alone or all(self.is_stopped)):
                    self.lengths[row] = column
                    self._end(row)

    def _stream(self) -> None:
        if self.streamer is None:
            return
        put_row = getattr(self.streamer, "put_row", lambda row, ids: self.streamer.put(ids))
        for row, length in enumerate(self.lengths):
            length = min(length, self.num_checked) if self.criteria else length
            if length > self.num_streamed[row]:
                put_row(row, self.ids[row, self.num_streamed[row] : length].cpu())
                self.num_streamed[row] = length

    def show_draft(self, draft_ids: Tensor) -> None:
        """Shows the draft [1, K] of a single row to a streamer with `put_draft`."""
        if self.streamer is not None and len(self.lengths) == 1 and hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(value=draft_ids[:, 1:].cpu())

    def drop_ended(self) -> list[int]:
        """Removes the ended rows from `active`. Returns the places of the remaining rows."""
        places = [place for place, row in enumerate(self.active) if not self.is_ended[row]]
        self.active = [self.active[place] for place in places]
        return places

    @property
    def num_new_tokens(self) -> list[int]:
        return [length - self.prompt_length for length in self.lengths]

    def last_ids(self) -> list[int]:
        """The last token of each row."""
        return [int(self.ids[row, length - 1]) for row, length in enumerate(self.lengths)]

    def sequences(self) -> Tensor:
        """[B, longest] prompt and new ids, padded after each row's end."""
        return self.ids[:, : max(self.lengths)].clone()


def pad_token_of(generation_config: GenerationConfig) -> int | None:
    """The padding id of a call that transformers has prepared; default: an end token."""
    prepared = getattr(generation_config, "_pad_token_tensor", None)
    return generation_config.pad_token_id if prepared is None else int(prepared)
