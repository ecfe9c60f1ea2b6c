"""What every decoder of recurrent-depth models begins with: the prompts read, the text opened, the choice of tokens.

B rows, A rows still being written, P prompt columns, V vocabulary.
"""

from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from .draws_recurrent import STATE, Draws, state_hashes
from .freezing import latent_difference
from .options_recurrent import RecurrentOptions
from .outputs_recurrent import Costs, RecurrentGenerateOutput
from .transcript import Scores, Transcript

# Processors that look at the scores alone, so that all positions may be given to them at once.
PREFIX_FREE = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
)


class Session:
    """One call of `generate`: its rows, unpadded, and what they cost.

    Attributes:
        pads: padding columns left of each row, of the rows still being written: column is position plus pad.
        cache, draws: of the rows still being written.
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        transcript: Transcript,
        processors: LogitsProcessorList,
        do_sample: bool,
        options: RecurrentOptions,
        cache: Any,
    ):
        self.model = model
        self.options = options
        self.transcript = transcript
        self.processors = processors
        self.scores = Scores(processors, transcript, None)
        self.is_prefix_free = all(isinstance(processor, PREFIX_FREE) for processor in processors)
        self.do_sample = do_sample
        self.cache = cache
        self.input_ids = input_ids
        self.device = input_ids.device
        self.pads = padding_of(input_ids, attention_mask)
        self.draws = Draws(options.seeds(len(input_ids), do_sample), self.device)
        self.costs = Costs(len(input_ids), options.num_recurrences)
        self.num_columns = input_ids.shape[1]
        assert transcript.max_length is not None, "generate always sets a maximum length"
        longest = transcript.max_length - min(self.pads)
        if longest > model.config.block_size:
            raise ValueError(
                f"Prompt and new tokens together must be at most {model.config.block_size} (`config.block_size`, the "
                f"length this checkpoint was trained for), but may reach {longest}. Lower `max_new_tokens`."
            )

    def initial_states(self, embeds: torch.Tensor, starts: list[int]) -> torch.Tensor:
        """[A, T, E] states of the tokens from the positions `starts` on, whose prelude outputs are given."""
        if not self.options.init_scale:
            return self.model.initial_states(embeds, 0.0)
        position_ids = torch.tensor(starts)[:, None] + torch.arange(embeds.shape[1])
        hashes = state_hashes(torch.tensor(self.draws.seeds), position_ids).to(self.device)
        return self.model.initial_states(embeds, self.options.init_scale, hashes=hashes)

    def packed_states(
        self,
        embeds: torch.Tensor,
        rows: list[int],
        positions: list[int],
        purpose: int = STATE,
        times: list[int] | None = None,
    ) -> torch.Tensor:
        """[n, 1, E] states of single tokens, whose prelude outputs are given."""
        if not self.options.init_scale:
            return self.model.initial_states(embeds, 0.0)
        hashes = self.draws.hashes(purpose, rows, positions, times)[:, None]
        return self.model.initial_states(embeds, self.options.init_scale, hashes=hashes)

    def prefill(self, exit_threshold: float = 0.0) -> torch.Tensor:
        """Reads the prompts at full depth, or until their states move less than that on average; logits [B, 1, V]."""
        lengths = [self.num_columns - pad for pad in self.pads]
        longest = max(lengths)
        ids = torch.zeros(len(lengths), longest, dtype=torch.long, device=self.device)
        for row, (pad, length) in enumerate(zip(self.pads, lengths, strict=True)):
            ids[row, :length] = self.input_ids[row, pad:]
        window = self.model.window_at([0] * len(lengths), longest, self.cache)
        embeds = self.model.prelude(ids, window)
        states = self.initial_states(embeds, [0] * len(lengths))
        for recurrence in range(1, self.options.num_recurrences + 1):
            before, states = states, self.model.core_step(states, embeds, window, recurrence)
            if exit_threshold and latent_difference(states, before).mean().item() < exit_threshold:
                break
        last = torch.tensor(lengths, device=self.device)[:, None] - 1
        return self.model.coda(states, window, logits_to_keep=last)

    def process(self, logits: torch.Tensor) -> torch.Tensor:
        """Processed scores of [A, n, V] logits that stand behind each row's decided tokens and 0 .. n-1 more."""
        if self.is_prefix_free:
            flat = logits.flatten(0, 1)
            return self.processors(self.transcript.ids[:1, :1].expand(len(flat), 1), flat).view_as(logits)
        return self.scores(logits)

    def process_packed(self, logits: torch.Tensor, rows: list[int], columns: list[int]) -> torch.Tensor:
        """Processed scores of [n, V] logits, each standing behind the first columns[i] columns of its own row.

        `rows` are places among the rows still being written. Processors see the whole batch, as they would in plain
        decoding.
        """
        ids, active = self.transcript.ids, self.transcript.active
        if self.is_prefix_free:
            return self.processors(ids[:1, :1].expand(len(logits), 1), logits)
        scores = torch.empty_like(logits)
        for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
            batch = torch.zeros(len(ids), logits.shape[1], device=logits.device)
            batch[active[row]] = logits[i]
            scores[i] = self.processors(ids[:, :column], batch)[active[row]]
        return scores

    def write_draft(self, row: int, position: int, token: int) -> None:
        """Puts a drafted token where processors look for their prefix."""
        if not self.is_prefix_free:
            self.transcript.ids[self.transcript.active[row], position + self.pads[row]] = token

    def draw_states(
        self, rows: list[int], positions: list[int], purpose: int = STATE, times: list[int] | None = None
    ) -> torch.Tensor:
        """[n, E] states of positions whatever they are fed."""
        like = torch.empty(len(rows), 1, self.model.config.n_embd, dtype=self.model.dtype, device=self.device)
        return self.packed_states(like, rows, positions, purpose, times)[:, 0]

    def draw_gumbel(self, rows: list[int], positions: list[int]) -> torch.Tensor:
        """[n, V] Gumbel noise by which the tokens behind positions are chosen."""
        return self.draws.gumbel(rows, positions, self.model.config.vocab_size)

    def choose_first(self, logits: torch.Tensor) -> list[int]:
        """Decides, and writes down, the first token behind each prompt from [B, 1, V] logits."""
        scores = self.process(logits)
        if self.do_sample:
            rows = list(range(len(scores)))
            scores = scores + self.draw_gumbel(rows, [self.num_columns - pad - 1 for pad in self.pads])[:, None]
        ids = scores.argmax(dim=-1)
        self.transcript.extend(ids, torch.ones_like(ids[:, 0]))
        return ids[:, 0].tolist()

    def write(self, frozen_ids: list[list[int]]) -> None:
        """Adds the tokens each row has frozen to the text."""
        most = max(len(ids) for ids in frozen_ids)
        if most:
            padded = torch.tensor([ids + [0] * (most - len(ids)) for ids in frozen_ids], device=self.device)
            self.transcript.extend(padded, torch.tensor([len(ids) for ids in frozen_ids], device=self.device))

    def keep_rows(self, places: list[int]) -> None:
        """Takes the rows that have ended out of the cache."""
        self.pads = [self.pads[place] for place in places]
        self.cache.keep_rows(places)
        self.draws.keep_rows(places)

    def place_of(self, row: int, position: int) -> int:
        """Which new token of its row stands at `position`; `row` is a place among the rows still being written."""
        return position + self.pads[row] - self.num_columns

    def output(self, **extra) -> RecurrentGenerateOutput:
        """The sequences and what they cost."""
        return self.costs.output(self.transcript.sequences(), self.transcript.num_new_tokens, **extra)


def padding_of(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[int]:
    """Padding columns left of each row of [B, P] ids."""
    if attention_mask is None:
        return [0] * len(input_ids)
    mask = attention_mask.long()
    if (mask.diff(dim=1) < 0).any() or not mask[:, -1].all():
        raise ValueError(
            "`attention_mask` must be zeros, then ones, in every row (padding on the left, at least one token), but is "
            "not. Set `tokenizer.padding_side = 'left'`, or use `policy='autoregressive'` for other masks."
        )
    return (1 - mask).sum(dim=1).tolist()
