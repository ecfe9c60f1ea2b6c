"""Decode steps on a GPU as CUDA graphs: captured once, then replayed without Python between kernels.

B rows, H key heads, C slots, D channels per head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .kept_with_model import kept_with
from .stock_model import attention_of
from .torch_internals import hooks_of, tensors_of, times_written

PLAIN_TYPES = {bool, int, float, str, type(None), torch.dtype}
# Modes in which torch captures CUDA graphs, and the same without. Here the whole step is captured.
LAYER_MODES = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
OF_PEFT = {"_active_adapter", "merged_adapters", "scaling"}  # lists and dictionaries of an adapted layer
Step = Callable[..., tuple[Tensor, ...]]


class StepGraph:
    """One captured step.

    Args:
        step: a function of tensors. Everything else that it reads (`held`) must not change or move.
        inputs: example arguments.
        pool: the memory shared by the graphs of one model.
    """

    def __init__(self, step: Step, inputs: tuple[Tensor, ...], pool: Any, held: Any = None):
        self.held = held
        self.inputs = buffers_like(inputs)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.inputs[0].device):
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.outputs = step(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for buffer, tensor in zip(self.inputs, inputs, strict=True):
            buffer.copy_(tensor)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)


class StepGraphs:
    """The graphs of one model for one batch size and one cache capacity, and the memory that they read and write.

    Attributes:
        capacity: slots of their cache.
        dependencies: if these change, the graphs are captured again.
        layers: keys and values [B, H, C, D] of each layer.
        is_real_slot: [B, C] the real slots of a padded batch; rewritten by each decode.
        has_run: shapes of steps that have run once. The first run compiles layers and loads libraries.
    """

    record = StepGraph

    def __init__(self, dependencies: Any, capacity: int = 0):
        self.dependencies = dependencies
        self.capacity = capacity
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.is_real_slot: Tensor | None = None
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self.has_run: set[Any] = set()
        self.graphs: dict[Any, StepGraph] = {}

    @classmethod
    def of(cls, model: nn.Module, num_slots: int, *dependencies: Any) -> "StepGraphs":
        """The graphs kept with the model, if it is unchanged and their cache is large enough; else new ones."""
        kind = model.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        modes = torch.is_inference_mode_enabled(), autocast, torch.get_float32_matmul_precision()
        dependencies = *dependencies, modes, what_a_step_reads(model)
        kept = kept_with(model)
        if kept.graphs is None or kept.graphs.dependencies != dependencies or kept.graphs.capacity < num_slots:
            kept.graphs = None  # frees memory before the next allocation
            kept.graphs = cls(dependencies, num_slots)
        return kept.graphs

    def padding_of(self, is_real_slot: Tensor) -> Tensor:
        """Copies a decode's padding [B, P] to the tensor [B, C] that the graphs read."""
        if self.is_real_slot is None:
            self.is_real_slot = is_real_slot.new_ones(len(is_real_slot), self.capacity)
        self.is_real_slot.fill_(True)
        self.is_real_slot[:, : is_real_slot.shape[1]] = is_real_slot
        return self.is_real_slot

    def run(self, shape: Any, step: Step, inputs: tuple[Tensor, ...], held: Any) -> tuple[Tensor, ...]:
        """The outputs of `step` for `inputs`. From the second call on, the graph computes them.

        Raises:
            RuntimeError: the step cannot be captured.
        """
        if shape not in self.has_run:
            self.has_run.add(shape)
            return step(*buffers_like(inputs))  # strides as in capture, so nothing recompiles then
        if shape not in self.graphs:
            try:
                self.graphs[shape] = self.record(step, inputs, self.pool, held)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    "A decode step of this model could not be captured as a CUDA graph, probably because its forward "
                    f"waits for the GPU ({str(error).splitlines()[0]}). Pass `compile_config=CompileConfig("
                    "mode='default', dynamic=False)`, which captures nothing, or `disable_compile=True`."
                ) from error
        return self.graphs[shape](*inputs)


def buffers_like(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Contiguous copies."""
    return tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs)


def what_a_step_reads(model: nn.Module) -> list[Any]:
    """What must be equal for a graph to stay valid: modules, plain attributes, hooks, addresses and write counts of
    tensors, the active adapter."""
    seen: list[Any] = [attention_of(model.config)]
    for module in model.modules():
        seen.append(id(vars(module)))  # shared by views of a model
        seen += [x if x is None else (x.data_ptr(), times_written(x), x.shape, x.dtype) for x in tensors_of(module)]
        seen += hooks_of(module)
        attributes = {} if module is model else vars(module)  # `generate` sets attributes of the model
        seen += [(name, value) for name, value in attributes.items() if type(value) in PLAIN_TYPES]
        seen += [(name, repr(attributes[name])) for name in OF_PEFT & attributes.keys()]
    return [*seen, model.training]
