"""The ways to decode that a bench compares."""

import copy
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from torch import nn
from transformers import CompileConfig, PreTrainedModel

from .settings import Settings

AR = "AR"


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

    def packed(self, is_packed: bool) -> "Contender":
        """The same, with packed weights or without."""
        return replace(self, keywords=self.keywords | {"packed_weights": is_packed})


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model in the same memory: plain decoding as it is without us. Make it before an adapter is loaded.

    The parameters are its own, so an adapter that freezes those of `model` leaves them as they are.
    """
    shared = {id(parameter): nn.Parameter(parameter.data) for parameter in model.parameters()}
    stock = copy.deepcopy(model, shared)
    stock.__class__ = model.stock_class
    return stock


def contenders_of(
    model: PreTrainedModel, stock: PreTrainedModel, settings: Settings, assistant: PreTrainedModel | None = None
) -> list[Contender]:
    """Plain decoding of the stock model first, then transformers' own ways to be faster, then ours.

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
    contenders.append(Contender("no drafts", model, {"draft_length": 0}))
    for length, branches in product(settings.draft_lengths, settings.num_branches):
        number = length if branches == "all" else branches
        if number != "auto" and int(number) <= length:
            contenders.append(
                Contender(f"K={length} B={number}", model, {"draft_length": length, "num_branches": number})
            )
    if "auto" in settings.num_branches:
        contenders.append(Contender("auto", model, {"num_branches": "auto"}))
    if settings.has_compiled:
        compiled = compiled_keywords()
        is_on_gpu = model.device.type == "cuda"
        ours = [contender for contender in contenders if contender.keywords.get("draft_length")]
        if "auto" in settings.num_branches and (shortest := min(settings.draft_lengths)) > 1:
            auto = {"draft_length": shortest, "num_branches": "auto"}
            ours.append(Contender(f"K={shortest} auto", model, auto))
        contenders += [
            Contender(
                f"{contender.name} compiled",
                model,
                contender.keywords | compiled,
                is_compiled=True,
                is_counted_within=is_on_gpu,
            )
            for contender in ours
        ]
    contenders = [one if one.model is stock else one.packed(bool(settings.has_packed_weights)) for one in contenders]
    by_name = {contender.name: contender for contender in contenders}
    if unknown := [name for name in settings.only if name not in by_name]:
        raise ValueError(f"There is no {unknown[0]!r} among what these options measure: {', '.join(by_name)}.")
    return [one for name, one in by_name.items() if name == AR or name in settings.only or not settings.only]


def compiled_keywords() -> dict[str, Any]:
    """The keywords of `generate` that make all steps of drafts one shape, and compile them."""
    return {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=False)}
