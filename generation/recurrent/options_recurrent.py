"""Decoding options of recurrent-depth models: one dataclass per policy, filled from the keywords of `generate`."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeGuard

import torch

EVERY_RECURRENCE = "every-recurrence"
LATEST_ONLY = "latest-only"

PAPER_RECURRENCES = 32
NOISE_SCHEDULES = ("constant", "dampened", "linear", "sqrt")
FREEZE_CRITERIA = ("latent-difference", "latent-acceleration-1", "latent-acceleration-2", "token-stability", "fixed")
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


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_seeds(value: Any) -> bool:
    given = list(value) if isinstance(value, list | tuple) else [0 if value is None else value]
    return all(_is_whole(one) and 0 <= one < 2**62 for one in given)


def check(name: str, holds: bool, value: Any, allowed: str, reason: str = "the choices there are") -> None:
    """Raises ValueError if the value of a keyword is not allowed; `reason` names what sets the limit."""
    if not holds:
        raise ValueError(f"`{name}` must be {allowed} ({reason}), but is {value!r}.")


class Check(NamedTuple):
    """A check of a keyword: a test of its value, the allowed values in words, and the reason for them."""

    holds: Callable[[Any], bool]
    allowed: str
    reason: str = "the choices there are"


COUNT = Check(lambda value: _is_whole(value) and value >= 1, "a whole number from 1 up", "a count")
SWITCH = Check(lambda value: isinstance(value, bool), "True or False")
SHARE = Check(lambda value: _is_number(value) and 0 <= value <= 1, "between 0 and 1", "a share of a mixture")
SIZE = Check(lambda value: _is_number(value) and value >= 0, "a number of 0 or more", "a relative size")
COUNTS = ("num_recurrences", "inner_recurrence", "headway", "max_wavefront", "draft_length", "max_steps")
CHECKS: dict[str, Check] = {
    **dict.fromkeys(COUNTS, COUNT),
    **dict.fromkeys(("reference_compat", "record_wavefront"), SWITCH),
    **dict.fromkeys(("embedding_ema", "state_noise"), SHARE),
    **dict.fromkeys(("init_scale", "exit_threshold"), SIZE),
    "seed": Check(_are_seeds, "an integer from 0 to 2^62 - 1, or one for each row", "the range that is hashed"),
    "generator": Check(
        lambda value: value is None or isinstance(value, torch.Generator), "a `torch.Generator`", "it draws the seeds"
    ),
    "noise_schedule": Check(lambda value: value in NOISE_SCHEDULES, f"one of {NOISE_SCHEDULES}"),
    "freeze_criterion": Check(lambda value: value in FREEZE_CRITERIA, f"one of {FREEZE_CRITERIA}"),
    "kv_cache": Check(
        lambda value: value in (EVERY_RECURRENCE, LATEST_ONLY) or (_is_whole(value) and value >= 1),
        f"{EVERY_RECURRENCE!r}, {LATEST_ONLY!r} or a number of recurrences",
    ),
}


@dataclass(kw_only=True)
class RecurrentOptions:
    """The options common to all policies. `from_layers` returns the dataclass of the requested policy.

    Every policy but "published" asks a caller's own logits processors once for each prefix of the text, in order.

    Attributes:
        policy: "autoregressive", "adaptive", "self-speculative", "diffusion-forcing", "published" or "exact". The class
            of each policy describes it.
        num_recurrences: core passes of full depth; default: the checkpoint's `mean_recurrence`.
        init_scale: scale of the random initial states; 0 makes them zeros.
        seed: seed of all random numbers (initial states, noise, samples), one integer per row. A row's text thus does
            not depend on its batch. A single integer s gives row b the seed s + b. By default, the generator draws
            the seeds for sampling, and greedy decoding uses 0. Plain decoding ("autoregressive") samples in
            transformers' own loop, which takes no seeds.
        generator: draws the seeds; default: the global generator.
        kv_cache: which recurrences the cache keeps: "every-recurrence", "latest-only" or the number of latest ones.
            A field only of policies that allow a choice.
    """

    policy: ClassVar[str]
    reference_compat: ClassVar[bool] = False  # whether to reproduce a quirk of the authors' code
    kv_cache: ClassVar[str | int] = EVERY_RECURRENCE

    num_recurrences: int
    init_scale: float = 1.0
    seed: int | list[int] | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if (one := CHECKS.get(field.name)) is not None:
                value = getattr(self, field.name)
                check(field.name, one.holds(value), value, one.allowed, one.reason)
        check("seed", self.seed is None or self.generator is None, self.seed, "absent where `generator` is given",
               "the generator draws the seeds")  # fmt: skip

    @staticmethod
    def names() -> set[str]:
        """The keywords of all policies, and "preset", which sets several of them at once."""
        return {"policy", "preset"}.union(*map(keywords_of, POLICIES))

    @staticmethod
    def from_layers(layers: list[dict[str, Any]], mean_recurrence: int) -> "RecurrentOptions":
        """Options from layers in order of precedence: keywords, the config passed with them, the model's own config.

        If a layer names a policy or preset, keywords of lower layers that this policy does not take are dropped.
        """
        given: dict[str, Any] = {}
        for layer in layers:
            if given.keys() & {"policy", "preset"}:
                policy = given.get("policy") or PRESETS.get(given.get("preset"), {}).get("policy", "autoregressive")
                names = keywords_of(policy) if policy in list(POLICIES) else set()
                layer = {name: layer[name] for name in layer.keys() & names}
            given = layer | given
        return RecurrentOptions.from_keywords(given, mean_recurrence)

    @staticmethod
    def from_keywords(keywords: dict[str, Any], mean_recurrence: int) -> "RecurrentOptions":
        """Checked options from keywords. A preset fills in the keywords that are absent.

        None means the default, as in transformers.
        """
        given = {name: value for name, value in keywords.items() if value is not None}
        preset = given.pop("preset", None)
        if preset is not None:
            is_row = preset in list(PRESETS)
            check("preset", is_row, preset, f"one of {sorted(PRESETS)}", "the rows of the paper's table")
            given = PRESETS[preset] | given
        policy = given.pop("policy", "autoregressive")
        check("policy", policy in list(POLICIES), policy, f"one of {sorted(POLICIES)}", "the known policies")
        if unused := sorted(set(given) - keywords_of(policy)):
            raise ValueError(
                f"`{unused[0]}` has no effect with `policy={policy!r}`, which takes {sorted(keywords_of(policy))}. "
                f"Leave it out, or choose another policy."
            )
        if policy in (DiffusionForcingOptions.policy, PublishedOptions.policy):
            policy = _read_reference_compat(policy, given)
        return POLICIES[policy](**{"num_recurrences": mean_recurrence} | given)

    def seeds(self, batch_size: int, is_drawn: bool) -> list[int]:
        """One seed per row. Without `seed`, seeds are drawn if there is a generator or `is_drawn`, else 0."""
        if self.seed is None:
            if self.generator is None and not is_drawn:
                return [0] * batch_size
            device = "cpu" if self.generator is None else self.generator.device
            return torch.randint(2**62, (batch_size,), generator=self.generator, device=device).tolist()
        if isinstance(self.seed, int):
            return [self.seed + row for row in range(batch_size)]
        check("seed", len(self.seed) == batch_size, self.seed, f"one integer, or {batch_size} of them",
               "the rows of the batch: prompts times `num_return_sequences`")  # fmt: skip
        return list(self.seed)

    @property
    def stored_recurrences(self) -> int:
        """Recurrences per token that the cache keeps."""
        if self.kv_cache == EVERY_RECURRENCE:
            return self.num_recurrences
        return 1 if self.kv_cache == LATEST_ONLY else min(int(self.kv_cache), self.num_recurrences)

    @property
    def cached_depth(self) -> int:
        """Recurrences per new token in the cache."""
        return self.num_recurrences

    @property
    def num_undecided(self) -> int:
        """The maximum number of undecided tokens written after a text."""
        return 0


@dataclass(kw_only=True)
class AutoregressiveOptions(RecurrentOptions):
    """Every token at full depth, in transformers' own loop."""

    policy: ClassVar[str] = "autoregressive"

    kv_cache: str | int = EVERY_RECURRENCE  # type: ignore[misc]  # a field, since the policy does not fix it


