"""What every decoder of recurrent-depth models begins with: the prompts read, the text opened, the choice of tokens.

B rows, A rows still being written, P prompt columns, V vocabulary.
"""

from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from ..cache_name import CACHE
from ..processed_scores import ProcessedScores
from ..transcript import Transcript
from .draws_recurrent import STATE, Draws, state_hashes
from .freezing import latent_difference
from .options_recurrent import RecurrentOptions
from .outputs_recurrent import Costs, RecurrentGenerateOutput

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
        rows: which of the batch are still being written.
        pads: padding columns of each of them: a new token's column is its position plus the pad.
        cache, draws: theirs.
        parts: what computes prelude, core steps and coda behind the prompt: the model, or the same in few shapes.
        steps: logits and scores of each token, where a caller asked for them.
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
        returns_cache: bool = False,
        parts: Any = None,
    ):
        self.model = model
        self.parts = model if parts is None else parts
        self.options = options
        self.transcript = transcript
        self.processors = processors
        self.scores = ProcessedScores(processors, transcript)
        self.is_prefix_free = all(isinstance(processor, PREFIX_FREE) for processor in processors)
        self.do_sample = do_sample
        self.steps = transcript.token_scores
        self.device, self.dtype = input_ids.device, model.dtype  # asking a model takes its time
        self.num_columns = input_ids.shape[1]
        self.columns = token_columns(input_ids, attention_mask)
        self.prompts = [[ids[i] for i in where] for ids, where in zip(input_ids.tolist(), self.columns, strict=True)]
        self.rows = list(range(len(input_ids)))
        self.pads = [input_ids.shape[1] - len(prompt) for prompt in self.prompts]
        self.cache, self.returns_cache = cache, returns_cache
        self.set_aside: dict[int, list[torch.Tensor]] = {}
        self.num_cached = self._take_over(cache)
        self.seeds = options.seeds(len(input_ids), do_sample)  # one a row of the batch
        self.draws = Draws(self.seeds, self.device)
        self.costs = Costs(len(input_ids), options.num_recurrences)
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

    def _take_over(self, cache: Any) -> list[int]:
        """Tokens of each prompt that the cache holds; it is unpadded, as all decoding here is."""
        length = cache.get_seq_length()
        if length:
            self.options.check_cache(cache, len(self.columns), self.num_columns)
            held = [[i for i in where if i < length] for where in self.columns]
            cache.gather(held)
            return [len(where) for where in held]
        return [0] * len(self.prompts)

    def prefill(self, exit_threshold: float = 0.0, is_filled: bool = False) -> torch.Tensor:
        """Reads the prompts at full depth, or until their states move less than that on average; logits [B, 1, V].

        `is_filled`: so that a row comes out as it would alone (`filled_window` of the model).
        """
        starts = self.num_cached
        unread = [prompt[start:] for prompt, start in zip(self.prompts, starts, strict=True)]
        self.costs.num_prefill_positions = sum(map(len, unread))
        longest = max(map(len, unread))
        if is_filled:
            longest = self.model.filled_width(longest)
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in unread], device=self.device)
        window = (self.model.filled_window if is_filled else self.model.window_at)(starts, longest, self.cache)
        embeds = self.model.prelude(ids, window)
        states = self.initial_states(embeds, starts)
        for recurrence in range(1, self.options.num_recurrences + 1):
            before, states = states, self.model.core_step(states, embeds, window, recurrence)
            if exit_threshold and latent_difference(states, before).mean().item() < exit_threshold:
                break
        num_kept = self.model.filled_width(1) if is_filled else 1
        last = torch.tensor([[len(prompt) - 1] * num_kept for prompt in unread], device=self.device)
        return self.model.coda(states, window, logits_to_keep=last)[:, :1]

    def process(self, logits: torch.Tensor) -> torch.Tensor:
        """Processed scores of [A, n, V] logits that stand behind each row's decided tokens and 0 .. n-1 more."""
        if not self.processors:
            return logits
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
        for column in set(columns):
            index = [i for i, other in enumerate(columns) if other == column]
            in_batch = [active[rows[i]] for i in index]
            batch = torch.zeros(len(ids), logits.shape[1], device=logits.device)
            batch[in_batch] = logits[index]
            scores[index] = self.processors(ids[:, :column], batch)[in_batch]
        return scores

    def write_draft(self, row: int, position: int, token: int) -> None:
        """Puts a drafted token where processors look for their prefix."""
        if not self.is_prefix_free:
            self.transcript.ids[self.transcript.active[row], position + self.pads[row]] = token

    def draw_states(
        self, rows: list[int], positions: list[int], purpose: int = STATE, times: list[int] | None = None
    ) -> torch.Tensor:
        """[n, E] states of positions whatever they are fed."""
        like = torch.empty(len(rows), 1, self.model.config.n_embd, dtype=self.dtype, device=self.device)
        return self.packed_states(like, rows, positions, purpose, times)[:, 0]

    def draw_gumbel(self, rows: list[int], positions: list[int]) -> torch.Tensor:
        """[n, V] Gumbel noise by which the tokens behind positions are chosen."""
        return self.draws.gumbel(rows, positions, self.model.config.vocab_size)

    def choose_first(self, logits: torch.Tensor) -> list[int]:
        """Decides, and writes down, the first token behind each prompt from [B, 1, V] logits."""
        scores = self.process(logits)
        favoured = scores
        if self.do_sample:
            rows = list(range(len(scores)))
            favoured = scores + self.draw_gumbel(rows, [self.num_columns - pad - 1 for pad in self.pads])[:, None]
        ids = favoured.argmax(dim=-1).tolist()
        self.keep_steps(ids, logits, scores)
        self.transcript.write(ids)
        return [token for (token,) in ids]

    def keep_steps(self, frozen_ids: list[list[int]], logits: torch.Tensor, scores: torch.Tensor) -> None:
        """Keeps, where asked for, what each row's frozen tokens were chosen by: the first of its row of [A, n, V]."""
        if self.steps is not None:
            for place, ids in enumerate(frozen_ids):
                self.steps.add(self.rows[place], logits[place, : len(ids)], scores[place, : len(ids)])

    def show_draft(self, row: int, draft_ids: list[int]) -> None:
        """Shows a draft-aware streamer what stands behind the last frozen token of the row."""
        if (
            draft_ids
            and hasattr(self.transcript.streamer, "put_draft")
            and not self.transcript.is_ended[self.rows[row]]
        ):
            self.transcript.show_draft(torch.tensor([[0, *draft_ids]]))

    def keep_rows(self, places: list[int]) -> None:
        """Takes the rows that have ended out of the decode."""
        if self.returns_cache:
            self.set_aside |= {self.rows[i]: self.cache.row(i) for i in range(len(self.rows)) if i not in places}
        self.rows = [self.rows[place] for place in places]
        self.pads = [self.pads[place] for place in places]
        self.cache.keep_rows(places)
        self.draws.keep_rows(places)

    def place_of(self, row: int, position: int) -> int:
        """Which new token of its row stands at `position`; `row` is a place among the rows still being written."""
        return position + self.pads[row] - self.num_columns

    def output(self, **extra) -> RecurrentGenerateOutput:
        """The sequences, what they cost, and the cache."""
        num_new_tokens = self.transcript.num_new_tokens
        if self.steps is not None:
            extra["logits"], extra["scores"] = self.steps.columns(num_new_tokens)
        if self.returns_cache:
            extra[CACHE] = self._final_cache()
        return self.costs.output(self.transcript.sequences(), num_new_tokens, **extra)

    def _final_cache(self) -> Any:
        """The cache, its columns those of the sequences: of each row all tokens, but of the longest ones the last,
        which nobody has read."""
        ends = self.transcript.lengths
        columns = [[*where, *range(self.num_columns, end)] for where, end in zip(self.columns, ends, strict=True)]
        length = max(ends) - 1
        columns = [[column for column in where if column < length] for where in columns]
        early = [row for row, end in enumerate(ends) if end <= length]
        if all(where == list(range(length)) for where in columns) and not self.set_aside:
            self.cache.lengths = [length] * len(columns)
        else:
            held = self.set_aside | {row: self.cache.row(place) for place, row in enumerate(self.rows)}
            if early:
                held |= self._with_last_tokens(early, held, [columns[row][:-1] for row in early])
            self.cache.scatter([held[row] for row in range(len(columns))], columns, length)
        self.cache.note_depth(self._cached_depth())
        return self.cache

    def _cached_depth(self) -> int:
        """Recurrences each new token has in the cache: diffusion forcing stores those of one decode step, numbered
        afresh at each."""
        is_forced = self.options.policy == "diffusion-forcing"
        return self.options.inner_recurrence if is_forced else self.options.num_recurrences

    def _with_last_tokens(
        self, rows: list[int], held: dict[int, list[torch.Tensor]], columns: list[list[int]]
    ) -> dict[int, list[torch.Tensor]]:
        """What these rows of the batch hold (`RecurrentCache.row`), their tokens before the last in `columns`, and
        their last token: read at full depth, as a prompt is, or as deep as the tokens before it are stored."""
        starts = [len(where) for where in columns]
        self.cache.scatter([held[row] for row in rows], [list(range(start)) for start in starts], max(starts))
        self.cache.lengths = starts
        ends = [self.transcript.lengths[row] - 1 for row in rows]
        ids = self.transcript.ids[torch.tensor(rows), torch.tensor(ends)][:, None]
        window = self.model.window_at(starts, 1, self.cache)
        embeds = self.model.prelude(ids, window)
        if self.options.init_scale:
            seeds = torch.tensor([self.seeds[row] for row in rows])
            hashes = state_hashes(seeds, torch.tensor(starts)[:, None])
            states = self.model.initial_states(embeds, self.options.init_scale, hashes=hashes.to(self.device))
        else:
            states = self.model.initial_states(embeds, 0.0)
        is_shallow = self.cache.stored_recurrences > self._cached_depth()  # deeper planes hold the prompts alone
        depth = self._cached_depth() if is_shallow else self.options.num_recurrences
        for recurrence in range(1, depth + 1):
            states = self.model.core_step(states, embeds, window, recurrence)
        self.model.coda(states, window)
        self.costs.num_prefill_core_passes += depth
        return {row: self.cache.row(place) for place, row in enumerate(rows)}


def token_columns(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """Which columns of each row of [B, P] ids are tokens, not padding."""
    num_rows, num_columns = input_ids.shape
    if attention_mask is None:
        return [list(range(num_columns))] * num_rows
    if attention_mask.shape != input_ids.shape or not attention_mask[:, -1].all():
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, and a token in the last "
            f"column of every row (padding on the left), but has {tuple(attention_mask.shape)} or ends on padding. Set "
            f"`tokenizer.padding_side = 'left'`, and pass whole rows, those a cache holds too."
        )
    return [[i for i, is_token in enumerate(row) if is_token] for row in attention_mask.tolist()]
