"""Layers that keep a state while drafts are read: linear attention, state spaces, short convolutions.

A state cannot take a token back, so a layer is called twice in a forward. The first call reads the tokens that have
been decided since, and keeps the state after them. The second reads drafts and masks, from a copy. What it read is kept
too: of a draft that stands, the next forward's first call reads the layer's inputs again, and no other layer's.

A rows, T tokens, N clean tokens, M blocks of K masks, D channels.
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from ..stock_model import has_states

Run = Callable[..., Tensor]
NO_LIMIT = (0.0, float("inf"))
OF_STATES = ("conv_states", "recurrent_states")


class Reading(NamedTuple):
    """What a forward reads of each row.

    Attributes:
        lengths: of the texts before.
        is_prompt: whether all clean tokens stand already; of a draft, the first does.
        branches: for each row, how many clean tokens each of its blocks follows; empty without masks.
        is_real: [A, N], False for padding; None without.
    """

    lengths: list[int]
    num_clean: int
    is_prompt: bool
    draft_length: int
    branches: list[list[int]]
    is_real: Tensor | None

    @property
    def num_decided(self) -> int:
        return self.num_clean if self.is_prompt else 1


class KeptState:
    """The state of a layer, and the inputs [A, T, D] of the tokens read after it.

    Attributes:
        lengths: tokens of each row that the state has read; None: all of the text.
    """

    def __init__(self, layer: LinearAttentionLayer | None = None):
        self.layer = LinearAttentionLayer() if layer is None else layer
        self.inputs: Tensor | None = None
        self.lengths: list[int] | None = None
        self.run: Run | None = None

    def read(self, run: Run, states: Tensor, reading: Reading) -> Tensor:
        """The layer's outputs [A, N + M*K, D] of its inputs `states`."""
        num_clean, decided = reading.num_clean, reading.num_decided
        self.run = run
        outputs = [self.advance(states[:, :decided], reading.lengths, reading.is_real)]
        self.inputs, self.lengths = states[:, decided:num_clean], [length + decided for length in reading.lengths]
        if all(branch == num_clean for row in reading.branches for branch in row[:1]) and len(reading.branches[0]) < 2:
            rest = [states[:, decided:]] if states.shape[1] > decided else []  # drafts and masks in their order
            outputs += [run(self.copy(), tokens, num_masks=states.shape[1] - num_clean) for tokens in rest]
            return torch.cat(outputs, dim=1)
        if num_clean > decided:
            outputs.append(run(self.copy(), self.inputs))
        return torch.cat([*outputs, self.blocks(run, states[:, num_clean:], reading)], dim=1)

    def blocks(self, run: Run, masks: Tensor, reading: Reading) -> Tensor:
        """The outputs of blocks of masks [A, M*K, D], each read after the tokens that it follows."""
        outputs, length = torch.empty_like(masks), reading.draft_length
        assert self.inputs is not None
        groups = grouped([(branch, m) for row in reading.branches for m, branch in enumerate(row)])
        num_blocks = len(reading.branches[0])
        for (branch, m), places in groups.items():
            rows, block = [place // num_blocks for place in places], slice(m * length, (m + 1) * length)
            tokens = torch.cat([self.inputs[rows, : branch - reading.num_decided], masks[rows, block]], dim=1)
            outputs[rows, block] = run(self.copy(rows), tokens, num_masks=length)[:, -length:]
        return outputs

    def advance(self, tokens: Tensor, lengths: list[int], is_real: Tensor | None = None) -> Tensor:
        """Reads the tokens of texts of `lengths` that the state lacks, then `tokens` [A, T, D], for good.

        Padding in front is skipped where a state is there, which it would change; else the layer hides it itself.

        Returns:
            the outputs of `tokens`.
        """
        run, inputs, num_rows = self.run, self.inputs, len(lengths)
        counts = [0] * num_rows if self.lengths is None else [n - m for n, m in zip(lengths, self.lengths, strict=True)]
        firsts, self.lengths = [0] * num_rows, None
        if is_real is not None and any(self.layer.has_previous_state.values()):
            firsts, is_real = (is_real.cumsum(dim=1) == 0).sum(dim=1).tolist(), None
        outputs, layers, order = torch.zeros_like(tokens), [], []
        groups = grouped(zip(counts, firsts, strict=True))
        for (count, first), rows in groups.items():
            layer = self.layer if len(groups) == 1 else self.copy(rows)
            seen = tokens[rows, first:] if not count else torch.cat([inputs[rows, :count], tokens[rows, first:]], dim=1)
            if seen.shape[1]:
                outputs[rows, first:] = run(layer, seen, is_real)[:, count:]
            layers.append(layer)
            order += rows
        self.layer = layers[0] if len(layers) == 1 else joined(layers, order)
        return outputs

    def copy(self, rows: list[int] | None = None) -> LinearAttentionLayer:
        """The state of these rows, by default of all, to write to."""
        return joined([self.layer], slice(None) if rows is None else rows)

    def of_rows(self, rows: list[int]) -> "KeptState":
        """These rows, in memory of their own."""
        found = KeptState(self.copy(rows))
        found.inputs, found.run = self.inputs if self.inputs is None else self.inputs[rows], self.run
        found.lengths = self.lengths and [self.lengths[row] for row in rows]
        return found

    def after(self, length: int) -> LinearAttentionLayer:
        """The state of the one row after `length` tokens."""
        if self.inputs is not None:
            self.advance(self.inputs[:, :0], [length])
        return self.layer


def joined(layers: list[LinearAttentionLayer], order: Any) -> LinearAttentionLayer:
    """The states of `layers` as one, of which row i becomes row `order[i]`; or the rows `order` of one."""
    found = copy.copy(layers[0])
    vars(found).update({name: dict(value) for name, value in vars(found).items() if isinstance(value, dict)})
    if len(layers) > 1:
        order = torch.tensor(order).argsort().tolist()
    for name in OF_STATES:
        for index, state in getattr(found, name).items():
            if state is not None:
                states = torch.cat([getattr(layer, name)[index] for layer in layers])
                getattr(found, name)[index] = states.clone() if isinstance(order, slice) else states[order]
    return found


def of_type(layer: LinearAttentionLayer, kind: type) -> Any:
    """A copy of the state of a layer as a cache layer of this kind, that has it and may have more."""
    found = kind()
    for name, value in vars(joined([layer], slice(None))).items():
        if name in vars(LinearAttentionLayer()):
            setattr(found, name, value)
    return found


def grouped(keys: Any) -> dict[Any, list[int]]:
    """The places of each key."""
    groups = defaultdict(list)
    for place, key in enumerate(keys):
        groups[key].append(place)
    return groups


def stateful_layers(model: nn.Module) -> list[Any]:
    """The modules that write to the cache's convolution or recurrent states."""
    if not has_states(model.config):
        return []
    return [
        module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "conv_kernel_size")
    ]


