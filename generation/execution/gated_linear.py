"""Applies a gated adapter to only the mask tokens of a forward: the gate, and a linear layer with a gate.

B rows, Q queries, D and E channels, r the adapter's rank.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..stock_model import mask_token_of
from ..torch_internals import parts_of, pre_hooks_of, share_hooks
from .packed_linear import PackedLinear, packed_product, packed_weight

OF_ROWS = ("adapter_names", "alora_offsets")  # what PEFT's hooks tell its layers of each row of a batch


class MaskGate:
    """Replaces PEFT's arithmetic of our gated adapters in every adapted layer of one model.

    On disk the adapter is a stock PEFT aLoRA (arXiv 2504.12397), which acts on the last n tokens of a row. Masks are
    the last queries of a forward, so the gate is n: a slice, where PEFT's boolean index would wait for the GPU in every
    layer. When closed (n = 0), the layer returns the base layer's result, so text is read bit for bit as by the base
    model. The gate also stands in layers that PEFT itself cannot gate (HQQ, GPTQ).

    Attributes:
        num_masks: n, the number of last queries in each row that the adapter acts on.
    """

    def __init__(self) -> None:
        self.num_masks = 0

    @contextmanager
    def open(self, num_masks: int) -> Iterator[None]:
        """Makes the adapter act on the last `num_masks` queries of each row, inside the context."""
        before, self.num_masks = self.num_masks, num_masks
        try:
            yield
        finally:
            self.num_masks = before

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Adds the adapter to the last `num_masks` rows of `result` [B, Q, D], in place as PEFT does."""
        if self.num_masks:
            lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
            masks = x[:, -self.num_masks :]
            if not torch.is_autocast_enabled(x.device.type):  # autocast chooses the dtype of products
                masks = masks.to(lora_a.weight.dtype)
            reduced = lora_a(module.lora_dropout[active_adapter](masks)) * module.scaling[active_adapter]
            delta = lora_b(reduced).to(result.dtype)
            if self.num_masks == x.shape[1]:
                return result + delta
            result[:, -self.num_masks :] += delta
        return result

    def merge_safe(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("A gated adapter does not support merging: it would act on text, not only on masks.")

    merge_unsafe = unmerge = merge_safe


class Adapter(NamedTuple):
    """A gated adapter of ours in one of PEFT's layers.

    Attributes:
        siblings, place: the dictionary of modules with the layer, and its name there.
        variants, name: the arithmetic of the layer's adapters, and this adapter's name there.
    """

    layer: Any
    siblings: dict[str, Any]
    place: str
    variants: dict[str, Any]
    name: str


def is_gated(config: Any, model: Any) -> bool:
    """Whether a PEFT config is of a gated adapter of ours: an aLoRA whose invocation token is the model's mask."""
    return getattr(config, "alora_invocation_tokens", None) == [mask_token_of(model)]


def active_adapters(model: Any) -> list[Any]:
    """The PEFT configs of the adapters that act, gated ones first."""
    configs = getattr(model, "peft_config", None) or {}
    for module in model.modules() if configs else ():
        if isinstance(getattr(type(module), "active_adapters", None), property):  # PEFT's layers all have the same
            names = [] if module.disable_adapters else module.active_adapters
            active = [configs[name] for name in names if name in configs]
            return sorted(active, key=lambda config: not is_gated(config, model))
    return []


def adapters_of(model: Any) -> list[Adapter]:
    """Our gated adapters in all of a model's layers. Users' own adapters, aLoRA too, are left to PEFT."""
    configs = getattr(model, "peft_config", None) or {}
    ours = [name for name, config in configs.items() if is_gated(config, model)]
    adapters: list[Adapter] = []
    to_visit: list[tuple[dict[str, Any], str, nn.Module]] = [({}, "", model)] if ours else []
    while to_visit:
        siblings, place, module = to_visit.pop()
        parts = parts_of(module)
        if "lora_A" in parts:
            names = [name for name in ours if name in parts_of(parts["lora_A"])]
            adapters += [Adapter(module, siblings, place, module.lora_variant, name) for name in names]
        else:
            to_visit += [(parts, key, child) for key, child in parts.items() if child is not None]
    return adapters


def mask_gate_of(model: Any) -> MaskGate | None:
    """The gate of a model's gated adapters, put into all of their layers for good; None without any."""
    adapters = adapters_of(model)
    gates = [found for one in adapters if isinstance(found := one.variants.get(one.name), MaskGate)]
    for one in adapters:
        gates = gates or [MaskGate()]
        one.variants[one.name] = gates[0]
    return gates[0] if gates else None


def some_numbers_of(model: Any, name: str) -> list[float]:
    """The first numbers of an adapter's last matrix, by which its weights are known again in another dtype."""
    for module in model.modules():
        if name in parts_of(parts_of(module).get("lora_B") or nn.Module()):
            weight = module.lora_B[name].weight.detach()
            return [] if weight.is_meta else weight.flatten()[:64].float().tolist()
    return []


def told_by_row(model: Any) -> dict[nn.Module, set[str]]:
    """The modules that PEFT's hooks tell different things of different rows, and which of `OF_ROWS`."""
    told: dict[nn.Module, set[str]] = {}
    for module in model.modules() if getattr(model, "peft_config", None) else ():
        for hook in pre_hooks_of(module):
            given = getattr(hook, "keywords", {})
            if names := {name for name in OF_ROWS if any(given.get(name) or ())}:
                told.setdefault(module, set()).update(names)
    return told


MOST_SUMMED = 1 << 20


class GatedLinear(nn.Module):
    """base(x), and on the last `gate.num_masks` queries also x @ down @ up.

    Args:
        adapted: PEFT's layer, whose hooks this layer also runs.
        name: the name of the adapter.

    Attributes:
        down, up: [D, r] and [r, E]; `up` includes the scaling. A packed base layer reads `down` with its own weight.
        state: `state_of` the adapter when they were made.
    """

    def __init__(self, adapted: Any, name: str):
        super().__init__()
        self.down, self.up = factors_of(adapted, name)
        self.packed_up: Tensor | None = None
        self.state = state_of(adapted, name)
        share_hooks(self, adapted)

    def forward(self, x: Tensor, **peft: Any) -> Tensor:
        """[B, Q, D] -> [B, Q, E]"""
        num_masks, base = self.gate.num_masks, self.base
        if not num_masks:
            return base(x)
        if self.packed_up is None or x.dtype != base.weight.dtype:
            result, masks = base(x), x[:, -num_masks:].to(self.down.dtype)
            delta = product(product(masks, self.down), self.up)
        else:
            both = base.both(x)
            result, reduced = both[..., : base.out_features], both[:, -num_masks:, base.out_features :]
            delta = packed_product(reduced, self.packed_up)
        result[:, -num_masks:].add_(delta)
        return result


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """[..., D] times [D, E]. A compiled sum of a few rows fuses with other work; a matmul cannot. `MOST_SUMMED`
    multiplications are summed at most."""
    if torch.compiler.is_compiling() and x.numel() * matrix.shape[1] <= MOST_SUMMED:
        return (x[..., None, :] * matrix.t()).sum(dim=-1)
    return x @ matrix


def sole_adapter(module: Any) -> str | None:
    """The only adapter that a PEFT layer adds to its base layer; None if the layer does anything else. Parts are read
    directly: a thousand attribute look-ups take 2 ms."""
    parts = parts_of(module)
    adapters = parts_of(parts["lora_A"])
    names = [name for name in module.active_adapters if name in adapters]
    if module.disable_adapters or module.merged or "forward" in module.__dict__ or len(names) != 1:
        return None
    (name,) = names
    lora_a, lora_b = adapters[name], parts_of(parts["lora_B"])[name]
    base = parts["base_layer"]
    if not all(type(layer) is nn.Linear and "forward" not in layer.__dict__ for layer in (base, lora_a, lora_b)):
        return None
    is_one_dtype = len({layer.weight.dtype for layer in (base, lora_a, lora_b)}) == 1
    has_dropout = module.training and not isinstance(module.lora_dropout[name], nn.Identity)
    return None if not is_one_dtype or has_dropout or lora_b.bias is not None else name


def state_of(module: Any, name: str) -> tuple[Any, ...]:
    """The dependencies of an adapter's arithmetic. Weights are summed, since an optimizer may change only numbers."""
    weights = module.lora_A[name].weight, module.lora_B[name].weight
    return module.scaling[name], *((w.data_ptr(), w.shape, w.dtype, w.device, sum_of(w)) for w in weights)


def sum_of(weight: Tensor) -> int:
    numbers = weight.detach().flatten()
    is_whole = numbers.numel() * numbers.element_size() % 8 == 0
    return int(numbers.view(torch.int64 if is_whole else torch.uint8).sum())


def gated_linear(adapted: Any, name: str, gate: MaskGate, copies: MutableMapping[nn.Module, Any]) -> GatedLinear:
    """The layer that replaces PEFT's, kept between decodes until the adapter changes. It still lacks its base."""
    layer = copies.get(adapted)
    if layer is None or layer.state != state_of(adapted, name):
        layer = copies[adapted] = GatedLinear(adapted, name)
    layer.gate, layer.training = gate, adapted.training
    return layer


def with_base(layer: GatedLinear | None, base: nn.Module) -> nn.Module:
    """The layer over its base as that is in this decode, perhaps packed; None: the base alone."""
    if layer is None:
        return base
    if not isinstance(base, PackedLinear) or base.reducer is not layer.down:
        layer.packed_up = None
    elif layer.packed_up is None:
        layer.packed_up = packed_weight(layer.up.t().contiguous())
    layer.base = base
    return layer


def factors_of(module: Any, name: str) -> tuple[Tensor, Tensor]:
    """One adapter's matrices [D, r] and [r, E]; the latter includes the scaling."""
    lora_a, lora_b = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
    return lora_a.t(), lora_b.t() * module.scaling[name]
