"""A CPU's products of a few tokens, faster: weights kept once more in the order the kernels read them in.

A stock `nn.Linear` puts its weight in the order of the kernel at every product; here it is done once for all of them.
"""

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

PACKABLE = (torch.bfloat16, torch.float32)


def has_onednn_products(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU, and this build of PyTorch, have oneDNN's products of a dtype."""
    has_any = torch.backends.mkldnn.is_available()
    return has_any and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def why_no_packed_products(dtype: torch.dtype) -> str | None:
    """None where this machine's CPU has products of packed weights of a dtype."""
    if has_onednn_products(dtype):
        return None
    return f"this CPU, or this build of PyTorch, has no oneDNN products of {dtype}"


def check_packable(model: nn.Module, exact: str | None = None) -> None:
    """Raises where a copy in another order would not be read, or where `exact` wants products that round otherwise."""
    if model.device.type != "cpu" or model.dtype not in PACKABLE:
        raise ValueError(
            f"`packed_weights` must be False for a model in {model.dtype} on {model.device}: it is for torch.bfloat16 "
            "and torch.float32 on a CPU. Leave it out, or load the model with one of them as `dtype`."
        )
    if why := why_no_packed_products(model.dtype):
        instead = ", or load the model with `dtype=torch.float32`" if has_onednn_products(torch.float32) else ""
        raise ValueError(f"`packed_weights` must be False on this machine: {why}. Leave it out{instead}.")
    if exact:
        raise ValueError(
            f"`exact={exact!r}` decides as the stock model's own products round, and on this CPU `packed_weights` are "
            f"read by oneDNN's, which round {model.dtype} otherwise. Leave either out."
        )


class PackedWeights:
    """The linear layers of one model, with a packed copy of each weight: as much memory again as they take.

    Copies are kept for as long as the weights live, and made anew where those have changed.
    """

    def __init__(self, model: nn.Module):
        check_packable(model)
        self.pack(packable_layers(model))

    def pack(self, layers: list[nn.Linear]) -> None:
        """Makes the copies that are missing, or of weights that have changed."""
        self.ways = [(linear, packed_way(linear)) for linear in layers]
        table = packed_product().table
        for linear, _ in self.ways:
            known = table.get(id(linear.weight))
            if known is None or not known.is_of(linear.weight):
                table[id(linear.weight)] = Packed(linear.weight, table)

    @contextmanager
    def used(self) -> Iterator["PackedWeights"]:
        """While this is open, the layers read the packed copies."""
        for linear, way in self.ways:
            linear.__dict__["forward"] = way
        try:
            yield self
        finally:
            for linear, _ in self.ways:
                linear.__dict__.pop("forward", None)


def reading_packed(model: nn.Module, is_wanted: bool) -> AbstractContextManager[PackedWeights | None]:
    """While this is open, the model's linear layers read packed copies of their weights, where that is wanted."""
    return PackedWeights(model).used() if is_wanted else nullcontext()


class Packed:
    """A packed copy of a weight [E, D], and what tells whether it still is one."""

    def __init__(self, weight: torch.Tensor, table: dict[int, Any]):
        key = id(weight)
        self.weight = weakref.ref(weight, lambda _: table.pop(key, None))
        self.fingerprint = fingerprint_of(weight)
        self.copy = ReorderedWeight(weight)

    def is_of(self, weight: torch.Tensor) -> bool:
        return self.weight() is weight and self.fingerprint == fingerprint_of(weight)


class ReorderedWeight:
    """A copy of a weight [E, D] in the order oneDNN reads it in."""

    def __init__(self, weight: torch.Tensor):
        self.reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def times(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., D] -> [..., E]"""
        return torch.ops.mkldnn._linear_pointwise.default(x, self.reordered, bias, "none", [], "")


def fingerprint_of(weight: torch.Tensor) -> tuple[Any, ...]:
    """What changes where a weight is written to or moved. An optimizer may leave no trace but the numbers, so of a
    weight that may be taught they are summed, as integers; a sum reads it once, as a forward does."""
    version = None if weight.is_inference() else weight._version
    if not weight.requires_grad and version is not None:
        return version, weight.data_ptr()
    return version, weight.data_ptr(), int(weight.detach().view(torch.int64).sum())


def packable_layers(model: nn.Module) -> list[nn.Linear]:
    """Those with a weight of the model's dtype and no forward of their own: of an adapted layer the one below the
    adapter."""
    found: dict[nn.Linear, None] = {}
    to_visit = [model]
    while to_visit:
        module = to_visit.pop()
        if type(module) is nn.Linear:
            weight = module.weight
            is_plain = weight.dtype == model.dtype and weight.is_contiguous() and "forward" not in module.__dict__
            if is_plain and not weight.numel() % 4:
                found[module] = None
        elif (base_layer := module._modules.get("base_layer")) is not None:
            to_visit.append(base_layer)
        else:
            to_visit += [child for child in module._modules.values() if child is not None]
    return list(found)


def packed_way(linear: nn.Linear) -> Any:
    """The layer's forward with the packed weight. In float32 a single token reads the weight as it stands, which takes
    no longer, so that it is plain decoding's to the bit. (Under autocast x may have another dtype than the weight.)
    """
    product = packed_product()

    def forward(x: torch.Tensor) -> torch.Tensor:
        is_single = x.dtype == torch.float32 and x.numel() == x.shape[-1]
        if is_single or x.dtype != linear.weight.dtype:
            return nn.functional.linear(x, linear.weight, linear.bias)
        return product(x.contiguous(), linear.weight, linear.bias)

    forward.is_packed = True  # type: ignore[attr-defined]
    return forward


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer's forward is another than its class's, and not that of its packed weight."""
    own = layer.__dict__.get("forward")
    return own is not None and not getattr(own, "is_packed", False)


def shape_of_product(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def packed_product() -> Any:
    """The operator x [..., D], weight [E, D], bias [E] -> [..., E]; in its table are packed copies by weights' `id`."""

    name = "packed_product"
    if not hasattr(torch.ops.wavedraft, name):
        table: dict[int, Packed] = {}

        def times(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return table[id(weight)].copy.times(x, bias)

        library = torch.library.Library("wavedraft", "FRAGMENT")
        library.define(f"{name}(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
        library.impl(name, times, "CPU")
        library.impl(name, shape_of_product, "Meta")
        found = getattr(torch.ops.wavedraft, name)
        found.library, found.table = library, table
    return getattr(torch.ops.wavedraft, name)
