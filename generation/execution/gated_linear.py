"""A linear layer whose low-rank adapter acts on the mask tokens alone, without PEFT's bookkeeping.

PEFT's own layer costs a CPU as much time a forward as the adapter's arithmetic. This one stands in its place during a
decode. B rows, Q queries, D and E channels, r the adapter's rank.
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import nn

from ..torch_internals import parts_of, share_hooks
from .mask_gate import MaskGate

MOST_SUMMED = 1 << 20  # multiplications that a compiled step does one by one on an accelerator, not as a product


class GatedLinear(nn.Module):
    """base(x), and on the last `gate.num_masks` queries also x @ down @ up.

    Args:
        adapted: PEFT's layer, whose hooks are run here too.
        name: of the adapter.

    Attributes:
        down, up: [D, r] and [r, E], the scaling in the latter.
        state: what `adapted` was when they were made.
    """

    def __init__(self, adapted: Any, name: str):
        super().__init__()
        self.down, self.up = factors_of(adapted, name)
        self.state = state_of(adapted, name)
        share_hooks(self, adapted)

    def in_decode(self, adapted: Any, gate: MaskGate) -> "GatedLinear":
        """The layer as one decode uses it: over the base layer that stands below the adapter now."""
        self.base, self.gate, self.training = adapted.base_layer, gate, adapted.training
        return self

    def forward(self, x: torch.Tensor, **peft: Any) -> torch.Tensor:
        """[B, Q, D] -> [B, Q, E]. What PEFT hands to its layers beside x is of no concern here."""
        result = self.base(x)
        num_masks = self.gate.num_masks
        if num_masks:
            masks = x[:, -num_masks:].reshape(-1, x.shape[-1]).to(self.down.dtype)
            delta = product(product(masks, self.down), self.up)
            result[:, -num_masks:] += delta.view(len(x), num_masks, -1)
        return result


def product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """[n, D] times [D, E]. A compiled sum of a few rows runs beside the work around it, where a product would wait."""
    is_small = len(x) <= 16 if x.device.type == "cpu" else len(x) * matrix.numel() <= MOST_SUMMED
    if torch.compiler.is_compiling() and is_small:
        return (x[:, None] * matrix.t()).sum(dim=-1)
    return torch.mm(x, matrix)


def sole_adapter(module: Any) -> str | None:
    """The adapter that is all that PEFT's layer does beside its base layer; None where it does more or less."""
    parts = parts_of(module)  # read as they stand: a thousand look-ups by attribute take 2 ms
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
    """What an adapter's arithmetic depends on. An optimizer may leave no trace of a step but the numbers, so they are
    summed, as integers; the matrices are small."""
    weights = module.lora_A[name].weight, module.lora_B[name].weight
    return module.scaling[name], *((w.data_ptr(), w.shape, w.dtype, w.device, sum_of(w)) for w in weights)


def sum_of(weight: torch.Tensor) -> int:
    numbers = weight.detach().flatten()
    is_whole = numbers.numel() * numbers.element_size() % 8 == 0
    return int(numbers.view(torch.int64 if is_whole else torch.uint8).sum())


def gated_linear(adapted: Any, name: str, gate: MaskGate, kept: MutableMapping[nn.Module, Any]) -> GatedLinear:
    """The layer that takes the place of PEFT's, kept from one decode to the next while the adapter is the same."""
    layer = kept.get(adapted)
    if layer is None or layer.state != state_of(adapted, name):
        layer = kept[adapted] = GatedLinear(adapted, name)
    return layer.in_decode(adapted, gate)


def factors_of(module: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices of one adapter of PEFT's layer as products take them: [D, r] and [r, E], the scaling in the latter.

    A small product takes a CPU half as long in float32 as in bfloat16, whose kernel is set up anew each time.
    """
    lora_a, lora_b = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
    is_cpu = lora_a.device.type == "cpu"
    dtype = torch.promote_types(lora_a.dtype, torch.float32) if is_cpu else lora_a.dtype
    return lora_a.to(dtype).t(), lora_b.to(dtype).t() * module.scaling[name]
