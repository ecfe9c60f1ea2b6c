"""Operators that compiled layers call by name: in Python, or, where torch's compiler can, straight in our C++."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .bfloat16_kernel import KERNEL_VERSION, bfloat16_kernel

TYPES_IN_CPP = {
    "Tensor": "AtenTensorHandle",
    "Optional[Tensor]": "AtenTensorHandle*",
    "int": "int64_t",
    "float": "double",
}


def operator(
    name: str, takes: str, function: Callable[..., torch.Tensor], shape_only: Callable[..., torch.Tensor]
) -> Any:
    """The operator of a name, and its attribute `table`: what it keeps from one call to the next.

    There is one in a process, whichever copy of this code (the package's, a checkpoint's) defines it first; another
    version of our C++ has others.

    Args:
        takes: its arguments, as torch writes them; it returns a tensor.
        function: what it does; gets the table first.
        shape_only: an empty tensor like the one it returns.
    """
    name = f"{name}_{KERNEL_VERSION}"
    if not hasattr(torch.ops.wavedraft, name):
        table: dict[int, Any] = {}
        library = torch.library.Library("wavedraft", "FRAGMENT")
        library.define(f"{name}({takes}) -> Tensor")
        library.impl(name, partial(function, table), "CPU")
        library.impl(name, shape_only, "Meta")
        found = getattr(torch.ops.wavedraft, name)
        found.library, found.table = library, table
    return getattr(torch.ops.wavedraft, name)


def options_of_compiler(*operators: Any) -> dict[str, Any]:
    """Options of torch's compiler under which compiled layers call these operators without any Python between, and
    nothing else through Python either; none where this torch has no such option, or the machine no C++ compiler."""
    has_option = hasattr(getattr(torch._inductor.config, "aot_inductor", None), "custom_ops_to_c_shims")
    if not has_option or isinstance(bfloat16_kernel(), str):
        return {}
    declared = {}
    for one in operators:
        types = [TYPES_IN_CPP[str(argument.type)] for argument in one.default._schema.arguments]
        takes = ", ".join([*types, "AtenTensorHandle*"])
        declared[one.default] = [f"AOTITorchError aoti_torch_cpu_{one.__name__}({takes})"]
    return {"cpp_wrapper": True, "aot_inductor.custom_ops_to_c_shims": declared}