class LayerCall(NamedTuple):
    """One call of a stateful layer by its model, made in parts.

    Attributes:
        plain: the layer's own forward.
        reads_singly: whether tokens after others are read one by one. Mamba-2 clamps time steps of several tokens, and
            not of one, as plain decoding does.
    """

    number: int
    plain: Callable[..., Any]
    cache: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gate: Any
    reads_singly: bool

    @classmethod
    def of(cls, module: Any, plain: Any, args: Any, kwargs: dict[str, Any], gate: Any, is_text: bool) -> "LayerCall":
        """Of a layer's arguments after its inputs. `is_text`: as plain decoding reads a text, not a draft."""
        is_clamped = tuple(getattr(module, "time_step_limit", None) or NO_LIMIT) != NO_LIMIT
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        return cls(module.layer_idx, plain, cache, args, kwargs, gate, is_clamped and not is_text)

    def __call__(self, layer: Any, states: Tensor, is_real: Tensor | None = None, num_masks: int = 0) -> Tensor:
        """The layer's outputs of `states` [A, T, D], whose last `num_masks` are masks. Writes to the state `layer`."""
        if self.reads_singly and states.shape[1] > 1 and layer.has_previous_state[0]:
            first_mask, tokens = states.shape[1] - num_masks, enumerate(states.split(1, dim=1))
            return torch.cat([self(layer, token, None, int(i >= first_mask)) for i, token in tokens], dim=1)
        layers = self.cache.layers
        layers[self.number], kept = layer, layers[self.number]
        try:
            with self.gate.open(num_masks) if self.gate else nullcontext():
                return self.plain(states, *self.args, **self.kwargs | {"attention_mask": is_real})
        finally:
            layers[self.number] = kept


def reading_twice(form: Any, module: Any) -> Callable[..., Any]:
    """The forward of a stateful layer while drafts are decoded."""
    plain = module.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        reading = form.reading
        call = LayerCall.of(module, plain, args, kwargs, form.gate, reading is None or reading.is_prompt)
        if not hasattr(call.cache, "kept_states"):
            return plain(hidden_states, *args, **kwargs)
        return call.cache.kept_states.setdefault(call.number, KeptState()).read(call, hidden_states, reading)

    return forward
