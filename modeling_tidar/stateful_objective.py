"""Teaching models whose layers keep a state: the clean half leaves its state where each block of masks begins, and the
blocks are read from there as a batch.

This file does not travel with a checkpoint. B sequences, S clean tokens, M blocks of K masks, D channels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from ..generation.execution.compiled_layers import swapped
from ..generation.execution.gated_linear import mask_gate_of
from ..generation.execution.stateful_layers import LayerCall, joined, stateful_layers


class ReadState(LinearAttentionLayer):
    """A state that is read and never written to, so that gradients pass."""

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        before = self.conv_states[state_idx]
        return conv_states if before is None else torch.cat([before, conv_states], dim=-1)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return recurrent_states


class BlockStates:
    """The states of a batch's stateful layers where its blocks begin.

    Raises:
        ValueError: a row has several documents, whose states would mix.
    """

    def __init__(self, model: Any, batch: Any):
        before, after = batch.document_ids[:, :-1], batch.document_ids[:, 1:]
        if ((before != after) & (after != -1)).any():
            raise ValueError(
                f"A row of a {model.config.model_type!r} model must be one document, padded on the right: its layers "
                "keep a state, which would pass from one document to the next. Leave rows unpacked."
            )
        self.layers, self.gate = stateful_layers(model), mask_gate_of(model)
        self.blocks, self.draft_length = batch.blocks, batch.draft_length
        self.starts = sorted(set(batch.blocks.flatten().tolist()))
        self.states: dict[int, dict[int, LinearAttentionLayer]] = {}

    def kept(self) -> Any:
        """The context of the clean half."""
        return self._reading(self._read_text)

    def read(self) -> Any:
        """The context of the masks."""
        return self._reading(self._read_blocks)

    @contextmanager
    def _reading(self, how: Callable[[LayerCall, Tensor], Tensor]) -> Iterator[None]:
        def forward_of(module: Any, plain: Any) -> Callable[..., Tensor]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                return how(LayerCall.of(module, plain, args, kwargs, self.gate, is_text=True), hidden_states)

            return forward

        with swapped([(vars(layer), "forward", forward_of(layer, layer.forward)) for layer in self.layers]):
            yield

    def _read_text(self, call: LayerCall, states: Tensor) -> Tensor:
        """[B, S, D], in pieces between the starts of blocks."""
        layer, kept, outputs = LinearAttentionLayer(), {}, []
        for start, stop in pairwise(sorted({0, *self.starts, states.shape[1]})):
            kept[start] = joined([layer], slice(None))
            outputs.append(call(layer, states[:, start:stop]))
        kept[states.shape[1]] = layer
        self.states[call.number] = kept
        return torch.cat(outputs, dim=1)

    def _read_blocks(self, call: LayerCall, masks: Tensor) -> Tensor:
        """[B, M*K, D], each block from the state where it begins."""
        blocks = masks.unflatten(1, (-1, self.draft_length))
        pieces, places = [], []
        for starts in ([start for start in self.starts if not start], [start for start in self.starts if start]):
            found = [(start, *(self.blocks == start).nonzero(as_tuple=True)) for start in starts]
            if not found:
                continue
            layers = [joined([self.states[call.number][start]], rows.tolist()) for start, rows, _ in found]
            rows, numbers = (torch.cat(parts) for parts in list(zip(*found, strict=True))[1:])
            state = ReadState()
            for name, value in vars(joined(layers, [*range(len(rows))])).items():
                setattr(state, name, value)
            pieces.append(call(state, blocks[rows, numbers], num_masks=self.draft_length))
            places.append(rows * blocks.shape[1] + numbers)
        return torch.cat(pieces)[torch.cat(places).argsort()].view(blocks.shape).flatten(1, 2)
