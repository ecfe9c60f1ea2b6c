"""A CPU's products of a few tokens, faster: weights kept once more in the order the kernels read them in.

A stock `nn.Linear` puts its weight in the order of the kernel at every product; here it is done once for all of them.
"""

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .bfloat16_kernel import bfloat16_kernel
from .bfloat16_products import LowRank, WidenedWeight, known_kernel
from .cpp_operators import operator

PACKABLE = (torch.bfloat16, torch.float32)


def has_onednn_products(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU, and this build of PyTorch, have oneDNN's products of a dtype."""
    has_any = torch.backends.mkldnn.is_available()
    return has_any and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def why_no_packed_products(dtype: torch.dtype) -> str | None:
    """None where this machine's CPU has products of packed weights of a dtype: oneDNN's, or in bfloat16 ours."""
    if has_onednn_products(dtype):
        return None
    lacking = f"this CPU, or this build of PyTorch, has no oneDNN products of {dtype}"
    if dtype != torch.bfloat16:
        return lacking
    kernel = bfloat16_kernel()
    return f"{lacking}, and {kernel}" if isinstance(kernel, str) else None


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
    if exact and has_onednn_products(model.dtype):
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

    def make_known(self) -> None:
        """Tells compiled layers which copies are whose."""
        table = packed_product().table
        for linear, _ in self.ways:
            table[id(linear.weight)].copy.make_known(linear.weight)

    @property
    def are_ours(self) -> bool:
        """Whether their products are ours, not oneDNN's."""
        return any(hasattr(way, "adapted") for _, way in self.ways)

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
        self.copy = ReorderedWeight(weight) if has_onednn_products(weight.dtype) else WidenedWeight(weight)

    def is_of(self, weight: torch.Tensor) -> bool:
        return self.weight() is weight and self.fingerprint == fingerprint_of(weight)


class PackedAdapter:
    """A packed copy of an adapter's matrices, for as long as the first of them lives; they are never written to."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor, table: dict[int, Any]):
        key = id(down)
        self.matrix = weakref.ref(down, lambda _: table.pop(key, None))
        self.copy = LowRank(down, up)


class ReorderedWeight:
    """A copy of a weight [E, D] in the order oneDNN reads it in."""

    def __init__(self, weight: torch.Tensor):
        self.reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.handle: Any = None

    def times(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., D] -> [..., E]"""
        return torch.ops.mkldnn._linear_pointwise.default(x, self.reordered, bias, "none", [], "")

    def make_known(self, weight: torch.Tensor) -> None:
        """Tells compiled layers that this is the copy of a weight."""
        if self.handle is None:
            self.handle = torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(self.reordered)
            weakref.finalize(self, torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr, self.handle)
        handle = address_in_capsule(self.handle, None)
        known_kernel().remember_packed(weight.data_ptr(), None, None, 0, handle)


address_in_capsule = ctypes.pythonapi.PyCapsule_GetPointer
address_in_capsule.restype, address_in_capsule.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


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

    Where the products are ours it has an attribute `adapted`: the product of a layer and its low-rank adapter, matrices
    [D, r] and [r, E], which acts on the last rows of x [B, Q, D] alone; and `prepare_adapter`, to be called before.
    """
    product, adapted_product = packed_product(), adapted_packed_product()

    def forward(x: torch.Tensor) -> torch.Tensor:
        is_single = x.dtype == torch.float32 and x.numel() == x.shape[-1]
        if is_single or x.dtype != linear.weight.dtype:
            return nn.functional.linear(x, linear.weight, linear.bias)
        return product(x.contiguous(), linear.weight, linear.bias)

    def adapted(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, num_masks: int) -> torch.Tensor:
        return adapted_product(x.contiguous(), linear.weight, linear.bias, down, up, num_masks)

    forward.is_packed = True  # type: ignore[attr-defined]
    if not has_onednn_products(linear.weight.dtype):
        forward.adapted, forward.prepare_adapter = adapted, prepare_adapter  # type: ignore[attr-defined]
    return forward


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer's forward is another than its class's, and not that of its packed weight."""
    own = layer.__dict__.get("forward")
    return own is not None and not getattr(own, "is_packed", False)


def shape_of_product(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def packed_product() -> Any:
    """The operator x [..., D], weight [E, D], bias [E] -> [..., E]; in its table are packed copies by weights' `id`."""

    def times(table: dict[int, Packed], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        return table[id(weight)].copy.times(x, bias)

    return operator("packed_product", "Tensor x, Tensor weight, Tensor? bias", times, shape_of_product)


def adapted_packed_product() -> Any:
    """The operator x [B, Q, D], weight [E, D], bias [E], adapter [D, r] and [r, E], num_masks -> [B, Q, E]; in its
    table are packed adapters by the `id` of their first matrix."""
    weights = packed_product().table

    def adapted_times(table, x, weight, bias, down, up, num_masks):  # type: ignore[no-untyped-def]
        return weights[id(weight)].copy.adapted_times(x, bias, table[id(down)].copy, num_masks)

    takes = "Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, int num_masks"
    return operator("adapted_packed_product", takes, adapted_times, shape_of_product)


def prepare_adapter(down: torch.Tensor, up: torch.Tensor) -> None:
    """Packs an adapter's matrices [D, r] and [r, E], unless they are."""
    table = adapted_packed_product().table
    known = table.get(id(down))
    if known is None or known.matrix() is not down:
        known = table[id(down)] = PackedAdapter(down, up, table)
    known.copy.make_known(down)
