"""The published diffusion-forcing sampler as its authors' code runs it (seal-rg/recurrent-pretraining, October 2025).

Kept to be compared with: one row, and each of its habits that `decode_recurrent` mends is marked HABIT where it stands.
W wavefront positions, E channels, V vocabulary.
"""

from typing import Any

import torch
from transformers import LogitsProcessorList

from .freezing import latent_acceleration, latent_difference
from .options_recurrent import RecurrentOptions, noise_share
from .outputs_recurrent import Costs, RecurrentGenerateOutput, WavefrontStep


class ReferenceChoice:
    """The next token of each of several prefixes: the likeliest, or a fresh draw each time it is asked."""

    def __init__(self, processors: LogitsProcessorList, do_sample: bool, generator: torch.Generator | None):
        self.processors = processors
        self.do_sample = do_sample
        self.generator = generator

    def __call__(self, frozen_ids: list[int], logits: torch.Tensor) -> list[int]:
        """Tokens for logits [n, V], each processed behind the frozen tokens, wherever it stands (HABIT)."""
        if self.processors:
            logits = self.processors(torch.tensor([frozen_ids], device=logits.device).expand(len(logits), -1), logits)
        if self.do_sample:
            return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0].tolist()
        return logits.argmax(dim=-1).tolist()


class ReferenceFreezing:
    """The published freeze criteria, which look at one decode step's states beside the ones before.

    HABIT: earlier states were kept without the positions frozen since, but are counted from where the wavefront began
    then: after n tokens froze, a position is compared with the one n places on.
    """

    def __init__(self, options: RecurrentOptions):
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


@torch.no_grad()
def decode_reference(
    model: Any,
    prompt_ids: torch.Tensor,
    options: RecurrentOptions,
    cache: Any,
    choose: ReferenceChoice,
    max_new_tokens: int,
    eos_token_ids: set[int],
    streamer: Any = None,
) -> RecurrentGenerateOutput:
    """Decodes [1, P] ids; the text may run past `max_new_tokens` and past its end (HABIT)."""
    prompt = prompt_ids[0].tolist()
    device, num_recurrences = prompt_ids.device, options.num_recurrences
    draw = lambda like: model.initial_states(like, options.init_scale, options.generator)  # noqa: E731
    costs = Costs(1, num_recurrences)
    freezing = ReferenceFreezing(options)
    trace = []

    # Prefill: the prompt at full depth. Its token is frozen at once.
    logits = model(
        prompt_ids,
        cache=cache,
        num_recurrences=num_recurrences,
        init_scale=options.init_scale,
        generator=options.generator,
        logits_to_keep=1,
    ).logits[0]
    costs.num_core_passes, costs.num_positions = 1, len(prompt)
    frozen = prompt + choose(prompt, logits)
    start, ids = len(prompt), list(frozen)
    counts = [num_recurrences] * len(frozen)  # HABIT: the first new position counts the prompt's recurrences as its own
    blank = torch.zeros(1, 1, model.config.n_embd, dtype=model.dtype, device=device)
    states = draw(blank)
    old_embeds, num_looked_at = None, 0

    while len(frozen) - len(prompt) < max_new_tokens and len(ids) <= model.config.block_size:
        width = states.shape[1]
        window = model.window_at([start], width, cache)
        embeds = model.prelude(torch.tensor([ids[start : start + width]], device=device), window)
        old_embeds = embeds if old_embeds is None else old_embeds
        # HABIT: a position with no earlier embedding is left with its own, shrunk.
        mixed = (1 - options.embedding_ema) * embeds
        mixed[:, : old_embeds.shape[1]] += options.embedding_ema * old_embeds[:, :width]
        if options.state_noise:
            tried = torch.tensor(counts[start : start + width], dtype=states.dtype, device=device)
            kept, fresh = noise_share(options.noise_schedule, options.state_noise, tried, num_recurrences)
            states = kept * states + fresh * draw(states)
        for inner in range(1, options.inner_recurrence + 1):
            states = model.core_step(states, mixed, window, inner)
            costs.add_core_pass(width, [0])
        for position in range(start, start + width):
            counts[position] += options.inner_recurrence
        new_ids = choose(frozen, model.coda(states, window)[0, len(frozen) - 1 - start :])
        old_ids, ids = ids, frozen + new_ids

        # Headway, cut where the wavefront is full.
        extra = torch.randint(model.config.vocab_size, (options.headway - 1,), generator=options.generator).tolist()
        ids = (ids + extra)[: start + options.max_wavefront]
        states = torch.cat([states, draw(blank.expand(1, options.headway, -1))], dim=1)[:, : options.max_wavefront]
        counts = (counts + [0] * (start + states.shape[1]))[: start + states.shape[1]]

        last = freezing.last_settled(costs.num_steps, start, states[0, :width], old_ids, ids, len(new_ids))
        num_frozen = 0 if last is None else last
        trace.append(WavefrontStep(start, old_ids[start : start + width], new_ids, num_frozen))
        newly_frozen = []
        if last is not None:
            before, frozen = len(frozen), ids[: start + last + 1]
            newly_frozen = frozen[before:]
            states = states[:, last:]
        old_embeds = mixed[:, num_frozen:]
        freezing.keep(start, states[0])
        start += num_frozen
        if streamer is not None and newly_frozen:
            streamer.put(torch.tensor(newly_frozen))
        # HABIT: the end of the text is looked for late, and only among the tokens frozen in this very step (the first
        # that freezes any stands for all before it, the prompt too), or in the last one where no states are compared.
        if options.freeze_criterion.startswith("latent"):
            looked_at = frozen[num_looked_at:] if last is not None else []
            num_looked_at += len(looked_at)
        else:
            looked_at = frozen[-options.headway :]
        has_ended = costs.num_steps > num_recurrences and not eos_token_ids.isdisjoint(looked_at)
        if has_ended or costs.num_steps > options.max_steps:
            break
        costs.add_step()

    places = range(len(frozen) - len(prompt))
    costs.recurrences[0] = {place: (counts[len(prompt) + place :] or [0])[0] for place in places}
    sequences = torch.tensor([frozen], device=device)
    return costs.output(sequences, [len(places)], wavefront=trace if options.record_wavefront else None)
