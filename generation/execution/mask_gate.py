"""Lets a gated adapter act on the mask tokens of a forward, and on nothing else.

B rows, Q queries, D channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..torch_internals import parts_of


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
        for module in adapted_layers(model):
            for name, variant in variants_of(module).items():
                if isinstance(variant, cls):
                    gate = gate or variant
                elif (own := peft_variant(variant)) is not None:
                    ungated.append((module, name, own))
        for module, name, own in ungated:
            gate = gate or cls(own)
            variants_of(module)[name] = gate
        return gate

    @contextmanager
    def open(self, num_masks: int) -> Iterator[None]:
        """While this is open, the adapter acts on the last `num_masks` queries of each row."""
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
            masks = x[:, -self.num_masks :]
            if not torch.is_autocast_enabled(x.device.type):  # which chooses the type of every product by itself
                masks = masks.to(lora_a.weight.dtype)
            reduced = lora_a(module.lora_dropout[active_adapter](masks)) * module.scaling[active_adapter]
            delta = lora_b(reduced).to(result.dtype)
            if self.num_masks == x.shape[1]:
                return result + delta
            result[:, -self.num_masks :] += delta
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "variant" not in self.__dict__:  # a copy asks before it has anything
            raise AttributeError(name)
        return getattr(self.__dict__["variant"], name)


def peft_variant(variant: Any) -> Any:
    """PEFT's own aLoRA arithmetic, bare or below a gate of any copy of this code; None where it is another's."""
    if type(variant).__name__ == MaskGate.__name__:
        return variant.variant
    return variant if type(variant).__name__ == "ALoraLinearVariant" else None


def variants_of(layer: Any) -> dict[str, Any]:
    """The arithmetic by which PEFT's layer applies each of its adapters that has one of its own, by adapter."""
    return layer.lora_variant


def adapted_layers(model: nn.Module) -> dict[Any, tuple[dict[str, Any], str]]:
    """PEFT's layers with an arithmetic of their own, each with its place: the modules it stands among, and its name.
    They are found without asking each of a thousand modules for what it has not."""
    found: dict[Any, tuple[dict[str, Any], str]] = {}
    to_visit: list[tuple[dict[str, Any], str, nn.Module]] = [({}, "", model)]
    while to_visit:
        siblings, name, module = to_visit.pop()
        if module.__dict__.get("lora_variant"):
            found[module] = siblings, name
        else:
            parts = parts_of(module)
            to_visit += [(parts, key, child) for key, child in parts.items() if child is not None]
    return found


@contextmanager
def gate_for_decode(layers: list[tuple[Any, str]], gate: MaskGate) -> Iterator[None]:
    """While this is open, `gate` does the aLoRA arithmetic of these layers and adapters."""
    kept = [(variants_of(layer), name, variants_of(layer)[name]) for layer, name in layers]
    for variants, name, _ in kept:
        variants[name] = gate
    try:
        yield
    finally:
        for variants, name, variant in kept:
            variants[name] = variant
