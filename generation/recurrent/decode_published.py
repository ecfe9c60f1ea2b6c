"""The published diffusion-forcing sampler as its authors' code runs it (seal-rg/recurrent-pretraining, October 2025).

Kept to be compared with. It takes one row. Each habit that `decode_diffusion_forcing` mends is marked HABIT.
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
    """The next token of each of several prefixes: the likeliest, or a fresh draw each time it is asked."""

    def __init__(self, processors: LogitsProcessorList, do_sample: bool, generator: torch.Generator | None):
        self.processors = processors
        self.do_sample = do_sample
        self.generator = generator

    def __call__(self, frozen_ids: list[int], logits: torch.Tensor) -> list[int]:
        """Tokens for logits [n, V], each processed as if it followed the frozen tokens, wherever it stands (HABIT)."""
        if self.processors:
            logits = self.processors(torch.tensor([frozen_ids], device=logits.device).expand(len(logits), -1), logits)
        if self.do_sample:
            return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0].tolist()
        return logits.argmax(dim=-1).tolist()


class PublishedFreezing:
    """The published freeze criteria, which look at one decode step's states beside the ones before.

    HABIT: earlier states were kept without the positions frozen since, but are counted from where the wavefront began
    then: after n tokens froze, a position is compared with the one n places on.
    """

    def __init__(self, options: PublishedOptions):
        self.options = options
        self.patience = options.num_recurrences // options.inner_recurrence
        self.kept: list[tuple[int, torch.Tensor]] = []  # of the latest two steps: where they began, what they kept
        self.velocity: torch.Tensor | None = None
        self.num_unchanged: dict[int, int] = {}

    def last_settled(
        self, step: int, start: int, states: torch.Tensor, old_ids: list[int], ids: list[int], num_new: int
    ) -> int | None:
        """The last place of the wavefront that may freeze, or None; all before it freeze too (HABIT)."""
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
            # HABIT: movements are compared place by place, whatever froze between them.
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
        """The states, and those kept of the step before (and, for a second difference, the one before that)."""
        num_earlier = 2 if self.options.freeze_criterion == "latent-acceleration-2" else 1
        rows = [states, *(kept[start - begun :] for begun, kept in reversed(self.kept[-num_earlier:]))]
        overlap = min(map(len, rows))
        return [row[:overlap] for row in rows], overlap

    def _last_stable(self, start: int, width: int, old_ids: list[int], ids: list[int]) -> int | None:
        settled = None
        for position in range(start, min(start + width, len(old_ids), len(ids))):
            # HABIT: decode steps in which a draft stood are added up, whether or not it changed in between.
            self.num_unchanged.setdefault(position, 0)
            self.num_unchanged[position] += old_ids[position] == ids[position]
            if self.num_unchanged[position] > self.patience:
                settled = position - start
        return settled

    def keep(self, start: int, states: torch.Tensor) -> None:
        """Remember what is left of a step that began at `start`, for the next ones."""
        self.kept = [*self.kept[-1:], (start, states)]


class PublishedWavefront:
    """One text and the positions begun after it.

    Attributes:
        frozen: the prompt and the tokens frozen so far.
        ids: those, and what is drafted after them.
        start: position of the wavefront's first token, the last one frozen.
        states: [1, W, E].
        counts: recurrences of each position.
        fed_embeds: [1, W, E] the embeddings that the step before fed to the core, of the positions still there.
    """

    def __init__(self, model: Any, options: PublishedOptions, cache: Any, prompt: list[int], first_id: list[int]):
        self.model, self.options, self.cache = model, options, cache
        self.frozen = prompt + first_id
        self.ids, self.start = list(self.frozen), len(prompt)
        # HABIT: the first new position counts the prompt's recurrences as its own.
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
        """`inner_recurrence` core passes of every position; logits [W, V]."""
        options, width = self.options, self.width
        window = self.model.window_at([self.start], width, self.cache)
        fed_ids = torch.tensor([self.ids[self.start : self.start + width]], device=self.cache.device)
        embeds = self.model.prelude(fed_ids, window)
        before = embeds if self.fed_embeds is None else self.fed_embeds
        # HABIT: a position with no earlier embedding is left with its own, shrunk.
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
        """Begins positions with random tokens, cut where the wavefront is full."""
        options = self.options
        size = (options.headway - 1,)
        extra = torch.randint(self.model.config.vocab_size, size, generator=options.generator).tolist()
        self.ids = (self.ids + extra)[: self.start + options.max_wavefront]
        begun = self.draw(self.blank.expand(1, options.headway, -1))
        self.states = torch.cat([self.states, begun], dim=1)[:, : options.max_wavefront]
        self.counts = (self.counts + [0] * (self.start + self.width))[: self.start + self.width]

    def freeze(self, last: int | None) -> list[int]:
        """Freezes the positions up to place `last`, and returns their tokens."""
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
        """Whether the step that just froze tokens, or none, is the last.

        HABIT: the end of the text is looked for late, and only among the tokens frozen in this very step (the first
        step that freezes any stands for all before it, the prompt too), or in the last one where no states are
        compared.
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
    """Decodes one row; the text may run past the transcript's `max_length` and past its end (HABIT)."""
    check_criteria(transcript)
    prompt_ids = transcript.ids[:, : transcript.prompt_length]
    prompt = prompt_ids[0].tolist()
    costs = Costs(1, options.num_recurrences)
    freezing = PublishedFreezing(options)
    trace = []

    # Prefill: the prompt at full depth. Its token is frozen at once.
    drawn = {"init_scale": options.init_scale, "generator": options.generator}
    read = model(prompt_ids, cache=cache, num_recurrences=options.num_recurrences, logits_to_keep=1, **drawn)
    first_id = choose(prompt, read.logits[0])
    costs.num_core_passes, costs.num_positions = 1, len(prompt)
    wavefront = PublishedWavefront(model, options, cache, prompt, first_id)
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
    """Raises where the text is to end by what the published code does not know."""
    if transcript.criteria:
        raise ValueError(
            f"`stopping_criteria`, `stop_strings` and `max_time` must be left out under `reference_compat` (the "
            f"published code knows end tokens alone), but {type(transcript.criteria[0]).__name__} was given. Leave "
            f"`reference_compat` out."
        )
