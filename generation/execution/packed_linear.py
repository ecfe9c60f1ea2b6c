"""A linear layer that also stores its weight in the order that CPU kernels read.

`nn.Linear` reorders its weight at every product of a few tokens. A packed layer reorders it once.
This file has all uses of torch's private operators. E outputs, D inputs.
"""

import os
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_internals import has_compiler_option, hooks_of, parts_of, times_written

PACKABLE = (torch.bfloat16, torch.float32)
# Of `torch.ops.mkldnn`.
PRIVATE_OPERATORS = "_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise"
NO_EPILOGUE: tuple[str, list[Any], str] = ("none", [], "")  # no activation after the product

if not hasattr(torch.ops.wavedraft, "_linear_pointwise"):  # the package and a checkpoint's copy of it share one process
    torch.library.define(
        "wavedraft::_linear_pointwise",
        "(Tensor x, Tensor packed, Tensor? bias, str attr, Scalar?[] scalars, str? algorithm) -> Tensor",
    )

    @torch.library.impl("wavedraft::_linear_pointwise", "default")
    def _linear_pointwise(*args: Any) -> Tensor:
        """torch's compiler accepts `mkldnn::_linear_pointwise` only with a constant weight. Under a name of ours it
        accepts a weight as an argument, so all layers share one compiled function."""
        return torch.ops.mkldnn._linear_pointwise.default(*args)

    @torch.library.register_fake("wavedraft::_linear_pointwise")
    def _shape_of_product(x: Tensor, packed: Tensor, *others: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], packed.shape[0])


compilable_product: Any = torch.ops.wavedraft._linear_pointwise.default
# The compiler's cache on disk pickles its options.
compilable_product.__reduce_ex__ = lambda protocol: (str, (str(compilable_product),))

SHIMS_OPTION = "aot_inductor.custom_ops_to_c_shims"
C_FUNCTION = (
    "AOTITorchError aoti_torch_cpu__linear_pointwise(AtenTensorHandle X, AtenTensorHandle W, AtenTensorHandle* B, "
    "const char* attr, const double** scalars, int64_t scalars_len_, const char** algorithm, AtenTensorHandle* ret0)"
)


def options_of_compiler() -> dict[str, Any]:
    """Inductor options that let compiled layers call the product without Python, if torch has them. Compiled code calls
    `aoti_torch_cpu_` plus an operator's name without its namespace: for ours, torch's own function."""
    if has_compiler_option(SHIMS_OPTION):
        return {"cpp_wrapper": True, SHIMS_OPTION: {compilable_product: [C_FUNCTION]}}
    return {"size_asserts": False}  # generated Python would read the strides of a packed weight, which has none


def has_packed_products(dtype: torch.dtype) -> bool:
    """Whether this CPU and this build of PyTorch have oneDNN products of a dtype."""
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, n) for n in PRIVATE_OPERATORS):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_packable(model: nn.Module) -> None:
    """Raises ValueError if packed weights cannot be used."""
    if model.device.type != "cpu" or model.dtype not in PACKABLE:
        raise ValueError(
            f"`packed_weights` must be False for a model in {model.dtype} on {model.device}: it is for torch.bfloat16 "
            "and torch.float32 on a CPU. Leave it out, or load the model with one of these `dtype`s."
        )
    if not has_plain_linears(model):
        raise ValueError(
            f"`packed_weights` must be False for this {type(model).__name__}: oneDNN reads plain weights, but its "
            "linear layers are quantized or replaced. Leave it out."
        )
    if not has_packed_products(model.dtype):
        why = f"this CPU, or this build of PyTorch, has no oneDNN products of {model.dtype}"
        instead = ", or load the model with `dtype=torch.float32`" if has_packed_products(torch.float32) else ""
        raise ValueError(f"`packed_weights` must be False on this machine: {why}. Leave it out{instead}.")


def pays_to_pack(model: nn.Module) -> bool:
    """Whether this is a CPU with such products, and with memory for all weights eight times over."""
    if model.device.type != "cpu" or model.dtype not in PACKABLE or not has_packed_products(model.dtype):
        return False
    num_bytes = sum(linear.weight.nbytes for _, _, linear in packable_linears(model))
    return (
        has_plain_linears(model)
        and hasattr(os, "sysconf")
        and 8 * num_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )


