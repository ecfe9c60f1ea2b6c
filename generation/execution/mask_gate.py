"""Lets a gated adapter act on the mask tokens of a forward, and on nothing else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .packed_weights import has_own_forward

MOST_SUMMED = 1 << 20  # multiplications that a compiled step does one by one on an accelerator, not as a product


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
        self.adapted: dict[nn.Module, tuple[dict[str, Any], str]] = {}
        self.factors: WeakKeyDictionary[nn.Module, Factors] = WeakKeyDictionary()
        self.short_ways: list[ShortWay] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "MaskGate | None":
        """The gate of a model's aLoRA adapters, put in where PEFT's arithmetic still stands; None without any.

        A gate of another copy of this code (the package's, a checkpoint's) gives way to this one's.
        """
        gate = None
        ungated = []
        adapted = adapted_layers(model)
        for module in adapted:
            for name, variant in module.lora_variant.items():
                if isinstance(variant, cls):
                    gate = gate or variant
                elif type(variant).__name__ == "ALoraLinearVariant":
                    ungated.append((module, name, variant))
                elif type(variant).__name__ == cls.__name__:
                    ungated.append((module, name, variant.variant))
        for module, name, variant in ungated:
            gate = gate or cls(variant)
            module.lora_variant[name] = gate
        if gate is not None:
            gate.adapted, gate.short_ways = adapted, None
        return gate

    @contextmanager
    def open(self, num_masks: int) -> Iterator[None]:
        """Without gradients, a layer that this gate alone adapts skips PEFT's bookkeeping while the gate is open: on
        a CPU it costs as much as the arithmetic. Where there are no masks, its base layer stands in its place."""
        self.num_masks = num_masks
        if torch.is_grad_enabled():  # it may be about to be taught
            self.factors.clear()
        if self.short_ways is None and not torch.is_grad_enabled():
            self.short_ways = [
                ShortWay(
                    module, module.__dict__, way, *place, None if has_hooks(module) else module._modules["base_layer"]
                )
                for module, place in self.adapted.items()
                if (way := self._short_way(module))
            ]
        short_ways = [] if torch.is_grad_enabled() else self.short_ways or []
        # Hundreds of layers, at every forward: nothing is looked up that is known.
        for _, attributes, way, siblings, name, base in short_ways:
            if num_masks or base is None:
                attributes["forward"] = way
            else:
                siblings[name] = base
        try:
            yield
        finally:
            self.num_masks = 0
            for module, attributes, _, siblings, name, base in short_ways:
                if num_masks or base is None:
                    attributes.pop("forward", None)
                else:
                    siblings[name] = module

    def _short_way(self, module: Any) -> Callable[..., torch.Tensor] | None:
        """The module's forward with nothing but the base layer and the adapter; None where PEFT has more to do."""
        parts = module._modules  # read as they stand: a thousand look-ups by attribute take 2 ms
        adapters = parts["lora_A"]._modules
        names = [name for name in module.active_adapters if name in adapters]
        if module.disable_adapters or module.merged or "forward" in module.__dict__ or len(names) != 1:
            return None
        (name,) = names
        base, lora_a, lora_b = layers = parts["base_layer"], adapters[name], parts["lora_B"]._modules[name]
        if not all(type(layer) is nn.Linear and not has_own_forward(layer) for layer in layers):
            return None
        is_one_dtype = len({getattr(layer._parameters.get("weight"), "dtype", layer) for layer in layers}) == 1
        has_dropout = module.training and not isinstance(module.lora_dropout[name], nn.Identity)
        has_bias = lora_b._parameters.get("bias") is not None
        if module.lora_variant.get(name) is not self or not is_one_dtype or has_dropout or has_bias:
            return None
        scaling = module.scaling[name]
        matrices = self._factors_of(lora_a, lora_b, scaling).matrices

        def short_way(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            if kwargs and kwargs.keys() - {"alora_offsets"}:
                return type(module).forward(module, x, **kwargs)
            # Without hooks, a call that would only look for them is left out.
            result = base(x) if has_hooks(base) else base.forward(x)
            if self.num_masks:
                down, up = matrices
                masks = x[:, -self.num_masks :].reshape(-1, x.shape[-1]).to(down.dtype)
                delta = product(product(masks, down), up)
                result[:, -self.num_masks :] += delta.view(len(x), self.num_masks, -1)
            return result

        return short_way

    def _factors_of(self, lora_a: nn.Module, lora_b: nn.Module, scaling: float) -> "Factors":
        """Kept from one call to the next while the adapter is frozen: some optimizers leave no trace of a step."""
        if lora_a.weight.requires_grad or lora_b.weight.requires_grad:
            return Factors(lora_a.weight, lora_b.weight, scaling)
        factors = self.factors.get(lora_a)
        if factors is None or not factors.are_of(lora_a.weight, lora_b.weight, scaling):
            factors = self.factors[lora_a] = Factors(lora_a.weight, lora_b.weight, scaling)
        return factors

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
        return getattr(self.__dict__["variant"], name)


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class ShortWay(NamedTuple):
    """An adapted layer, its attributes, its short forward, the modules it stands among and its name there, and the
    layer it adapts, which may stand in its place; None where hooks wait for it."""

    module: Any
    attributes: dict[str, Any]
    forward: Callable[..., torch.Tensor]
    siblings: dict[str, Any]
    name: str
    base: nn.Module | None


class Factors:
    """An adapter's two matrices as products take them, [D, r] and [r, E] with the scaling in it, for as long as its
    weights are what they were."""

    def __init__(self, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float):
        self.weights, self.scaling = (lora_a, lora_b), scaling
        self.states = tuple(map(state_of, self.weights))
        # A small product takes a CPU half as long in float32 as in bfloat16, whose kernel is set up anew each time.
        is_cpu = lora_a.device.type == "cpu"
        dtype = torch.promote_types(lora_a.dtype, torch.float32) if is_cpu else lora_a.dtype
        self.matrices = lora_a.detach().to(dtype).t(), lora_b.detach().to(dtype).t() * scaling

    def are_of(self, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> bool:
        is_same = self.weights[0] is lora_a and self.weights[1] is lora_b and self.scaling == scaling
        return is_same and self.states == (state_of(lora_a), state_of(lora_b))


def state_of(weight: torch.Tensor) -> tuple[Any, ...]:
    """What changes where a weight is written to, moved or converted."""
    return object() if weight.is_inference() else weight._version, weight.data_ptr(), weight.dtype, weight.device


def adapted_layers(model: nn.Module) -> dict[nn.Module, tuple[dict[str, Any], str]]:
    """PEFT's layers with an arithmetic of their own, each with its place: the modules it stands among, and its name.
    They are found without asking each of a thousand modules for what it has not."""
    found: dict[nn.Module, tuple[dict[str, Any], str]] = {}
    to_visit: list[tuple[dict[str, Any], str, nn.Module]] = [({}, "", model)]
    while to_visit:
        siblings, name, module = to_visit.pop()
        if module.__dict__.get("lora_variant"):
            found[module] = siblings, name
        else:
            to_visit += [(module._modules, key, child) for key, child in module._modules.items() if child is not None]
    return found


def product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """[n, D] times [D, E]. A compiled sum of a few rows runs beside the work around it, where a product would wait."""
    is_small = len(x) <= 16 if x.device.type == "cpu" else len(x) * matrix.numel() <= MOST_SUMMED
    if torch.compiler.is_compiling() and is_small:
        return (x[:, None] * matrix.t()).sum(dim=-1)
    return torch.mm(x, matrix)
