"""A linear layer whose low-rank adapter acts on the mask tokens alone, without PEFT's bookkeeping.

PEFT's own layer costs a CPU as much time a forward as the adapter's arithmetic. This one stands in its place during a
decode. B rows, Q queries, D and E channels, r the adapter's rank.
"""

from typing import Any

import torch
from torch import nn

from .mask_gate import MaskGate
from .torch_internals import parts_of, share_hooks

MOST_SUMMED = 1 << 20  # multiplications that a compiled step does one by one on an accelerator, not as a product


class GatedLinear(nn.Module):
    """base(x), and on the last `gate.num_masks` queries also x @ down @ up.

    Args:
        adapted: PEFT's layer, whose hooks are run here too.
        down, up: [D, r] and [r, E], the scaling in the latter.
    """

    def __init__(self, adapted: Any, down: torch.Tensor, up: torch.Tensor, gate: MaskGate):
        super().__init__()
        self.base = adapted.base_layer
        self.down, self.up, self.gate = down, up, gate
        self.training = adapted.training
        share_hooks(self, adapted)

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


def factors_of(module: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices of one adapter of PEFT's layer as products take them: [D, r] and [r, E], the scaling in the latter.

    A small product takes a CPU half as long in float32 as in bfloat16, whose kernel is set up anew each time.
    """
    lora_a, lora_b = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
    is_cpu = lora_a.device.type == "cpu"
    dtype = torch.promote_types(lora_a.dtype, torch.float32) if is_cpu else lora_a.dtype
    return lora_a.to(dtype).t(), lora_b.to(dtype).t() * module.scaling[name]