class PackedLinear(nn.Module):
    """Replaces an `nn.Linear` on a CPU without gradients. It shares the layer's parameters.

    Args:
        reducer: [D, r], read with the weight in one product; None: nothing is.

    Attributes:
        packed: the weight and the reducer, [E + r, D] in oneDNN's order. Not a buffer: it belongs in no checkpoint.
    """

    has_plain_weight = True  # as the lm_head, it has one row per token

    def __init__(self, linear: nn.Linear, reducer: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.fingerprint = fingerprint_of(linear.weight)
        self.reducer, weight = reducer, linear.weight.detach()
        self.packed = packed_weight(weight if reducer is None else torch.cat([weight, reducer.t()]))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., E]. Uses the plain weight under autocast, where x may have another dtype, and for a
        single token in float32, which then equals plain decoding bit for bit."""
        is_single = x.dtype == torch.float32 and x.numel() == x.shape[-1]
        if is_single or x.dtype != self.weight.dtype:
            return nn.functional.linear(x, self.weight, self.bias)
        both = self.both(x)
        return both if self.reducer is None else both[..., : self.out_features]

    def both(self, x: Tensor) -> Tensor:
        """What the weight and the reducer make of x [..., D], [..., E + r]."""
        bias = self.bias
        if bias is not None and self.reducer is not None:
            bias = nn.functional.pad(bias, (0, self.reducer.shape[1]))
        return packed_product(x, self.packed, bias)

    def is_of(self, linear: nn.Linear, reducer: Tensor | None) -> bool:
        """Whether this holds that layer's weight as it is now, and the reducer where one is needed."""
        if reducer is not None and self.reducer is not reducer:
            return False
        is_same = self.weight is linear.weight and self.bias is linear.bias
        return is_same and self.fingerprint == fingerprint_of(linear.weight)


def packed_weight(weight: Tensor) -> Tensor:
    """A weight [E, D] in oneDNN's order. An inference tensor would not share compiled code with packed weights made
    outside inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight)


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., D] times a packed weight of [E, D], plus the bias: [..., E]"""
    product = compilable_product if torch.compiler.is_compiling() else torch.ops.mkldnn._linear_pointwise.default
    return product(x.contiguous(), packed, bias, *NO_EPILOGUE)


def fingerprint_of(weight: Tensor) -> tuple[Any, ...]:
    """A value that changes when a weight is written or moved. An optimizer may change only the numbers, so a trainable
    weight is also summed, as 64-bit integers. Of a frozen weight every thousandth is summed: PEFT merges an adapter
    into `weight.data`, whose writes torch does not count, and changes nearly all numbers."""
    version, numbers = times_written(weight), weight.detach().flatten().view(torch.int64)
    if not weight.requires_grad and version is not None:
        numbers = numbers[::1000]
    return version, weight.data_ptr(), int(numbers.sum())


def packable_linears(model: nn.Module) -> list[tuple[dict[str, Any], str, nn.Linear]]:
    """The linear layers that a `PackedLinear` can replace; for an adapted layer, its base layer.

    Returns:
        for each, the dictionary of its siblings, its name there, and the layer.
    """
    found, seen, to_visit = [], {model}, [model]
    while to_visit:
        module = to_visit.pop()
        parts = parts_of(module)
        only_base = parts.get("base_layer") is not None
        for name, child in parts.items():
            if child is None or (only_base and name != "base_layer"):
                continue
            if type(child) is nn.Linear:
                if is_packable(child, model.dtype):
                    found.append((parts, name, child))
            elif child not in seen:
                seen.add(child)
                to_visit.append(child)
    return found


def has_plain_linears(model: Any) -> bool:
    """Whether a layer besides the lm_head can be packed: none of a quantized model can."""
    return any(linear is not model.get_output_embeddings() for _, _, linear in packable_linears(model))


def is_packable(linear: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether a layer has a weight of the model's dtype, and no replaced forward or hooks, which would be lost. The
    fingerprint reads the weight as 64-bit integers."""
    weight = linear.weight
    has_own_call = "forward" in linear.__dict__ or hooks_of(linear)
    is_whole = weight.numel() > 0 and not weight.numel() % 4 and not weight.storage_offset() % 4
    is_plain = type(weight.data) is Tensor  # quantized weights are classes of their own
    return is_plain and weight.dtype == dtype and weight.is_contiguous() and is_whole and not has_own_call


def packed_copy(linear: nn.Linear, kept: MutableMapping[nn.Module, Any], reducer: Tensor | None = None) -> PackedLinear:
    """The packed copy of a layer, from `kept` if the layer's parameters and the reducer are unchanged. Whoever needs no
    reducer takes any copy."""
    copy = kept.get(linear)
    if copy is None or not copy.is_of(linear, reducer):
        copy = kept[linear] = PackedLinear(linear, reducer)
    return copy
