"""The ways to decode that a bench compares."""

import copy
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from torch import nn
from transformers import CompileConfig, PreTrainedModel

from ..generation.execution.packed_linear import pays_to_pack
from .settings import Settings

AR, DEFAULT, NO_DRAFTS = "AR", "default", "no drafts"


@dataclass(frozen=True)
class Contender:
    """A way to decode.

    Attributes:
        keywords: of `generate`.
        is_compiled: a first run compiles.
        is_counted_apart: the whole network is compiled, and a hook on it would be compiled too. The forwards of an
            uncompiled run are counted instead.
        is_counted_within: its steps are CUDA graphs, which a hook would forbid. The calls of the network are counted
            where they are made.
    """

    name: str
    model: PreTrainedModel
    keywords: dict[str, Any] = field(default_factory=dict)
    is_compiled: bool = False
    is_counted_apart: bool = False
    is_counted_within: bool = False

    def compiled(self) -> "Contender":
        """The same, its steps of one shape and compiled."""
        return replace(
            self,
            name=f"{self.name} compiled",
            keywords=self.keywords | compiled_keywords(),
            is_compiled=True,
            is_counted_within=self.model.device.type == "cuda",
        )


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model in the same memory: plain decoding as it is without us. Make it before an adapter is loaded.

    The parameters are its own, so an adapter that freezes those of `model` leaves them as they are.
    """
    shared = {id(parameter): nn.Parameter(parameter.data) for parameter in model.parameters()}
    stock = copy.deepcopy(model, shared)
    stock.__class__ = model.stock_class
    return stock


def contenders_of(
    model: PreTrainedModel,
    stock: PreTrainedModel,
    settings: Settings,
    assistant: PreTrainedModel | None = None,
    trust: float | None = None,
) -> list[Contender]:
    """Plain decoding of the stock model first, then transformers' own ways to be faster, then ours: without drafts, as
    `generate` decodes without any keyword, and by fixed plans.

    Args:
        trust: measure drafts of every branch with this `trust` too, whose texts are not plain decoding's.

    Raises:
        ValueError: `settings.only` names a contender that is not among them.
    """
    contenders = [Contender(AR, stock)]
    if settings.has_compiled:
        compile_config = CompileConfig()
        compile_config._compile_all_devices = True
        keywords = {"cache_implementation": "static", "compile_config": compile_config}
        contenders.append(Contender("AR compiled", stock, keywords, is_compiled=True, is_counted_apart=True))
    contenders.append(Contender("lookup", stock, {"prompt_lookup_num_tokens": settings.num_lookup_tokens}))
    if assistant is not None:
        contenders.append(Contender("assisted", stock, {"assistant_model": assistant}))
    ours = _drafting(model, settings, trust)
    is_packed = pays_to_pack(model) if settings.has_packed_weights is None else settings.has_packed_weights
    contenders += [Contender(NO_DRAFTS, model, {"draft_length": 0, "packed_weights": is_packed}), *ours]
    if settings.has_compiled:
        contenders += [contender.compiled() for contender in ours]
    by_name = {contender.name: contender for contender in contenders}
    if unknown := [name for name in settings.only if name not in by_name]:
        raise ValueError(f"There is no {unknown[0]!r} among what these options measure: {', '.join(by_name)}.")
    return [one for name, one in by_name.items() if name == AR or name in settings.only or not settings.only]


def _drafting(model: PreTrainedModel, settings: Settings, trust: float | None) -> list[Contender]:
    """What a user gets without keywords, by the name of `default`, and fixed plans, last those with `trust`.
    Where it is asked for packed weights, or for none, it is named `auto`: then it has a keyword."""
    packed = {} if settings.has_packed_weights is None else {"packed_weights": settings.has_packed_weights}
    exact = {} if getattr(model.generation_config, "trust", None) is None else {"trust": 1}  # not the checkpoint's own
    found = [Contender("auto" if packed else DEFAULT, model, packed)] if "auto" in settings.num_branches else []
    for length, branches in product(settings.draft_lengths, settings.num_branches):
        number = length if branches == "all" else branches
        if number != "auto" and int(number) <= length:
            plan = {"draft_length": length, "num_branches": number, **exact}
            found.append(Contender(f"K={length} B={number}", model, plan | packed))
    if trust is not None:
        plans = ({"draft_length": length, "num_branches": length, "trust": trust} for length in settings.draft_lengths)
        found += [Contender(f"K={plan['draft_length']} trust={trust:g}", model, plan | packed) for plan in plans]
    return found


def reads_packed(contenders: list[Contender]) -> bool:
    """Whether ours read packed weights: as they are asked to, or by default where that pays."""
    ours = [one for one in contenders if one.model is not contenders[0].model]
    return any(one.keywords.get("packed_weights", pays_to_pack(one.model)) for one in ours)


def compiled_keywords() -> dict[str, Any]:
    """The keywords of `generate` that make all steps of drafts one shape, and compile them."""
    return {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=False)}