@dataclass(kw_only=True)
class AdaptiveOptions(RecurrentOptions):
    """Each token recurs until its state settles.

    Attributes:
        exit_threshold: a state has settled when its relative change is below this.
        reference_compat: also stop reading the prompt when its states have settled on average, as the authors' code
            does; one row.
    """

    policy: ClassVar[str] = "adaptive"
    kv_cache: ClassVar[str | int] = LATEST_ONLY

    exit_threshold: float = 0.03
    reference_compat: bool = False  # type: ignore[misc]


@dataclass(kw_only=True)
class DraftingOptions(RecurrentOptions):
    """Options common to policies that draft tokens at lower depths.

    Attributes:
        draft_recurrences: rising depths below full depth at which a token is drafted, then redrafted. An int is one.
    """

    draft_recurrences: tuple[int, ...] = None  # type: ignore[assignment]  # filled in below
    default_depths: ClassVar[tuple[int, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        full_depth, depths = self.num_recurrences, self.draft_recurrences
        if depths is None:
            depths = tuple(depth for depth in self.default_depths if depth < full_depth) or (max(1, full_depth - 1),)
        depths = tuple(depths) if isinstance(depths, list | tuple) else (depths,)
        self.draft_recurrences = depths
        are_depths = all(map(_is_whole, depths))
        check("draft_recurrences", are_depths, depths, "a whole number, or a list of them", "core passes of a draft")
        if full_depth > 1:
            rising = all(a < b for a, b in itertools.pairwise(depths))
            is_valid = bool(depths) and rising and depths[0] >= 1 and depths[-1] < full_depth
            check("draft_recurrences", is_valid, depths, f"rising depths from 1 to {full_depth - 1}",
                   "`num_recurrences`, the depth that verifies them")  # fmt: skip


@dataclass(kw_only=True)
class SelfSpeculativeOptions(DraftingOptions):
    """Shallow drafts, verified at full depth. Only `kv_cache="every-recurrence"` gives the text of plain decoding.

    Attributes:
        draft_length: drafted tokens per verification.
    """

    policy: ClassVar[str] = "self-speculative"
    default_depths: ClassVar[tuple[int, ...]] = (4,)

    draft_length: int = 4
    kv_cache: str | int = EVERY_RECURRENCE  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        depths = self.draft_recurrences
        check("draft_recurrences", len(depths) == 1, depths, "a single depth", "this policy drafts once")

    @property
    def num_undecided(self) -> int:
        return self.draft_length


@dataclass(kw_only=True)
class ExactOptions(DraftingOptions):
    """A wavefront that writes the text of full-depth decoding.

    `DiffusionForcingOptions` describes `max_wavefront` and `record_wavefront`.
    """

    policy: ClassVar[str] = "exact"
    default_depths: ClassVar[tuple[int, ...]] = (2, 8)

    max_wavefront: int = 128
    record_wavefront: bool = False

    @property
    def num_undecided(self) -> int:
        return self.max_wavefront


@dataclass(kw_only=True)
class DiffusionForcingOptions(RecurrentOptions):
    """The sampler of arXiv 2510.14961, with the paper's defaults.

    Attributes:
        inner_recurrence: core passes between two decodes.
        headway: positions added per decode step.
        max_wavefront: maximum number of positions begun and not frozen.
        exit_threshold: a state has settled when its relative change is below this.
        embedding_ema: share of the previous decode step's prelude output in the current one. A new position uses its
            own output alone.
        state_noise: share of fresh initial state mixed into every state before its core passes.
        noise_schedule: the share at a position with n recurrences, where b is `state_noise`: "constant" b, "dampened"
            b/(1+n), "linear" b*(1-n/num_recurrences), "sqrt" b/(1+n) mixed with square roots, which keep the variance.
        freeze_criterion: one of `FREEZE_CRITERIA`, see generation/recurrent/freezing.py.
        max_recurrences: after this many recurrences with the same token, a position need not settle. A state that never
            settles thus cannot stall a text. The first position of the wavefront then starts again and freezes at
            `num_recurrences`, as in plain decoding. Default: `num_recurrences`, but at least the paper's 32.
        kv_cache: recurrences in the cache are numbered from 1 to `inner_recurrence` at each decode step.
        record_wavefront: whether the output has the first row's wavefront at each decode step.
    """

    policy: ClassVar[str] = "diffusion-forcing"

    inner_recurrence: int = 4
    headway: int = 1
    max_wavefront: int = 128
    exit_threshold: float = 0.03
    embedding_ema: float = 0.1
    state_noise: float = 0.0
    noise_schedule: str = "dampened"
    freeze_criterion: str = "latent-difference"
    max_recurrences: int = None  # type: ignore[assignment]  # filled in below
    kv_cache: str | int = LATEST_ONLY  # type: ignore[misc]
    record_wavefront: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_recurrences is None:
            self.max_recurrences = max(self.num_recurrences, PAPER_RECURRENCES, self.inner_recurrence)
        least = self.inner_recurrence
        is_enough = _is_whole(self.max_recurrences) and self.max_recurrences >= least
        check("max_recurrences", is_enough, self.max_recurrences, f"a whole number from {least} up",
               "`inner_recurrence`, the recurrences between two decodes")  # fmt: skip

    @property
    def cached_depth(self) -> int:
        return self.inner_recurrence

    @property
    def num_undecided(self) -> int:
        return self.max_wavefront


@dataclass(kw_only=True)
class PublishedOptions(DiffusionForcingOptions):
    """The sampler of the authors' published code, including its quirks; one row.

    Attributes:
        max_steps: decode steps after which decoding stops, as in the published code.
    """

    policy: ClassVar[str] = "published"
    reference_compat: ClassVar[bool] = True

    max_steps: int = 4096


POLICIES: dict[str, type[RecurrentOptions]] = {
    options.policy: options
    for options in (
        AutoregressiveOptions,
        AdaptiveOptions,
        SelfSpeculativeOptions,
        DiffusionForcingOptions,
        PublishedOptions,
        ExactOptions,
    )
}


def keywords_of(policy: str) -> set[str]:
    """The keywords a policy takes. Both samplers also take `reference_compat`, the older name of "published"."""
    if policy == DiffusionForcingOptions.policy:
        return keywords_of(PublishedOptions.policy)
    also = {"reference_compat"} if policy == PublishedOptions.policy else set()
    return also | {field.name for field in fields(POLICIES[policy])}


def _read_reference_compat(policy: str, given: dict[str, Any]) -> str:
    """The sampler chosen by a policy and `reference_compat`, its older name, which is removed from the keywords."""
    is_published = policy == PublishedOptions.policy
    asked = given.pop("reference_compat", is_published)
    check("reference_compat", isinstance(asked, bool), asked, SWITCH.allowed)
    if is_published and not asked:
        raise ValueError(
            "`reference_compat` must be True or left out with `policy='published'` (the older name of that policy), "
            "but is False. Use `policy='diffusion-forcing'` for the corrected sampler."
        )
    if "max_steps" in given and not asked:
        raise ValueError(
            f"`max_steps` is {given['max_steps']}, but only `reference_compat` reads it. Give both or neither."
        )
    return PublishedOptions.policy if asked else policy
