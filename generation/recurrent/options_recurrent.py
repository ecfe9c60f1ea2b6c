"""How a recurrent-depth model decodes: the keywords of `generate`, validated once, and the paper's presets."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

import torch

from ..cache_name import CACHE

EVERY_RECURRENCE = "every-recurrence"
LATEST_ONLY = "latest-only"

PAPER_RECURRENCES = 32

COMMON = {"num_recurrences", "init_scale", "generator", "seed"}
WAVEFRONT = {
    "inner_recurrence",
    "headway",
    "max_wavefront",
    "exit_threshold",
    "embedding_ema",
    "state_noise",
    "noise_schedule",
    "freeze_criterion",
}
POLICIES = {
    "autoregressive": COMMON | {"kv_cache"},
    "adaptive": COMMON | {"exit_threshold", "reference_compat"},
    "self-speculative": COMMON | {"draft_recurrences", "draft_length", "kv_cache"},
    "diffusion-forcing": COMMON
    | WAVEFRONT
    | {"kv_cache", "max_recurrences", "reference_compat", "max_steps", "record_wavefront"},
    "exact": COMMON | {"draft_recurrences", "max_wavefront", "record_wavefront"},
}
NOISE_SCHEDULES = ("constant", "dampened", "linear", "sqrt")
FREEZE_CRITERIA = (
    "latent-difference",
    "latent-acceleration-1",
    "latent-acceleration-2",
    "token-stability",
    "fixed",
)
# The rows of tables 1 and 2 of arXiv 2510.14961.
PRESETS: dict[str, dict[str, Any]] = {
    "static-r4": {"policy": "autoregressive", "num_recurrences": 4},
    "static-r8": {"policy": "autoregressive", "num_recurrences": 8},
    "static-r32": {"policy": "autoregressive", "num_recurrences": 32},
    "static-r64": {"policy": "autoregressive", "num_recurrences": 64},
    "adaptive": {"policy": "adaptive", "exit_threshold": 0.03},
    "self-speculative": {"policy": "self-speculative", "draft_recurrences": (4,), "draft_length": 4},
    "diffusion-forcing-r2": {"policy": "diffusion-forcing", "inner_recurrence": 2, "state_noise": 0.5},
    "diffusion-forcing-r4": {"policy": "diffusion-forcing", "inner_recurrence": 4, "state_noise": 0.0},
}


@dataclass
class RecurrentOptions:
    """The decode options of one call of `generate`; the defaults of diffusion forcing are its paper's.

    Attributes:
        policy: "autoregressive" (every token at full depth), "adaptive" (each token until its state settles),
            "self-speculative" (shallow drafts, full-depth verification), "diffusion-forcing" (the paper's sampler:
            fast, not the same text) or "exact" (a wavefront whose text is full-depth decoding's).
        num_recurrences: core passes of full depth; the checkpoint's `mean_recurrence` where absent.
        init_scale: of the random initial states; 0 makes them zeros.
        seed: of all that is drawn (initial states, noise, samples), one integer a row, so that a row's text does not
            depend on the batch it is in; a single integer s gives row b the seed s + b. Where absent, the generator
            draws it for sampling, and greedy decoding takes 0. Plain decoding ("autoregressive") samples with
            transformers' own loop, which knows no seeds.
        generator: draws the seeds; the global one where absent.
        kv_cache: "every-recurrence", "latest-only" or the number of latest recurrences kept. Where absent,
            "latest-only" for diffusion forcing, "every-recurrence" for plain decoding and self-speculation (which
            writes the text of plain decoding with it alone). Diffusion forcing numbers the recurrences it stores afresh
            at each decode step, 1 to `inner_recurrence`.
        inner_recurrence: core passes between two decodes.
        headway: positions added a decode step.
        max_wavefront: limit of positions begun and not frozen.
        exit_threshold: relative change of a state under which it has settled.
        embedding_ema: share of the previous decode step's prelude output in this one's; positions seen for the first
            time take theirs whole.
        state_noise: share of fresh initial state mixed into every state before its core passes.
        noise_schedule: of that share b at a position with n recurrences: "constant" b, "dampened" b/(1+n), "linear"
            b*(1-n/num_recurrences), "sqrt" b/(1+n) mixed with square roots, which keep the variance.
        freeze_criterion: one of `FREEZE_CRITERIA`, see generation/freezing.py.
        max_recurrences: recurrences of a position since its token last changed after which its state is no longer
            waited for, so that none that never comes to rest can stall a text: the first position of the wavefront is
            begun anew and freezes at `num_recurrences`, as plain decoding would. Where absent, `num_recurrences`, but
            not fewer than the paper's 32.
        draft_recurrences: depths at which a token is drafted, then redrafted ("exact": any number of them, rising,
            below full depth; "self-speculative": one).
        draft_length: tokens drafted for one verification ("self-speculative").
        reference_compat: decode as the authors' published code does, its quirks included; one row. ("adaptive": the
            prompt too is read only until its states have settled on average.)
        max_steps: decode steps after which `reference_compat` gives up, as the published code does.
        record_wavefront: keep each decode step's wavefront of the first row in the output.
    """

    policy: str = "autoregressive"
    num_recurrences: int = None  # type: ignore[assignment]  # from_keywords fills in what is None
    init_scale: float = 1.0
    seed: int | list[int] | None = None
    generator: torch.Generator | None = None
    kv_cache: str | int = None  # type: ignore[assignment]
    inner_recurrence: int = 4
    headway: int = 1
    max_wavefront: int = 128
    exit_threshold: float = 0.03
    embedding_ema: float = 0.1
    state_noise: float = 0.0
    noise_schedule: str = "dampened"
    freeze_criterion: str = "latent-difference"
    max_recurrences: int = None  # type: ignore[assignment]
    draft_recurrences: tuple[int, ...] = None  # type: ignore[assignment]  # an int is a tuple of one
    draft_length: int = 4
    reference_compat: bool = False
    max_steps: int = 4096
    record_wavefront: bool = False

    @classmethod
    def names(cls) -> set[str]:
        """The keywords, and "preset", which names several of them at once."""
        return {field.name for field in fields(cls)} | {"preset"}

    @classmethod
    def from_layers(cls, layers: list[dict[str, Any]], mean_recurrence: int) -> "RecurrentOptions":
        """Options of keywords, the config passed with them and the model's own, in this order of precedence.

        A layer that names another policy (or a preset) sets aside what lower ones say to theirs alone.
        """
        given: dict[str, Any] = {}
        for layer in layers:
            if given.keys() & {"policy", "preset"}:
                policy = given.get("policy") or PRESETS.get(given.get("preset"), {}).get("policy", "autoregressive")
                layer = {name: layer[name] for name in layer.keys() & POLICIES.get(policy, set())}
            given = layer | given
        return cls.from_keywords(given, mean_recurrence)

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any], mean_recurrence: int) -> "RecurrentOptions":
        """Options of the keywords given, a preset's filled in where they leave them open, all of them checked.

        None stands for the default, as in transformers.
        """
        given = {name: value for name, value in keywords.items() if value is not None}
        preset = given.pop("preset", None)
        if preset is not None:
            _check(
                "preset", preset in list(PRESETS), preset, f"one of {sorted(PRESETS)}", "the rows of the paper's table"
            )
            given = PRESETS[preset] | given
        options = cls(**given)
        _check(
            "policy",
            options.policy in list(POLICIES),
            options.policy,
            f"one of {sorted(POLICIES)}",
            "the decoders here",
        )
        unused = sorted(set(given) - {"policy"} - POLICIES[options.policy])
        if unused:
            raise ValueError(
                f"`{unused[0]}` says nothing to `policy={options.policy!r}`, which takes "
                f"{sorted(POLICIES[options.policy])}. Leave it out, or choose another policy."
            )
        if "max_steps" in given and not options.reference_compat:
            raise ValueError(
                f"`max_steps` is {options.max_steps}, but only `reference_compat` reads it. Give both or neither."
            )
        options._fill(mean_recurrence)
        options._validate()
        return options

    def _fill(self, mean_recurrence: int) -> None:
        if self.num_recurrences is None:
            self.num_recurrences = mean_recurrence
        for name in ("num_recurrences", "inner_recurrence", "headway", "max_wavefront", "draft_length", "max_steps"):
            value = getattr(self, name)
            _check(name, _is_whole(value) and value >= 1, value, "a whole number from 1 up", "a count")
        if self.kv_cache is None:
            shares = self.policy in ("diffusion-forcing", "adaptive")
            self.kv_cache = LATEST_ONLY if shares else EVERY_RECURRENCE
        if self.max_recurrences is None:
            self.max_recurrences = max(self.num_recurrences, PAPER_RECURRENCES, self.inner_recurrence)
        if self.draft_recurrences is None:
            wanted = (4,) if self.policy == "self-speculative" else (2, 8)
            depths = tuple(depth for depth in wanted if depth < self.num_recurrences)
            self.draft_recurrences = depths or (max(1, self.num_recurrences - 1),)
        elif isinstance(self.draft_recurrences, list | tuple):
            self.draft_recurrences = tuple(self.draft_recurrences)
        else:
            self.draft_recurrences = (self.draft_recurrences,)

    def _validate(self) -> None:
        given = list(self.seed) if isinstance(self.seed, list | tuple) else [0 if self.seed is None else self.seed]
        are_seeds = all(_is_whole(one) and 0 <= one < 2**62 for one in given)
        _check("seed", are_seeds, self.seed, "an integer from 0 to 2^62 - 1, or one for each row", "what is hashed")
        _check("seed", self.seed is None or self.generator is None, self.seed, "absent where `generator` is given",
               "the generator draws the seeds")  # fmt: skip
        is_generator = self.generator is None or isinstance(self.generator, torch.Generator)
        _check("generator", is_generator, self.generator, "a `torch.Generator`", "it draws the seeds")
        for name in ("reference_compat", "record_wavefront"):
            value = getattr(self, name)
            _check(name, isinstance(value, bool), value, "True or False")
        for name in ("embedding_ema", "state_noise"):
            value = getattr(self, name)
            _check(name, _is_number(value) and 0 <= value <= 1, value, "between 0 and 1", "a share of a mixture")
        for name in ("init_scale", "exit_threshold"):
            value = getattr(self, name)
            _check(name, _is_number(value) and value >= 0, value, "a number of 0 or more", "a relative size")
        _check(
            "noise_schedule", self.noise_schedule in NOISE_SCHEDULES, self.noise_schedule, f"one of {NOISE_SCHEDULES}"
        )
        criterion = self.freeze_criterion
        _check("freeze_criterion", criterion in FREEZE_CRITERIA, criterion, f"one of {FREEZE_CRITERIA}")
        stored = self.kv_cache
        is_known = stored in (EVERY_RECURRENCE, LATEST_ONLY) or (_is_whole(stored) and stored >= 1)
        _check("kv_cache", is_known, stored, f"{EVERY_RECURRENCE!r}, {LATEST_ONLY!r} or a number of recurrences")
        least = self.inner_recurrence
        is_enough = _is_whole(self.max_recurrences) and self.max_recurrences >= least
        _check("max_recurrences", is_enough, self.max_recurrences, f"a whole number from {least} up",
               "`inner_recurrence`: a position gets that many before it is looked at")  # fmt: skip
        if self.policy in ("exact", "self-speculative"):
            self._validate_drafts()

    def _validate_drafts(self) -> None:
        depths = self.draft_recurrences
        are_depths = all(map(_is_whole, depths))
        _check("draft_recurrences", are_depths, depths, "a whole number, or a list of them", "core passes of a draft")
        if self.num_recurrences > 1:
            rising = all(a < b for a, b in itertools.pairwise(depths))
            is_valid = bool(depths) and rising and depths[0] >= 1 and depths[-1] < self.num_recurrences
            _check("draft_recurrences", is_valid, depths, f"rising depths from 1 to {self.num_recurrences - 1}",
                   "`num_recurrences`, the depth that verifies them")  # fmt: skip
        if self.policy == "self-speculative":
            _check("draft_recurrences", len(depths) == 1, depths, "a single depth", "this policy drafts once")

    def seeds(self, batch_size: int, is_drawn: bool) -> list[int]:
        """One seed a row; where none was given, drawn if a generator was given or `is_drawn`, else 0."""
        if self.seed is None:
            if self.generator is None and not is_drawn:
                return [0] * batch_size
            device = "cpu" if self.generator is None else self.generator.device
            return torch.randint(2**62, (batch_size,), generator=self.generator, device=device).tolist()
        if isinstance(self.seed, int):
            return [self.seed + row for row in range(batch_size)]
        _check("seed", len(self.seed) == batch_size, self.seed, f"one integer, or {batch_size} of them",
               "the rows of the batch: prompts times `num_return_sequences`")  # fmt: skip
        return list(self.seed)

    def check_cache(self, cache: Any, batch_size: int, num_columns: int) -> None:
        """Raises where a cache handed in holds what this decode cannot go on from."""
        length, stored = cache.get_seq_length(), cache.stored_recurrences
        _check(CACHE, cache.batch_size == batch_size, f"of {cache.batch_size}", f"of {batch_size} rows",
               "the batch's")  # fmt: skip
        _check(CACHE, length < num_columns, f"of {length}", f"of fewer than {num_columns} tokens",
               "`input_ids`, which begin with those the cache holds and have at least one more")  # fmt: skip
        _check(CACHE, self.policy == "autoregressive" or stored == self.stored_recurrences, f"of {stored}",
               f"of {self.stored_recurrences} recurrences a token",
               f"what `policy={self.policy!r}` reads with this `kv_cache`")  # fmt: skip
        needed = min(stored, self.num_recurrences)
        _check(CACHE, stored == 1 or cache.depth >= needed, f"of {cache.depth}",
               f"of tokens given {needed} recurrences", "those the prompt is read at")  # fmt: skip

    @property
    def stored_recurrences(self) -> int:
        """Recurrences the cache keeps of each token."""
        if self.kv_cache == EVERY_RECURRENCE:
            return self.num_recurrences
        return 1 if self.kv_cache == LATEST_ONLY else min(int(self.kv_cache), self.num_recurrences)


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """A finite one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, holds: bool, value: Any, allowed: str, reason: str = "the choices there are") -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {allowed} ({reason}), but is {value!r}.")


def noise_share(
    schedule: str, state_noise: float, counts: torch.Tensor, num_recurrences: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of a state and what is mixed in, each [..., 1], for positions with `counts` [...] recurrences."""
    shares: dict[str, Callable] = {
        "constant": lambda: torch.full_like(counts, state_noise),
        "dampened": lambda: state_noise / (1 + counts),
        "linear": lambda: state_noise * (1 - counts / num_recurrences).clamp(min=0),
        "sqrt": lambda: state_noise / (1 + counts),
    }
    share = shares[schedule]()[..., None]
    if schedule == "sqrt":
        return (1 - share).sqrt(), share.sqrt()
    return 1 - share, share
