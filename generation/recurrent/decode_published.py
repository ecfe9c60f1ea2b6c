"""The published diffusion-forcing sampler as its authors' code runs it (seal-rg/recurrent-pretraining, October 2025).

A reference for comparison. It takes one row. HABIT marks each quirk that `decode_diffusion_forcing` corrects.
W wavefront positions, E channels, V vocabulary.
"""

from typing import Any

import torch
from transformers import LogitsProcessorList

from ..transcript import Transcript
from .decode_diffusion_forcing import noise_share
from .freezing import latent_acceleration, latent_difference
from .options_recurrent import PublishedOptions
from .outputs_recurrent import Costs, RecurrentGenerateOutput, WavefrontStep


class PublishedChoice:
    """Chooses the next token of each of several prefixes: the likeliest, or a fresh draw at each call."""

    def __init__(self, processors: LogitsProcessorList, do_sample: bool, generator: torch.Generator | None):
        self.processors = processors
        self.do_sample = do_sample
        self.generator = generator

    def __call__(self, frozen_ids: list[int], logits: torch.Tensor) -> list[int]:
        """Tokens for logits [n, V], each processed as if it followed the frozen tokens, whatever its place (HABIT)."""
        if self.processors:
            logits = self.processors(torch.tensor([frozen_ids], device=logits.device).expand(len(logits), -1), logits)
        if self.do_sample:
            return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0].tolist()
        return logits.argmax(dim=-1).tolist()


class PublishedFreezing:
    """The published freeze criteria, which compare the states of consecutive decode steps.

    HABIT: stored states lack the positions frozen since, but are indexed from the wavefront's earlier start. After n
    tokens froze, a position is thus compared with the one n places to the right.
    """

    def __init__(self, options: PublishedOptions):
        self.options = options
        self.patience = options.num_recurrences // options.inner_recurrence
        self.kept: list[tuple[int, torch.Tensor]] = []  # start and states of the latest two steps
        self.velocity: torch.Tensor | None = None
        self.num_unchanged: dict[int, int] = {}

    def last_settled(
        self, step: int, start: int, states: torch.Tensor, old_ids: list[int], ids: list[int], num_new: int
    ) -> int | None:
        """The last place of the wavefront that may freeze, or None. All places before it freeze too (HABIT)."""
        criterion = self.options.freeze_criterion
        if criterion == "fixed":
            return min(self.options.headway, num_new) if step > self.patience else None
        if criterion == "token-stability":
            return self._last_stable(start, len(states), old_ids, ids)
        if not self.kept:
            return None
        (states, previous, *earlier), overlap = self._aligned(start, states)
        if criterion == "latent-difference":
            change = latent_difference(states, previous)
        elif criterion == "latent-acceleration-1":
            # HABIT: velocities are compared place by place, although tokens may have frozen in between.
            velocity, old_velocity = states - previous, self.velocity
            self.velocity = velocity
            overlap = 0 if old_velocity is None else min(overlap, len(old_velocity))
            old_velocity = velocity[:0] if old_velocity is None else old_velocity[:overlap]
            change = latent_acceleration(states[:overlap], velocity[:overlap], old_velocity)
        elif earlier:
            bend = states - 2 * previous + earlier[0]
            change = bend.norm(dim=-1) / (states.norm(dim=-1) + 1e-6)
        else:
            return None
        settled = (change < self.options.exit_threshold).nonzero().flatten().tolist()
        return settled[-1] if settled else None

    def _aligned(self, start: int, states: torch.Tensor) -> tuple[list[torch.Tensor], int]:
        """The states, and those of the previous step (for a second difference, of the previous two)."""
        num_earlier = 2 if self.options.freeze_criterion == "latent-acceleration-2" else 1
        rows = [states, *(kept[start - begun :] for begun, kept in reversed(self.kept[-num_earlier:]))]
        overlap = min(map(len, rows))
        return [row[:overlap] for row in rows], overlap

    def _last_stable(self, start: int, width: int, old_ids: list[int], ids: list[int]) -> int | None:
        settled = None
        for position in range(start, min(start + width, len(old_ids), len(ids))):
            # HABIT: counts all decode steps in which a draft stayed, even if it changed in between.
            self.num_unchanged.setdefault(position, 0)
            self.num_unchanged[position] += old_ids[position] == ids[position]
            if self.num_unchanged[position] > self.patience:
                settled = position - start
        return settled

    def keep(self, start: int, states: torch.Tensor) -> None:
        """Stores the remaining states of a step that began at `start`, for the next steps."""
        self.kept = [*self.kept[-1:], (start, states)]


