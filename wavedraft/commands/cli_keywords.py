"""From options of the command line to what they stand for: keywords of `generate`."""

from typing import Any

import torch

from ..bench.contenders import compiled_keywords
from ..modeling_recurrent import PRESETS
from .cli_checks import check_keywords, is_recurrent, stored_generation_config
from .early_checks import FOR_TIDAR, OF_DEPTH, for_recurrent_depth, refuse


def without_none(**options: Any) -> dict[str, Any]:
    """The options that were given: the others are None."""
    return {name: value for name, value in options.items() if value is not None}


def drafting_keywords(
    num_branches: str | None, exact: str | None, packed_weights: bool | None, trust: float | None = None
) -> dict[str, Any]:
    """The keywords that only TiDAR's `generate` has, without those not given; `generate` checks their values."""
    branches = int(num_branches) if num_branches is not None and num_branches.isdecimal() else num_branches
    return without_none(num_branches=branches, exact=exact, packed_weights=packed_weights, trust=trust)


def sampling_keywords(given: dict[str, Any]) -> dict[str, Any]:
    """The keywords of every model's `generate` among a verb's options, without those not given."""
    names = ("max_new_tokens", "seed", "top_k", "top_p", "min_p", "repetition_penalty")
    temperature = given["temperature"]
    options = {name: given.get(name) for name in names}
    return without_none(**options, do_sample=temperature > 0, temperature=temperature or None)


def decoding_keywords(
    model: str,
    options: dict[str, Any],
    draft_length: int | None,
    depth: dict[str, Any],
    drafting: dict[str, Any],
    compiled: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords of `generate` for parallel decoding, and for plain decoding of the same model.

    Args:
        options: keywords of every model.
        depth: options of a recurrent-depth model: `policy`, `preset` and `num_recurrences`.
        drafting: keywords of TiDAR.
        compiled: whether the steps of parallel decoding are compiled.

    Raises:
        ValueError: an option of the other family was given.
    """
    if is_recurrent(model):
        refuse(drafting, FOR_TIDAR)
        parallel, plain = recurrent_keywords(model, depth | {"draft_length": draft_length}, options)
    else:
        refuse(depth, for_recurrent_depth(model))
        parallel, plain = {**options, "draft_length": draft_length, **drafting}, {**options, "draft_length": 0}
    return parallel | (compiled_keywords() if compiled else {}), plain


def both_keywords(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords of `generate` for parallel and for plain decoding, by a verb's options.

    Where plain decoding samples with a seed, this seeds the global generator.

    Raises:
        ValueError: the options contradict each other, or the checkpoint.
    """
    depth = {name: given[name] for name in OF_DEPTH}
    drafting = drafting_keywords(given["num_branches"], given["exact"], given["packed_weights"], given.get("trust"))
    parallel, plain = decoding_keywords(
        given["model"], sampling_keywords(given), given["draft_length"], depth, drafting, given["compile"]
    )
    check_keywords(given["model"], parallel)
    seed_plain_decoding(plain, parallel)
    return parallel, plain


def audited_keywords(
    model: str, policy: str | None, drafting: dict[str, Any], compiled: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords of `generate` for the parallel decoding that is audited, and for plain decoding.

    Args:
        policy: of a recurrent-depth model; by default the exact one.
        drafting: keywords of TiDAR; `draft_length` may be None.

    Raises:
        ValueError: an option of the other family was given.
    """
    if has_depth := is_recurrent(model):
        refuse(drafting, FOR_TIDAR)
    else:
        refuse({"policy": policy}, for_recurrent_depth(model))
    parallel = {"policy": policy or "exact"} if has_depth else drafting
    plain = {"policy": "autoregressive"} if has_depth else {"draft_length": 0}
    return parallel | (compiled_keywords() if compiled else {}), plain


def recurrent_keywords(model: str, depth: dict[str, Any], options: dict[str, Any]) -> tuple[dict, dict]:
    """The keywords of `generate` for a recurrent-depth model's policy, and for plain decoding at the same depth.

    Where neither the caller nor the checkpoint names a policy, it is the exact one.
    """
    parallel, preset = options | without_none(**depth), depth["preset"]
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


def seed_plain_decoding(plain: dict[str, Any], parallel: dict[str, Any]) -> None:
    """Seeds the global generator, from which plain decoding of a TiDAR checkpoint draws: it does not take `seed`."""
    if "seed" in plain and plain["do_sample"]:
        torch.manual_seed(plain.pop("seed"))
        if parallel["draft_length"] == 0:
            parallel.pop("seed")
