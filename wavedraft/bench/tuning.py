"""Which way to decode pays on this machine: first among plans, then among what may be added to the best plan."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..generation.execution.packed_linear import pays_to_pack
from .contenders import AR, DEFAULT, NO_DRAFTS, Contender, contenders_of
from .measure import bench, num_runs
from .report import report
from .settings import Settings

CLEARLY = 1.03  # a choice that no default makes must be 3 % faster: less may be the noise of one run
PACKED, UNPACKED, TIE_SAFE = "packed weights", "no packed weights", "tie-safe"


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        keywords: of `generate`, the fastest that were found; empty where the defaults are.
        speed_up: over the stock model, by these keywords.
        reports: the figures of both benches, as in bench.json.
    """

    keywords: dict[str, Any]
    speed_up: float
    reports: list[dict[str, Any]]


def settings_of(draft_length: int, has_compiled: bool, max_new_tokens: int) -> Settings:
    """What tuning measures: drafts of K, K/2 .. 2 tokens for some numbers of branches, and `generate`'s default."""
    lengths = tuple(length for i in range(8) if (length := draft_length >> i) > 1) or (1,)
    branches = tuple(number for number in (1, 2, "all", "auto") if draft_length > 1 or number == 1)
    return Settings((1,), draft_lengths=lengths, num_branches=branches, num_batches=1,
                    max_new_tokens=max_new_tokens, has_compiled=has_compiled)  # fmt: skip


def num_tuning_runs(prompts: dict[str, Any], settings: Settings) -> int:
    """Timed runs of both benches, or a few more."""
    num_plans = len(settings.draft_lengths) * len(settings.num_branches)
    return num_runs([None] * (num_plans + 4 + 2 * settings.has_compiled), prompts, settings)


def tune(
    model: PreTrainedModel,
    stock: PreTrainedModel,
    prompts: dict[str, list[torch.Tensor]],
    filler: torch.Tensor,
    settings: Settings,
    on_run: Callable[[], None] = lambda: None,
) -> Tuned:
    """Times plans, then additions to the best plan, and chooses. Every way decodes each prompt in turn.

    Args:
        stock: `model` without drafts and adapter, as `without_adapter` makes it.
        prompts, filler: as in `bench`.
        settings: as `settings_of` makes them.

    Raises:
        ValueError: the checkpoint's generation config has a `trust` below 1, and so a text of its own.
    """
    if (trust := getattr(model.generation_config, "trust", None)) not in (None, 1):
        raise ValueError(
            f"`trust` must be 1 to tune, but generation_config.json has {trust}: the plans that are compared write "
            "plain decoding's text. Take it out there."
        )
    every = contenders_of(model, stock, settings)
    plans = [one for one in every if not one.is_compiled and one.name != "lookup"]
    about: dict[str, Any] = {"model": model.name_or_path}
    first = report(bench(plans, prompts, filler, settings, on_run), model, plans, settings, about)
    best = best_plan(plans, first)
    added = [every[0], best, *additions(best, settings.has_compiled)]
    added += [one for one in every if one.name == f"{AR} compiled"]
    second = report(bench(added, prompts, filler, settings, on_run), model, added, settings, about)
    speeds = speed_ups(second)
    chosen = packed_or_not(best, speeds)
    return Tuned(chosen.keywords, speeds[chosen.name], [first, second])


def speed_ups(figures: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as plain decoding each way writes after its first token."""
    (cell,) = figures["cells"]
    return {line["name"]: line["speed_up"]["mean"] for line in cell["contenders"] if line["refused"] is None}


def best_plan(plans: list[Contender], figures: dict[str, Any]) -> Contender:
    """The fastest of ours; but the default, which fits its plan to each text, unless another is clearly faster."""
    speeds = speed_ups(figures)
    ours = [one for one in plans if one.name in speeds and one.name != AR]
    fastest = max(ours, key=lambda one: speeds[one.name])
    default = next((one for one in ours if one.name == DEFAULT), fastest)
    if speeds[fastest.name] <= CLEARLY * speeds[default.name]:
        return default
    keywords = {name: value for name, value in fastest.keywords.items() if name != "packed_weights"}
    return replace(fastest, keywords=keywords)  # packed weights are asked about next


def additions(best: Contender, has_compiled: bool) -> list[Contender]:
    """The same plan with what is not the default of this machine."""
    is_packed = pays_to_pack(best.model)
    found = []
    if best.model.device.type == "cpu":
        name = UNPACKED if is_packed else PACKED
        found.append(replace(best, name=name, keywords=best.keywords | {"packed_weights": not is_packed}))
    if best.name != NO_DRAFTS:
        found.append(replace(best, name=TIE_SAFE, keywords=best.keywords | {"exact": "tie-safe"}))
        found += [best.compiled()] if has_compiled else []
    return found


def packed_or_not(best: Contender, speeds: dict[str, float]) -> Contender:
    """The best plan as it is, or the other way about packed weights where that is clearly faster."""
    other = next((name for name in (PACKED, UNPACKED) if name in speeds), best.name)
    if speeds[other] <= CLEARLY * speeds[best.name]:
        return best
    return replace(best, name=other, keywords=best.keywords | {"packed_weights": other == PACKED})


def drafting_line(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of the fastest fixed plan."""
    (cell,) = figures["cells"]
    drafting = [line for line in cell["contenders"] if line["name"].startswith("K=") and line["refused"] is None]
    return max(drafting, key=lambda line: line["speed_up"]["mean"])


def pays_from(figures: dict[str, Any], line: dict[str, Any]) -> float:
    """Tokens per forward from which a plan is faster than decoding without drafts: what its step takes, in steps of one
    token."""
    (cell,) = figures["cells"]
    plain = next(one for one in cell["contenders"] if one["name"] == NO_DRAFTS)
    return line["tokens_per_forward"] * plain["speed_up"]["mean"] / line["speed_up"]["mean"]
