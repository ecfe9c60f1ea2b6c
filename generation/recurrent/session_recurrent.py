"""State common to all decoders of recurrent-depth models: prompts, prefill, cache, random draws, choice of tokens.

B rows, A rows still being written, P prompt columns, V vocabulary.
"""

from typing import Any

import torch

from ..processed_scores import ProcessedScores, refuse_none_allowed
from ..stock_model import CACHE
from ..transcript import Transcript
from .draws_recurrent import Draws
from .freezing import latent_difference
from .initial_states import InitialStates
from .options_recurrent import RecurrentOptions, check
from .outputs_recurrent import Costs, RecurrentGenerateOutput


class Prompts:
    """The prompts of one call, without their padding.

    Attributes:
        num_columns: P, of the padded batch.
        columns: the token columns of each row.
        ids: the tokens of each row.
        pads: padding columns of each row. The column of a new token is its position plus the pad.
    """

    def __init__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None):
        self.num_columns = input_ids.shape[1]
        self.columns = token_columns(input_ids, attention_mask)
        self.ids = [[ids[i] for i in where] for ids, where in zip(input_ids.tolist(), self.columns, strict=True)]
        self.pads = [self.num_columns - len(ids) for ids in self.ids]

    def check_length(self, max_length: int, block_size: int) -> None:
        """Raises ValueError if a text may exceed the length of training."""
        longest = max_length - min(self.pads)
        if longest > block_size:
            raise ValueError(
                f"Prompt and new tokens together must be at most {block_size} (`config.block_size`, the "
                f"length this checkpoint was trained for), but may reach {longest}. Lower `max_new_tokens`."
            )


