"""Compiled layers that give, bit for bit, what the same layers give uncompiled, in bfloat16 on a CPU.

What is fused rounds to bfloat16 wherever the layers do, and the means of norms are summed up in PyTorch's own order.
"""

from functools import cache
from typing import Any

import torch

from .bfloat16_kernel import KERNEL_VERSION
from .bfloat16_products import known_kernel
from .cpp_operators import operator

FEWEST_CHANNELS = 8  # fewer are summed up in another order


def mean_of_channels() -> Any:
    """The operator x [..., D] in float32 -> its means [..., 1], as `x.mean(-1, keepdim=True)` has them."""

    def mean(table, x):  # type: ignore[no-untyped-def]
        x, result = x.contiguous(), x.new_empty(*x.shape[:-1], 1)
        known_kernel().mean_of_channels(x.data_ptr(), result.data_ptr(), result.numel(), x.shape[-1])
        return result

    return operator("mean_of_channels", "Tensor x", mean, lambda x: x.new_empty(*x.shape[:-1], 1))


def options_of_eager_bits() -> dict[str, Any]:
    """Options of torch's compiler, besides those that tell it how `mean_of_channels` is called; none where this torch
    cannot be told to round as layers do."""
    if not hasattr(torch._inductor.config, "emulate_precision_casts"):
        return {}
    return {"emulate_precision_casts": True, "post_grad_custom_pre_pass": pass_of_means()}


@cache
def pass_of_means() -> Any:
    """Lets torch's compiler call `mean_of_channels` for the means of a norm."""
    from torch._inductor.custom_graph_pass import CustomGraphPass  # a second, which only compiling is worth

    class MeansOfChannels(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim):
                x, axes, keeps_axis = (*node.args, False)[:3]
                about = x.meta["val"]
                is_of_channels = keeps_axis and list(axes) in ([-1], [about.dim() - 1]) and about.stride(-1) == 1
                is_of_channels &= about.dtype == torch.float32 and about.shape[-1] >= FEWEST_CHANNELS
                if is_of_channels and len(node.args) < 4 and not node.kwargs:
                    node.target, node.args = mean_of_channels().default, (x,)

        def uuid(self) -> str:
            return f"{type(self).__qualname__} {KERNEL_VERSION}"

        __repr__ = uuid  # compiled layers are told apart by what their options print

    return MeansOfChannels()
