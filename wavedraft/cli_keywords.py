"""From options of the command line to what they stand for: keywords of `generate`, lists of numbers."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import CompileConfig

from .before_loading import stored_generation_config
from .modeling_recurrent import PRESETS


def drafting_keywords(num_branches: str | None, exact: str | None, packed_weights: bool = False) -> dict[str, Any]:
    """Those of `generate` that only TiDAR has, without those not given; `generate` checks their values."""
    branches = int(num_branches) if num_branches is not None and num_branches.isdecimal() else num_branches
    given = {"num_branches": branches, "exact": exact, "packed_weights": packed_weights or None}
    return {name: value for name, value in given.items() if value is not None}


def compiled_keywords() -> dict[str, Any]:
    """Those that make the steps of drafts constant in shape, and compiled."""
    return {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=False)}


def read_list(text: str, option: str, number: Callable[[str], Any], words: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """The members of a list such as `1,4,all`: numbers, or one of some words."""
    try:
        return tuple(part if part in words else number(part) for part in map(str.strip, text.split(",")))
    except ValueError:
        also = f" or {', '.join(words)}" if words else ""
        raise ValueError(f"{option} must be a list of numbers{also}, as 1,4, but is {text!r}.") from None


def refuse(options: dict[str, Any], reason: str) -> None:
    """Raises where one of these options, that would do nothing, was given."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} {reason}")


OF_TIDAR = "is TiDAR's. A recurrent-depth model takes --policy."


def seed_plain_decoding(plain: dict[str, Any], parallel: dict[str, Any]) -> None:
    """Seeds the global generator, which plain decoding draws from, in place of the keyword, which it has not."""
    if "seed" in plain:
        torch.manual_seed(plain.pop("seed"))
        if parallel["draft_length"] == 0:
            parallel.pop("seed")


def recurrent_keywords(model: str, depth: dict[str, Any], options: dict[str, Any]) -> tuple[dict, dict]:
    """The keywords of `generate` for a recurrent-depth model's policy, and for plain decoding at the same depth.

    Where neither the caller nor the checkpoint names a policy, it is the exact one.
    """
    parallel, preset = options | {name: value for name, value in depth.items() if value is not None}, depth["preset"]
    file = stored_generation_config(model)
    stored = (getattr(file, name, None) for name in ("policy", "preset"))
    if not parallel.keys() & {"policy", "preset"} and not any(stored):
        parallel["policy"] = "exact"
    plain = options | {"policy": "autoregressive"}
    if depth["num_recurrences"] is not None:
        plain["num_recurrences"] = depth["num_recurrences"]
    if "seed" in options and options["do_sample"]:  # plain decoding draws from the global generator
        torch.manual_seed(plain.pop("seed"))
        if "autoregressive" in (parallel.get("policy"), PRESETS.get(preset or "", {}).get("policy")):
            parallel.pop("seed")
    return parallel, plain