class Session:
    """One call of `generate`: its rows without padding, and their costs.

    Attributes:
        parts: computes prelude, core steps and coda after the prompt: the model, or its compiled form of few shapes.
        rows: the rows of the batch that are still being written.
        pads: padding columns of each of these rows.
        cache, draws: cache and random draws of these rows.
        seeds: one per row of the batch.
        states: draws initial states of these rows.
        set_aside: cache contents of the rows that have ended, if the cache is returned.
        steps: logits and scores of each token, if the caller requested them.
    """

    def __init__(
        self,
        model: Any,
        parts: Any,
        prompts: Prompts,
        transcript: Transcript,
        scores: ProcessedScores,
        options: Any,
        cache: Any,
        do_sample: bool,
        returns_cache: bool = False,
    ):
        assert transcript.max_length is not None, "generate always sets a maximum length"
        self.model, self.parts = model, parts
        self.options = options
        self.transcript, self.scores, self.steps = transcript, scores, transcript.token_scores
        self.draft_scores = scores.of_drafts()
        self.is_prefix_free = not self.draft_scores.depend_on_prefix
        self.do_sample = do_sample
        self.device, self.dtype = transcript.ids.device, model.dtype  # slow properties of the model
        self.prompts, self.num_columns = prompts, prompts.num_columns
        self.rows, self.pads = list(range(len(prompts.ids))), list(prompts.pads)
        self.cache, self.returns_cache = cache, returns_cache
        self.set_aside: dict[int, list[torch.Tensor]] = {}
        self.num_cached = self._take_over(cache)
        self.seeds = options.seeds(len(prompts.ids), do_sample)
        self.draws = Draws(self.seeds, self.device)
        self.states = InitialStates(model, options.init_scale, self.draws, self.dtype)
        self.costs = Costs(len(prompts.ids), options.num_recurrences)
        prompts.check_length(transcript.max_length, model.config.block_size)

    def _take_over(self, cache: Any) -> list[int]:
        """The number of cached tokens of each prompt. Removes padding from the cache, as decoding uses none."""
        length = cache.get_seq_length()
        if length:
            check_cache(self.options, cache, len(self.rows), self.num_columns)
            held = [[i for i in where if i < length] for where in self.prompts.columns]
            cache.gather(held)
            return [len(where) for where in held]
        return [0] * len(self.rows)

    def prefill(self, exit_threshold: float = 0.0, is_filled: bool = False) -> torch.Tensor:
        """Reads the prompts and returns logits [B, 1, V].

        Recurs to full depth, or until the mean change of the states is below `exit_threshold`.
        With `is_filled`, a row of a batch equals the row alone (`filled_window` of the model).
        """
        starts = self.num_cached
        unread = [prompt[start:] for prompt, start in zip(self.prompts.ids, starts, strict=True)]
        self.costs.num_prefill_positions = sum(map(len, unread))
        longest = max(map(len, unread))
        if is_filled:
            longest = self.model.filled_width(longest)
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in unread], device=self.device)
        window = (self.model.filled_window if is_filled else self.model.window_at)(starts, longest, self.cache)
        embeds = self.model.prelude(ids, window)
        states = self.states.of(embeds, starts)
        for recurrence in range(1, self.options.num_recurrences + 1):
            before, states = states, self.model.core_step(states, embeds, window, recurrence)
            if exit_threshold and latent_difference(states, before).mean().item() < exit_threshold:
                break
        num_kept = self.model.filled_width(1) if is_filled else 1
        last = torch.tensor([[len(prompt) - 1] * num_kept for prompt in unread], device=self.device)
        return self.model.coda(states, window, logits_to_keep=last)[:, :1]

    def process_packed(self, logits: torch.Tensor, rows: list[int], columns: list[int]) -> torch.Tensor:
        """Processed scores of [n, V] logits of drafts. Logits i follow the first columns[i] columns of row rows[i].

        `rows` index the rows still being written. Processors see the whole batch, as in plain decoding.
        """
        ids, active, processors = self.transcript.ids, self.transcript.active, self.draft_scores.processors
        if self.is_prefix_free:
            return processors(ids[:1, :1].expand(len(logits), 1), logits)
        scores = torch.empty_like(logits)
        for column in set(columns):
            index = [i for i, other in enumerate(columns) if other == column]
            in_batch = [active[rows[i]] for i in index]
            batch = torch.zeros(len(ids), logits.shape[1], device=logits.device)
            batch[in_batch] = logits[index]
            scores[index] = processors(ids[:, :column], batch)[in_batch]
        return scores

    def write_draft(self, row: int, position: int, token: int) -> None:
        """Writes a drafted token into the prefix that processors read."""
        if not self.is_prefix_free:
            self.transcript.ids[self.transcript.active[row], position + self.pads[row]] = token

    def draw_gumbel(self, rows: list[int], positions: list[int]) -> torch.Tensor:
        """[n, V] Gumbel noise for sampling the token after each position."""
        return self.draws.gumbel(rows, positions, self.model.config.vocab_size)

    def choose(self, logits: torch.Tensor, positions: list[int]) -> list[int]:
        """Chooses and writes the tokens after `positions` from [A, 1, V] logits."""
        scores = self.scores(logits)
        favoured = with_noise(self, scores, positions)
        ids = favoured.argmax(dim=-1).tolist()
        self.keep_steps(ids, logits, scores)
        self.transcript.write(ids)
        return [token for (token,) in ids]

    def keep_steps(self, frozen_ids: list[list[int]], logits: torch.Tensor, scores: torch.Tensor) -> None:
        """Records the logits and scores [A, n, V] of each row's frozen tokens, its first places, if requested."""
        if self.steps is not None:
            for place, ids in enumerate(frozen_ids):
                self.steps.add(self.rows[place], logits[place, : len(ids)], scores[place, : len(ids)])

    def show_draft(self, row: int, draft_ids: list[int]) -> None:
        """Shows the tokens after the row's last frozen token to a streamer with `put_draft`."""
        if (
            draft_ids
            and hasattr(self.transcript.streamer, "put_draft")
            and not self.transcript.is_ended[self.rows[row]]
        ):
            self.transcript.show_draft(torch.tensor([[0, *draft_ids]]))

    def keep_rows(self, places: list[int]) -> None:
        """Keeps the rows at `places` and drops the rest, which have ended."""
        if self.returns_cache:
            self.set_aside |= {self.rows[i]: self.cache.row(i) for i in range(len(self.rows)) if i not in places}
        self.rows = [self.rows[place] for place in places]
        self.pads = [self.pads[place] for place in places]
        self.cache.keep_rows(places)
        self.draws.keep_rows(places)

    def place_of(self, row: int, position: int) -> int:
        """The index of a position among the new tokens of its row; `row` indexes the rows still being written."""
        return position + self.pads[row] - self.num_columns

    def output(self, **extra) -> RecurrentGenerateOutput:
        """The sequences, their costs, and the cache."""
        num_new_tokens = self.transcript.num_new_tokens
        if self.steps is not None:
            extra["logits"], extra["scores"] = self.steps.columns(num_new_tokens)
        if self.returns_cache:
            extra[CACHE] = final_cache(self)
        return self.costs.output(self.transcript.sequences(), num_new_tokens, **extra)


def choose_first(session: Session, logits: torch.Tensor) -> list[int]:
    """Chooses and writes the first tokens from [B, 1, V] logits."""
    return session.choose(logits, [session.num_columns - pad - 1 for pad in session.pads])


