"""A CPU twin of a CUDA graph: kernels are recorded with their tensors and replayed without Python in between."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wavedraft.generation.step_graph import StepGraph, buffers_like


class Kernels(TorchDispatchMode):
    """Records every kernel that runs, with its input and output tensors, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for a value"
        written = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, written))
        return written

    def replay(self):
        for func, args, kwargs, before in self.calls:
            for old, new in zip(tree_leaves(before), tree_leaves(func(*args, **kwargs)), strict=True):
                if (
                    isinstance(old, torch.Tensor)
                    and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
                ):
                    old.copy_(new)


class Recording(StepGraph):
    """A `StepGraph` of CPU kernels: the twin of a CUDA graph."""

    num_recorded = 0
    num_replays = 0

    def __init__(self, step, inputs, pool, held=None):
        Recording.num_recorded += 1
        self.held, self.graph = held, Kernels()
        self.inputs = buffers_like(inputs)
        with self.graph:
            self.outputs = step(*self.inputs)
        for output in self.outputs:  # a graph's outputs are undefined before its first run
            output.fill_(-1e4)

    def __call__(self, *inputs):
        Recording.num_replays += 1
        return super().__call__(*inputs)
