"""The one call of the network: it reads tokens and drafts what may follow each of them.

A unfinished rows, P prompt tokens, K drafted tokens, M branches, N clean queries, D channels, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig
from transformers.cache_utils import DynamicCache

from ..cache_name import CACHE
from ..execution.attention_forms import (
    attend_grouped,
    attend_in_step,
    grouped_attention,
    has_attention_interface,
    mask_over_prompt,
)
from ..execution.compiled_layers import CompiledLayers, is_recorded
from ..execution.mask_gate import MaskGate
from ..execution.packed_weights import PackedWeights
from ..execution.step_graph import StepGraphs
from ..execution.token_by_token import Spans, clean_tokens_alone, rounding_of
from ..logits_of_states import lm_head_logits
from ..stock_model import device_of
from .draft_cache import DraftCache, stack_rows
from .draft_head import DraftChain, draft_head_of
from .static_draft_cache import StaticDraftCache
from .structured_mask import (
    attention_windows,
    draft_mask_function,
    draft_positions,
    masks_of_groups,
    masks_of_step,
    real_slot_function,
    structured_attention_mask,
)

MOST_READ_AT_ONCE = 256  # masks whose logits an accelerator reads before it is known whose draft they are


def is_recurrent_depth(model: nn.Module) -> bool:
    """Whether it is a recurrent-depth model in the form of a stock decoder (`StockDecoder`)."""
    return hasattr(model, "num_cache_layers")


def num_cache_layers(model: nn.Module) -> int:
    """Layers of keys and values: one a layer, of a recurrent-depth model one a recurrence of it."""
    return model.num_cache_layers if is_recurrent_depth(model) else model.config.get_text_config().num_hidden_layers


def last_module(model: nn.Module) -> nn.Module:
    """The module whose output the lm_head reads."""
    return model.last_states if is_recurrent_depth(model) else getattr(model, model.base_model_prefix)


@dataclass
class FinishedRow:
    """Keys and values of a row that has left the forward, of each layer [H, length, D], and where its next token
    stands, [1]."""

    states: list[tuple[torch.Tensor, torch.Tensor]]
    next_position: torch.Tensor

    @property
    def length(self) -> int:
        return self.states[0][0].shape[1]


class DraftForward:
    """Feeds a model N clean tokens and M blocks of K masks at a time, and keeps the clean tokens it is told to.

    Args:
        draft_length: K.
        mask_embedding_id: the row of the embedding table that masks read.
        attention_mask: [B, P], 0 for padding; None where there is none.
        past_key_values: the cache of an earlier turn, or None.
        returns_cache: whether `final_cache` will be asked for; finished rows are then set aside, not dropped.
        is_tie_safe: where the attention implementation is sdpa, tokens are read beside others as they are alone; and
            `read_alone` may be asked.
        num_slots: slots of a cache that never grows, so that every step has one shape; None for one that does.
        compile_config: how the layers of such a step are compiled; None where they are not.
        packed_weights: the packed copies that linear layers read meanwhile; None where they read their weights.
        has_draft_head: whether the model's draft head, if it has one, is used.

    Attributes:
        num_forwards, num_prefill_forwards, num_tie_forwards: calls of the network, counted where it is called.
    """

    def __init__(
        self,
        model: nn.Module,
        draft_length: int,
        mask_embedding_id: int,
        batch_size: int,
        attention_mask: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        returns_cache: bool = False,
        is_tie_safe: bool = False,
        num_slots: int | None = None,
        compile_config: CompileConfig | None = None,
        packed_weights: PackedWeights | None = None,
        has_draft_head: bool = True,
    ):
        self.model = model
        self.draft_head = draft_head_of(model) if has_draft_head else None
        self.rows = list(range(batch_size))
        self.finished_rows: dict[int, FinishedRow] | None = {} if returns_cache else None
        self.draft_length = draft_length
        self.mask_embedding_id = mask_embedding_id
        self.gate = MaskGate.of(model)
        self.packed_weights = packed_weights
        num_layers, device = num_cache_layers(model), device_of(model)
        self.is_static = num_slots is not None
        self.compiled_layers = None if compile_config is None else CompiledLayers(model, compile_config)
        self.graphs: StepGraphs | None = None
        self.is_within_graph = False  # whether what is called now is recorded, or will be
        if is_recorded(model, compile_config):
            options = self.compiled_layers.options
            self.graphs = StepGraphs.of(model, num_slots, batch_size, options, mask_embedding_id)
            num_slots = self.graphs.capacity
        if num_slots is None:
            self.cache = DraftCache(batch_size, num_layers, device)
        else:
            self.cache = StaticDraftCache(batch_size, num_layers, device, num_slots)
        if past_key_values is not None and past_key_values.get_seq_length():
            self.cache.take_over(past_key_values)
        self.row_lengths = [self.cache.max_length] * batch_size
        self.is_real_slot = None if attention_mask is None else attention_mask.to(device).bool()
        text_config = model.config.get_text_config()
        self.vocab_size = text_config.vocab_size
        has_position_table = getattr(text_config, "rope_parameters", None) is None
        has_position_table = getattr(model, "has_position_table", has_position_table)
        # A mask may stand behind the last row of a learned position table; its prediction is never used there.
        self.last_position = text_config.max_position_embeddings - 1 if has_position_table else None
        self.num_forwards = self.num_prefill_forwards = self.num_tie_forwards = 0
        self.is_tie_safe = is_tie_safe
        self.windows = attention_windows(model.config)
        self.has_window = any(self.windows.values())
        if self.is_real_slot is not None and self.is_real_slot.all():
            self.is_real_slot = None  # as plain decoding has it
        has_interface = has_attention_interface(model)
        self.is_token_by_token = has_interface and is_tie_safe
        self.is_grouped = has_interface and not self.is_token_by_token
        self.rounding = rounding_of(model) if is_tie_safe else None
        self.is_real_in_prompt = self.is_real_slot
        self.next_positions: torch.Tensor  # [A, 1] of the next clean token
        self.branch_lengths: torch.Tensor  # [A, M] of the last forward
        self.mask_states: torch.Tensor  # [A, M*K, D] last hidden states of the last forward's masks
        self.mask_logits: torch.Tensor | None  # [A, M*(K - 1), V] of its masks 2..K, if they were read with the tokens

    def prefill(
        self, prompt_ids: torch.Tensor, position_ids: torch.Tensor | None, has_draft: bool = True
    ) -> torch.Tensor:
        """Reads the uncached part of the prompts [B, P] and drafts one block behind it.

        Args:
            position_ids: [B, at least the uncached part of P]; None counts the columns.
            has_draft: false reads the prompts as plain decoding does, with no masks behind them.

        Returns:
            logits behind the last prompt token, [B, 1, V].
        """
        device = self.cache.lengths.device
        num_clean = prompt_ids.shape[1] - self.cache.max_length
        if position_ids is None:
            position_ids = torch.arange(prompt_ids.shape[1], device=device).expand(len(prompt_ids), -1)
        positions = position_ids[:, -num_clean:].to(device)
        self.check_positions(positions[:, -1])
        branch_lengths = torch.full((len(prompt_ids), int(has_draft)), num_clean, device=device)
        target_logits = self._forward(
            prompt_ids[:, -num_clean:], positions, branch_lengths, num_read=1, is_prefill=True
        )
        self.num_prefill_forwards += 1
        self.branch_lengths = torch.ones_like(self.branch_lengths)  # behind the one token that it decides
        self.next_positions = positions[:, -1:] + 1
        self._advance(torch.full_like(self.cache.lengths, num_clean), [num_clean] * len(prompt_ids))
        if isinstance(self.cache, StaticDraftCache):
            self.cache.reserve_all(None if self.graphs is None else self.graphs.layers)
        return target_logits

    def verify_and_draft(self, draft_ids: torch.Tensor, branch_lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Reads a draft [A, N] and drafts one block behind its first `branch_lengths` [A, M] tokens, each 1 to N; by
        default behind each of its tokens.

        Returns:
            logits behind each draft token, [A, N, V].
        """
        num_clean = draft_ids.shape[1]
        if branch_lengths is None:
            every = torch.arange(1, num_clean + 1, device=self.next_positions.device)
            branch_lengths = every.expand(len(draft_ids), -1)
        if not self.is_within_graph:
            self.check_positions(self.next_positions)
        positions = self.next_positions + torch.arange(num_clean, device=self.next_positions.device)
        target_logits = self._forward(draft_ids, positions, branch_lengths, num_read=num_clean)
        self.num_forwards += 1
        return target_logits

    def read_alone(self, place: int, token_id: torch.Tensor, num_before: int) -> torch.Tensor:
        """Reads one token of one row's draft once more, `num_before` tokens of that draft before it, in the forward
        plain decoding would read it in. What it leaves in the cache takes the place of what the draft's left there.

        Args:
            token_id: [1, 1].

        Returns:
            logits behind it, [1, 1, V].
        """
        position = self.next_positions[place : place + 1] + num_before
        target_logits = self._forward(
            token_id,
            position,
            position.new_empty(1, 0),
            num_read=1,
            alone=(place, self.row_lengths[place] + num_before),
        )
        self.num_tie_forwards += 1
        return target_logits

    def rehearse(self, num_clean: int, num_blocks: int, mask_length: int) -> None:
        """Runs a forward of so many tokens and masks, and waits for it. Nothing of it is kept: its time is asked."""
        kept = self.draft_length, self.branch_lengths, self.mask_states, self.mask_logits
        steps = torch.arange(max(num_clean, num_blocks), device=self.next_positions.device)
        positions, branch_lengths = self.next_positions + steps[:num_clean], steps[:num_blocks] + 1
        self.draft_length = mask_length or self.draft_length
        branch_lengths = branch_lengths.expand(len(positions), -1)
        self._forward(torch.zeros_like(positions), positions, branch_lengths, num_read=num_clean)
        if num_blocks > 1 or (num_blocks and self.draft_head is not None):
            first_mask = torch.zeros_like(positions[:, 0])
            draft_logits = self.draft_logits(first_mask)
            chain = self.draft_chain(first_mask, draft_logits)
            if chain is not None and chain.likeliest_behind(first_mask[:, None]) is None:
                for slot in range(draft_logits.shape[1]):
                    chain.logits_behind(slot, first_mask[:, None])
        self.draft_length, self.branch_lengths, self.mask_states, self.mask_logits = kept
        if positions.device.type != "cpu":
            torch.accelerator.synchronize(positions.device)

    @property
    def num_blocks(self) -> int:
        """M of the last forward."""
        return self.branch_lengths.shape[1]

    def drafts_behind(self, num_accepted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the masks stand that predict what follows so many accepted tokens [A] and the model's own next one.

        A block behind just as many has K - 1 of them. Where there is none, the block behind the most tokens below
        that is late by d = 1, 2, ...: its last K - 1 - d masks still stand at the right positions, though they were
        read before the last d tokens were decided.

        Returns:
            the first such mask [A], of all M * K of the row, and how many there are [A], 0 to K - 1.
        """
        if not self.num_blocks:
            return torch.zeros_like(num_accepted), torch.zeros_like(num_accepted)
        late = num_accepted[:, None].to(self.branch_lengths.device) - self.branch_lengths  # [A, M]
        late, block = late.masked_fill(late < 0, self.draft_length).min(dim=1)
        first = block * self.draft_length + 1 + late
        return first.to(num_accepted.device), (self.draft_length - 1 - late).clamp(min=0).to(num_accepted.device)

    def draft_logits(self, first_mask: torch.Tensor, has_draft: bool = True) -> torch.Tensor:
        """Logits of K - 1 masks of each row from `first_mask` [A] on; anything behind the end of its block. The first
        mask of a block is never read: the model's own next token takes its place.

        Returns:
            [A, K - 1, V]; [A, 0, V] unless `has_draft`.
        """
        device, num_slots = self.mask_states.device, self.draft_length - 1 if has_draft else 0
        if not (num_slots and self.num_blocks):
            return self.mask_states.new_zeros(len(first_mask), num_slots, self.vocab_size).to(first_mask.device)
        slots = first_mask.to(device)[:, None] + torch.arange(num_slots, device=device)
        rows = torch.arange(len(first_mask), device=device)[:, None]
        if self.mask_logits is not None:  # of masks 2..K of each block
            places = slots - slots // self.draft_length - 1
            return self.mask_logits[rows, places.clamp(max=self.mask_logits.shape[1] - 1)].to(first_mask.device)
        slots = slots.clamp(max=self.mask_states.shape[1] - 1)
        return lm_head_logits(self.model, self.mask_states[rows, slots]).to(first_mask.device)

    def draft_chain(self, first_mask: torch.Tensor, draft_logits: torch.Tensor) -> DraftChain | None:
        """The same masks as the draft head reads them, slot after slot; None without a head, or a draft."""
        num_slots = draft_logits.shape[1]
        if self.draft_head is None or not (num_slots and self.num_blocks):
            return None
        device = self.mask_states.device
        slots = first_mask.to(device)[:, None] + torch.arange(num_slots, device=device)
        rows = torch.arange(len(first_mask), device=device)[:, None]
        states = self.mask_states[rows, slots.clamp(max=self.mask_states.shape[1] - 1)]
        return DraftChain(self.model, self.draft_head, draft_logits, states)

    def accept(self, num_accepted: torch.Tensor, counts: list[int]) -> None:
        """Keeps the first `num_accepted` [A] of the draft just read (`counts`: the same, on the host)."""
        num_accepted = num_accepted.to(self.next_positions.device)
        self.next_positions = self.next_positions + num_accepted[:, None]
        self._advance(num_accepted, counts)

    def keep_rows(self, places: list[int]) -> None:
        """Takes every other row out of the forward."""
        self._set_aside(set(range(len(self.rows))) - set(places))
        self.rows = [self.rows[place] for place in places]
        self.next_positions = self.next_positions[places]
        self.mask_states = self.mask_states[places]
        self.mask_logits = None if self.mask_logits is None else self.mask_logits[places]
        self.row_lengths = [self.row_lengths[place] for place in places]
        if self.is_real_slot is not None and not self.is_static:
            self.is_real_slot = self.is_real_slot[places]
        self.cache.keep_rows(places, self.row_lengths)

    def final_cache(self, text_lengths: list[int], last_ids: list[int]) -> DynamicCache:
        """What is cached of texts of these lengths, each with its last token's id, as plain decoding leaves it: all but
        the longest text's last token, which nobody has read, and zeros behind shorter texts."""
        assert self.finished_rows is not None
        self._set_aside(range(len(self.rows)))
        longest = max(text_lengths)
        self._read_last([row for row, length in enumerate(text_lengths) if length < longest], text_lengths, last_ids)
        rows = [self.finished_rows[row].states for row in sorted(self.finished_rows)]
        return stack_rows(rows, [min(length, longest - 1) for length in text_lengths])

    def _read_last(self, rows: list[int], text_lengths: list[int], last_ids: list[int]) -> None:
        """Reads the last token of those of these finished rows whose keys and values lack it, in one forward."""
        rows = [row for row in rows if self.finished_rows[row].length < text_lengths[row]]
        if not rows:
            return
        finished, device = [self.finished_rows[row] for row in rows], self.cache.lengths.device
        lengths = [one.length for one in finished]
        cache = DraftCache(len(rows), len(self.cache.layers), device)
        cache.take_over(stack_rows([one.states for one in finished], lengths))
        cache.accept(torch.tensor(lengths, device=device) - cache.lengths, lengths)
        kept = self.cache, self.row_lengths, self.is_real_slot, self.is_static
        self.cache, self.row_lengths, self.is_static = cache, lengths, False
        self.is_real_slot = None if self.is_real_in_prompt is None else self.is_real_in_prompt[rows]
        ids = torch.tensor([[last_ids[row]] for row in rows], device=device)
        positions = torch.stack([one.next_position for one in finished])
        self._forward(ids, positions, ids[:, :0], num_read=1)
        self.num_prefill_forwards += 1
        for place, row in enumerate(rows):
            self.finished_rows[row] = FinishedRow(cache.row(place, lengths[place] + 1), positions[place] + 1)
        self.cache, self.row_lengths, self.is_real_slot, self.is_static = kept

    def num_with_position(self, num_drafted: torch.Tensor) -> torch.Tensor:
        """How many of the first `num_drafted` [A] tokens of a draft have a row in a learned position table."""
        if self.last_position is None:
            return num_drafted
        room = self.last_position + 1 - self.next_positions[:, 0]
        return torch.minimum(num_drafted, room.clamp(min=1).to(num_drafted.device))

    def check_positions(self, positions: torch.Tensor) -> None:
        """A token that is decided must have a row in a learned position table; what is drafted behind it need not."""
        if self.last_position is not None and positions.max() > self.last_position:
            raise ValueError(
                f"The text may have at most {self.last_position + 1} tokens, prompt included (`config."
                "max_position_embeddings`, the rows of this model's position table), and goes on. Shorten the prompt, "
                "or lower `max_new_tokens`."
            )

    def _set_aside(self, places: Iterable[int]) -> None:
        if self.finished_rows is not None:
            for place in places:
                states = self.cache.row(place, self.row_lengths[place])
                self.finished_rows[self.rows[place]] = FinishedRow(states, self.next_positions[place])

    def _advance(self, num_kept: torch.Tensor, counts: list[int]) -> None:
        self.row_lengths = [length + count for length, count in zip(self.row_lengths, counts, strict=True)]
        self.cache.accept(num_kept, self.row_lengths)

    def _forward(
        self,
        clean_ids: torch.Tensor,
        clean_positions: torch.Tensor,
        branch_lengths: torch.Tensor,
        num_read: int,
        alone: tuple[int, int] | None = None,
        is_prefill: bool = False,
    ) -> torch.Tensor:
        """Logits of the last `num_read` clean tokens, on the device the ids came from; the masks' states are kept.

        Args:
            alone: place and cached length of the one row that is read, at a length it had before; None reads all.
        """
        device_of_ids, clean_ids = clean_ids.device, clean_ids.to(self.cache.lengths.device)
        if not self.is_within_graph:
            self.note_call(clean_ids.shape[1] + branch_lengths.shape[1] * self.draft_length)
        if self.is_static and not is_prefill and not self.is_within_graph:

            def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
                ids, positions, lengths = given
                return self._network(ids, positions, lengths, num_read)

            given = clean_ids, clean_positions, branch_lengths
            if self.graphs is None:  # what was compiled for one layout in memory is given no other
                found = run(*(self.cache.spread(tensor).contiguous() for tensor in given))
                logits, states = map(self.cache.gather, found)
            else:
                logits, states = self.by_graph(run, given, num_read)
        else:
            logits, states = self._network(clean_ids, clean_positions, branch_lengths, num_read, alone, is_prefill)
        if alone is None:
            self.branch_lengths = branch_lengths
            self.mask_states = states
            self.mask_logits = logits[:, num_read:] if logits.shape[1] > num_read else None
        return logits[:, :num_read].to(device_of_ids)

    def note_call(self, num_queries: int) -> None:
        """Called before each call of the network that reads so many tokens of a row: whoever counts puts itself here,
        since a CUDA graph calls no hooks."""

    def by_graph(
        self, run: Callable[..., tuple[torch.Tensor, ...]], given: tuple[torch.Tensor, ...], about: Any
    ) -> tuple[torch.Tensor, ...]:
        """What `run` makes of tensors [A, ...] by one call of the network, where steps are recorded: by a CUDA graph.
        It leaves nothing in this object but what the network writes to the cache.

        Args:
            run: to tensors [A, ...]. It is called with all B rows, as a step of constant shape is, and seldom.
            about: what else it hangs on.
        """
        num_given = len(given)
        padding = () if self.is_real_slot is None else (self.is_real_slot,)
        inputs = *map(self.cache.spread, (*given, self.next_positions)), self.cache.lengths, *padding

        def step(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            kept, lengths = dict(self.__dict__), self.cache.lengths
            self.next_positions, self.cache.lengths, *padding = inputs[num_given:]
            self.is_real_slot = padding[0] if padding else None
            self.is_within_graph = True
            try:
                return run(*inputs[:num_given])
            finally:
                self.__dict__.update(kept)
                self.cache.lengths = lengths

        shape = *(tuple(tensor.shape) for tensor in inputs), self.draft_length, about
        held = self.gate.short_ways if self.gate else None
        return tuple(map(self.cache.gather, self.graphs.run(shape, step, inputs, held)))

    def _network(
        self,
        clean_ids: torch.Tensor,
        clean_positions: torch.Tensor,
        branch_lengths: torch.Tensor,
        num_read: int,
        alone: tuple[int, int] | None = None,
        is_prefill: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's one call.

        Returns:
            logits of the last `num_read` clean tokens and, where they come with the same pass of the lm_head, of each
            block's masks but its first, [A, num_read + M * (K - 1), V]; the masks' states, [A, M * K, D].
        """
        is_step = self.is_static and not is_prefill
        num_rows, num_clean = clean_ids.shape
        num_blocks = branch_lengths.shape[1]
        num_masks = num_blocks * self.draft_length
        input_ids, position_ids = clean_ids, clean_positions
        if num_masks:
            mask_ids = clean_ids.new_full((num_rows, num_masks), self.mask_embedding_id)
            input_ids = torch.cat([clean_ids, mask_ids], dim=1)
            after_first = draft_positions(num_clean, self.draft_length, branch_lengths)[:, num_clean:]
            position_ids = torch.cat([clean_positions, clean_positions[:, -1:] + 1 - num_clean + after_first], dim=1)
        if self.last_position is not None:
            position_ids = position_ids.clamp(max=self.last_position)
        cache, lengths, is_real_slot = self.cache, self.row_lengths, self.is_real_slot
        if alone is not None:
            (place, length), lengths = alone, [alone[1]]
            cache = self.cache.view_of_row(place, length)
            is_real_slot = None if is_real_slot is None else is_real_slot[place : place + 1]
        cache.begin_forward(num_clean + num_masks)
        if is_real_slot is not None:
            num_new = cache.num_slots - is_real_slot.shape[1]
            is_real_slot = nn.functional.pad(is_real_slot, (0, num_new), value=True)
        is_unmasked = is_prefill and is_real_slot is None and not any(lengths) and not self.has_window
        has_structured_mask = bool(num_masks or is_step or len(set(lengths)) > 1)
        if num_masks and is_unmasked and self.is_grouped and not is_recurrent_depth(self.model):
            attention_mask = mask_over_prompt(num_masks, num_clean + num_masks, clean_ids.device)
        elif has_structured_mask:
            attention_mask = self._structured_mask(cache, num_clean, branch_lengths, is_real_slot)
        else:  # what plain decoding hands to a model: 0 for padding
            attention_mask = None if is_real_slot is None else is_real_slot.long()
        is_token_by_token = self.is_token_by_token and not is_prefill
        spans = Spans(lengths, num_clean, is_real_slot, self.has_window)
        read_places: Any = num_read
        if num_masks:
            read_places = torch.arange(num_clean - num_read, num_clean, device=clean_ids.device)
        if self._reads_all_masks(num_rows, num_blocks):
            masks = torch.arange(num_masks, device=clean_ids.device).view(num_blocks, -1)[:, 1:]
            read_places = torch.cat([read_places, num_clean + masks.flatten()])
        shape = num_rows, num_clean, num_masks, cache.num_slots
        compiled = self.compiled_layers if is_step else None
        is_grouped = self.is_grouped and has_structured_mask
        states_kept: AbstractContextManager[list[torch.Tensor]]
        states_kept = self._keep_last_states() if num_masks else nullcontext([])
        with (
            self.gate.open(num_masks) if self.gate else nullcontext(),
            clean_tokens_alone(self.model, spans, self.rounding) if is_token_by_token else nullcontext(),
            grouped_attention(self.model, self._attend(cache)) if is_grouped else nullcontext(),
            compiled.running(cache, shape) if compiled else nullcontext(),
            states_kept as last_states,
        ):
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=True,
                logits_to_keep=read_places,
                return_dict=True,
                **{CACHE: cache},
                **({"num_masks": num_masks} if is_recurrent_depth(self.model) else {}),
            )
        return output.logits, last_states[0][:, num_clean:] if num_masks else output.logits[:, :0]

    def _reads_all_masks(self, num_rows: int, num_blocks: int) -> bool:
        """Whether the logits of every block's masks are read at once. Of one block they are. Of several one is needed,
        which only verification tells: on a CPU it is read then; an accelerator reads the lm_head's weights once for as
        many rows as it can take in meanwhile."""
        num_masks = num_rows * num_blocks * (self.draft_length - 1)
        return num_blocks == 1 or (self.cache.lengths.device.type != "cpu" and 0 < num_masks <= MOST_READ_AT_ONCE)

    def _has_masks_of_groups(self, cache: DraftCache) -> bool:
        """Whether a forward over this cache is a step that is recorded, whose masks are made for all layers at once."""
        return self.graphs is not None and self.is_grouped and isinstance(cache, StaticDraftCache) and cache.is_step

    def _attend(self, cache: DraftCache) -> Callable[..., Any]:
        """What attends in a forward over this cache whose queries and keys are grouped."""
        return attend_in_step if self._has_masks_of_groups(cache) else attend_grouped

    def _structured_mask(
        self, cache: DraftCache, num_clean: int, branch_lengths: torch.Tensor, is_real_slot: torch.Tensor | None
    ) -> Any:
        config, draft_length, num_slots = self.model.config, self.draft_length, cache.num_slots
        if self.compiled_layers and self.is_grouped and isinstance(cache, StaticDraftCache) and cache.is_step:
            about: tuple[Any, ...] = num_clean, draft_length, num_slots, tuple(self.windows.values())
            make_masks: Callable[..., Any] = masks_of_step
            if self._has_masks_of_groups(cache):
                text_config = config.get_text_config()
                num_heads = text_config.num_attention_heads
                num_groups = num_heads // (getattr(text_config, "num_key_value_heads", None) or num_heads)
                make_masks, about = masks_of_groups, (*about, num_groups, self.model.dtype)
            make = self.compiled_layers.compiled(make_masks, (*branch_lengths.shape, *about))
            masks = make(branch_lengths, cache.lengths, is_real_slot, *about)
            return dict(zip(self.windows, masks, strict=True)) if len(masks) > 1 else masks[0]
        conditions = [] if is_real_slot is None else [real_slot_function(is_real_slot, cache.lengths)]
        return structured_attention_mask(
            config,
            lambda window: draft_mask_function(
                num_clean, draft_length, branch_lengths, cache.lengths, sliding_window=window
            ),
            *conditions,
            batch_size=len(cache.lengths),
            query_length=num_clean + branch_lengths.shape[1] * draft_length,
            key_length=num_slots,
            dtype=self.model.dtype,
            device=cache.lengths.device,
        )

    @contextmanager
    def _keep_last_states(self) -> Iterator[list[torch.Tensor]]:
        """Catches what the decoder hands to the lm_head, so that the head is run on the rows that are read only."""
        caught: list[torch.Tensor] = []
        handle = last_module(self.model).register_forward_hook(
            lambda module, args, output: caught.append(output if isinstance(output, torch.Tensor) else output[0])
        )
        try:
            yield caught
        finally:
            handle.remove()