def with_noise(session: Session, scores: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Scores [A, 1, V], whose argmax is a sample if one is wanted."""
    if not session.do_sample:
        return scores
    refuse_none_allowed(scores, session.scores)
    return scores + session.draw_gumbel(list(range(len(scores))), positions)[:, None]


def write_in_order(
    session: Session, logits: torch.Tensor, starts: list[int], draft_ids: list[list[int]], done: list[int]
) -> list[list[int]]:
    """Chooses and writes each row's tokens after `starts` from [A, n, V] logits, but for the first `done`.

    Processors are asked once a token, in order. Rows advance together, as far as all drafts stand and none ends.
    """
    written: list[list[int]] = [[] for _ in starts]
    rows = torch.arange(len(starts), device=session.device)
    for i in range(min(len(draft) - num for draft, num in zip(draft_ids, done, strict=True))):
        places = [num + i for num in done]
        after = [start + place for start, place in zip(starts, places, strict=True)]
        ids = session.choose(logits[rows, torch.tensor(places, device=session.device)][:, None], after)
        written = [[*before, token] for before, token in zip(written, ids, strict=True)]
        has_ended = any(session.transcript.is_ended[row] for row in session.rows)
        if has_ended or ids != [draft[place] for draft, place in zip(draft_ids, places, strict=True)]:
            break
    return written


def final_cache(session: Session) -> Any:
    """The cache of a finished decode, with the columns of the sequences except the last, which was not read."""
    cache, num_columns = session.cache, session.num_columns
    ends = session.transcript.lengths
    columns = [[*where, *range(num_columns, end)] for where, end in zip(session.prompts.columns, ends, strict=True)]
    length = max(ends) - 1
    columns = [[column for column in where if column < length] for where in columns]
    early = [row for row, end in enumerate(ends) if end <= length]
    if all(where == list(range(length)) for where in columns) and not session.set_aside:
        cache.lengths = [length] * len(columns)
    else:
        held = session.set_aside | {row: cache.row(place) for place, row in enumerate(session.rows)}
        if early:
            held |= with_last_tokens(session, early, held, [columns[row][:-1] for row in early])
        cache.scatter([held[row] for row in range(len(columns))], columns, length)
    cache.note_depth(session.options.cached_depth)
    return cache


def with_last_tokens(
    session: Session, rows: list[int], held: dict[int, list[torch.Tensor]], columns: list[list[int]]
) -> dict[int, list[torch.Tensor]]:
    """The cache contents (`RecurrentCache.row`) of these rows of the batch, after reading their last tokens too.

    `columns` are those of the tokens before the last. The last token is read at full depth, like a prompt, or at the
    stored depth of the tokens before it.
    """
    model, cache, options = session.model, session.cache, session.options
    starts = [len(where) for where in columns]
    cache.scatter([held[row] for row in rows], [list(range(start)) for start in starts], max(starts))
    cache.lengths = starts
    ends = [session.transcript.lengths[row] - 1 for row in rows]
    ids = session.transcript.ids[torch.tensor(rows), torch.tensor(ends)][:, None]
    window = model.window_at(starts, 1, cache)
    embeds = model.prelude(ids, window)
    states = session.states.of(embeds, starts, [session.seeds[row] for row in rows])
    is_shallow = cache.stored_recurrences > options.cached_depth  # deeper planes have only the prompts
    depth = options.cached_depth if is_shallow else options.num_recurrences
    model.coda(model.core_steps(states, embeds, window, depth), window)
    session.costs.num_prefill_core_passes += depth
    return {row: cache.row(place) for place, row in enumerate(rows)}


def check_cache(options: RecurrentOptions, cache: Any, batch_size: int, num_columns: int) -> None:
    """Raises ValueError if this decode cannot continue from the caller's cache."""
    length, stored = cache.get_seq_length(), cache.stored_recurrences
    check(CACHE, cache.batch_size == batch_size, f"of {cache.batch_size}", f"of {batch_size} rows", "the batch's")
    check(CACHE, length < num_columns, f"of {length}", f"of fewer than {num_columns} tokens",
          "`input_ids`, which begin with the cached tokens and have at least one more")  # fmt: skip
    is_right = options.policy == "autoregressive" or stored == options.stored_recurrences
    check(CACHE, is_right, f"of {stored}", f"of {options.stored_recurrences} recurrences a token",
          f"what `policy={options.policy!r}` reads with this `kv_cache`")  # fmt: skip
    needed = min(stored, options.num_recurrences)
    check(CACHE, stored == 1 or cache.depth >= needed, f"of {cache.depth}", f"of tokens with {needed} recurrences",
          "the depth of reading the prompt")  # fmt: skip


def token_columns(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The columns of each row of [B, P] ids that are tokens, not padding."""
    num_rows, num_columns = input_ids.shape
    if attention_mask is None:
        return [list(range(num_columns))] * num_rows
    if attention_mask.shape != input_ids.shape or not attention_mask[:, -1].all():
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, and a token in the last "
            f"column of every row (padding on the left), but has {tuple(attention_mask.shape)} or ends on padding. Set "
            f"`tokenizer.padding_side = 'left'`, and pass whole rows, including cached tokens."
        )
    return [[i for i, is_token in enumerate(row) if is_token] for row in attention_mask.tolist()]