class PublishedWavefront:
    """One text and the positions begun after it.

    Attributes:
        frozen: the prompt and the tokens frozen so far.
        ids: the frozen tokens and the drafts after them.
        start: position of the wavefront's first token, the last one frozen.
        states: [1, W, E].
        counts: recurrences of each position.
        fed_embeds: [1, W, E] the previous step's input embeddings of the core, for the remaining positions.
    """

    def __init__(self, model: Any, options: PublishedOptions, cache: Any, prompt: list[int], first_id: list[int]):
        self.model, self.options, self.cache = model, options, cache
        self.frozen = prompt + first_id
        self.ids, self.start = list(self.frozen), len(prompt)
        # HABIT: the first new position starts with the prompt's count of recurrences.
        self.counts = [options.num_recurrences] * len(self.frozen)
        self.blank = torch.zeros(1, 1, model.config.n_embd, dtype=model.dtype, device=cache.device)
        self.states = self.draw(self.blank)
        self.fed_embeds: torch.Tensor | None = None
        self.num_looked_at = 0

    @property
    def width(self) -> int:
        """W."""
        return self.states.shape[1]

    def draw(self, like: torch.Tensor) -> torch.Tensor:
        """Fresh initial states."""
        return self.model.initial_states(like, self.options.init_scale, self.options.generator)

    def recur(self, costs: Costs) -> torch.Tensor:
        """Runs `inner_recurrence` core passes of every position. Returns logits [W, V]."""
        options, width = self.options, self.width
        window = self.model.window_at([self.start], width, self.cache)
        fed_ids = torch.tensor([self.ids[self.start : self.start + width]], device=self.cache.device)
        embeds = self.model.prelude(fed_ids, window)
        before = embeds if self.fed_embeds is None else self.fed_embeds
        # HABIT: a position without an earlier embedding keeps its own, scaled down.
        mixed = (1 - options.embedding_ema) * embeds
        mixed[:, : before.shape[1]] += options.embedding_ema * before[:, :width]
        self.fed_embeds = mixed
        if options.state_noise:
            counts = self.counts[self.start : self.start + width]
            tried = torch.tensor(counts, dtype=self.states.dtype, device=self.cache.device)
            kept, fresh = noise_share(options.noise_schedule, options.state_noise, tried, options.num_recurrences)
            self.states = kept * self.states + fresh * self.draw(self.states)
        for inner in range(1, options.inner_recurrence + 1):
            self.states = self.model.core_step(self.states, mixed, window, inner)
            costs.add_core_pass(width, [0])
        for position in range(self.start, self.start + width):
            self.counts[position] += options.inner_recurrence
        return self.model.coda(self.states, window)[0]

    def add_headway(self) -> None:
        """Starts positions with random tokens, up to `max_wavefront`."""
        options = self.options
        size = (options.headway - 1,)
        extra = torch.randint(self.model.config.vocab_size, size, generator=options.generator).tolist()
        self.ids = (self.ids + extra)[: self.start + options.max_wavefront]
        begun = self.draw(self.blank.expand(1, options.headway, -1))
        self.states = torch.cat([self.states, begun], dim=1)[:, : options.max_wavefront]
        self.counts = (self.counts + [0] * (self.start + self.width))[: self.start + self.width]

    def freeze(self, last: int | None) -> list[int]:
        """Freezes the positions up to place `last` and returns their tokens."""
        newly_frozen = []
        if last is not None:
            num_before, self.frozen = len(self.frozen), self.ids[: self.start + last + 1]
            newly_frozen = self.frozen[num_before:]
            self.states = self.states[:, last:]
            self.start += last
        assert self.fed_embeds is not None
        self.fed_embeds = self.fed_embeds[:, last or 0 :]
        return newly_frozen

    def has_ended(self, has_frozen: bool, num_steps: int, eos_token_ids: set[int]) -> bool:
        """Whether this step is the last.

        HABIT: end tokens are sought only after `num_recurrences` steps, and only among this step's frozen tokens. The
        first step that freezes tokens also searches all tokens before, including the prompt. Criteria without states
        search the last `headway` frozen tokens.
        """
        if self.options.freeze_criterion.startswith("latent"):
            looked_at = self.frozen[self.num_looked_at :] if has_frozen else []
            self.num_looked_at += len(looked_at)
        else:
            looked_at = self.frozen[-self.options.headway :]
        has_end = num_steps > self.options.num_recurrences and not eos_token_ids.isdisjoint(looked_at)
        return has_end or num_steps > self.options.max_steps


