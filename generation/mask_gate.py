"""Lets a gated adapter act on the mask tokens of a forward, and on nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class MaskGate:
    """Takes the place of PEFT's aLoRA arithmetic in every adapted layer of one model.

    On disk the adapter is a stock PEFT aLoRA (arXiv 2504.12397), which acts on the last n tokens of a row. Masks are
    always the last queries of a forward, so the gate is that n. PEFT finds those tokens with a boolean index, which
    waits for the GPU in every layer; here they are a slice, with the same numbers. Closed (n = 0), the layer returns
    the base layer's result untouched: the autoregressive side is bit for bit the base model's.

    Attributes:
        num_masks: n, the queries at the end of each row that the adapter acts on.
    """

    def __init__(self, variant: Any):
        self.variant = variant  # PEFT's own: still answers for merging, which it refuses
        self.num_masks = 0

    @classmethod
    def of(cls, model: nn.Module) -> "MaskGate | None":
        """The gate of a model's aLoRA adapters, put in where PEFT's arithmetic still stands; None without any.

        A gate of another copy of this code (the package's, a checkpoint's) gives way to this one's.
        """
        gate = None
        ungated = []
        for module in model.modules():
            for name, variant in getattr(module, "lora_variant", {}).items():
                if isinstance(variant, cls):
                    gate = gate or variant
                elif type(variant).__name__ == "ALoraLinearVariant":
                    ungated.append((module, name, variant))
                elif type(variant).__name__ == cls.__name__:
                    ungated.append((module, name, variant.variant))
        for module, name, variant in ungated:
            gate = gate or cls(variant)
            module.lora_variant[name] = gate
        return gate

    @contextmanager
    def open(self, num_masks: int) -> Iterator[None]:
        self.num_masks = num_masks
        try:
            yield
        finally:
            self.num_masks = 0

    def open_in_backward(self, loss: torch.Tensor, num_masks: int) -> None:
        """Opens the gate again while `loss` is differentiated: gradient checkpointing runs the layers once more."""

        def close() -> None:
            self.num_masks = 0

        def reopen(gradient: torch.Tensor) -> None:
            self.num_masks = num_masks
            torch.autograd.Variable._execution_engine.queue_callback(close)

        loss.register_hook(reopen)

    def forward(
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Adds the adapter to the last `num_masks` rows of `result` [B, Q, D], in place as PEFT does."""
        if self.num_masks:
            lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
            masks = module.lora_dropout[active_adapter](x[:, -self.num_masks :].to(lora_a.weight.dtype))
            delta = lora_b(lora_a(masks)) * module.scaling[active_adapter]
            result[:, -self.num_masks :] += delta.to(result.dtype)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["variant"], name)