@torch.no_grad()
def decode_published(
    model: Any,
    transcript: Transcript,
    options: PublishedOptions,
    cache: Any,
    choose: PublishedChoice,
    streamer: Any = None,
) -> RecurrentGenerateOutput:
    """Decodes one row. The text may exceed the transcript's `max_length` and run past its end token (HABIT)."""
    check_criteria(transcript)
    prompt_ids = transcript.ids[:, : transcript.prompt_length]
    prompt = prompt_ids[0].tolist()
    costs = Costs(1, options.num_recurrences)
    freezing = PublishedFreezing(options)
    trace = []

    # Prefill: the prompt at full depth. The first token is frozen at once.
    drawn = {"init_scale": options.init_scale, "generator": options.generator}
    read = model(prompt_ids, cache=cache, num_recurrences=options.num_recurrences, logits_to_keep=1, **drawn)
    first_id = choose(prompt, read.logits[0])
    costs.num_core_passes, costs.num_positions = 1, len(prompt)
    wavefront = PublishedWavefront(model, options, cache, prompt, first_id)
    if streamer is not None:
        streamer.put(torch.tensor(first_id))
    while len(wavefront.frozen) < transcript.max_length and len(wavefront.ids) <= model.config.block_size:
        start, width = wavefront.start, wavefront.width
        logits = wavefront.recur(costs)
        new_ids = choose(wavefront.frozen, logits[len(wavefront.frozen) - 1 - start :])
        old_ids, wavefront.ids = wavefront.ids, wavefront.frozen + new_ids
        wavefront.add_headway()
        states = wavefront.states[0, :width]
        last = freezing.last_settled(costs.num_steps, start, states, old_ids, wavefront.ids, len(new_ids))
        trace.append(WavefrontStep(start, old_ids[start : start + width], new_ids, last or 0))
        newly_frozen = wavefront.freeze(last)
        freezing.keep(start, wavefront.states[0])
        if streamer is not None and newly_frozen:
            streamer.put(torch.tensor(newly_frozen))
        if wavefront.has_ended(last is not None, costs.num_steps, transcript.eos_token_ids):
            break
        costs.add_step()

    places = range(len(wavefront.frozen) - len(prompt))
    counts = wavefront.counts
    costs.recurrences[0] = {place: (counts[len(prompt) + place :] or [0])[0] for place in places}
    sequences = torch.tensor([wavefront.frozen], device=prompt_ids.device)
    return costs.output(sequences, [len(places)], wavefront=trace if options.record_wavefront else None)


def check_criteria(transcript: Transcript) -> None:
    """Raises ValueError for stopping criteria, which the published code does not have."""
    if transcript.criteria:
        raise ValueError(
            f"`stopping_criteria`, `stop_strings` and `max_time` must be left out with `reference_compat` (the "
            f"published code stops only at end tokens), but {type(transcript.criteria[0]).__name__} was given. Leave "
            f"`reference_compat` out."
        )
