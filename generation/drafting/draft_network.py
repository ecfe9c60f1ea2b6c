"""The one call of the network: it reads tokens and drafts what may follow each of them.

A unfinished rows, P prompt tokens, N clean tokens, M blocks of K masks, Q = N + M*K queries, D channels, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..execution.attention_forms import Spans, mask_over_prompt
from ..execution.model_form import ModelForm
from ..execution.stateful_layers import Reading
from ..stock_model import (
    CACHE,
    device_of,
    has_causal_blocks,
    has_states,
    is_composite,
    last_position_of,
    num_cache_layers,
    taught_of,
)
from .draft_cache import DraftCache, DraftRows, stack_rows
from .draft_head import DraftHead
from .draft_step import DraftInputs, Masks, StepState, with_masks
from .mask_predictions import MaskPredictions
from .structured_mask import (
    attention_windows,
    draft_mask_function,
    masks_of_step,
    real_slot_function,
    structured_attention_mask,
)

MOST_READ_AT_ONCE = 256


class DraftNetwork:
    """A model as decode steps call it.

    Args:
        masks: the row of the embedding table that they read, and whether each sees only those before it in its block.
        head: the draft head, if one is used.
        is_captured: whether steps become CUDA graphs, whose masks are made once for all layers.
        given: what the caller gave to a model of several parts besides text; None of a text model.
        chunk_size: how many tokens of a prompt are read at a time; None: all.

    Attributes:
        num_prefill_forwards, num_tie_forwards: calls of the network besides steps, which the decode counts.
    """

    def __init__(
        self,
        model: Any,
        rows: DraftRows,
        form: ModelForm,
        masks: tuple[int, bool],
        head: DraftHead | None = None,
        is_captured: bool = False,
        chunk_size: int | None = None,
    ):
        self.model = model
        self.rows = rows
        self.form = form
        self.head = head
        self.masks = Masks(*masks, last_position_of(model))
        self.has_grouped_masks = is_captured and form.is_grouped
        self.windows = attention_windows(model.config)
        self.num_prefill_forwards = self.num_tie_forwards = 0
        self.device_of_ids = rows.cache.device
        self.chunk_size = chunk_size
        self.given: dict[str, Any] | None = {} if is_composite(model.config) else None

    def prefill(
        self, prompt_ids: Tensor, position_ids: Tensor | None, draft_length: int, has_draft: bool = True
    ) -> tuple[Tensor, MaskPredictions, Tensor]:
        """Reads the uncached part of the prompts [A, P], and one block of masks after it where `has_draft`.

        Args:
            position_ids: [A or 1, the uncached part of P or more]; None counts the columns.

        Returns:
            logits of the last prompt token, [A, 1, V]; what the masks predict; the next token's position [A, 1].
        """
        self.device_of_ids = prompt_ids.device
        cache, num_rows = self.rows.cache, len(prompt_ids)
        unread_ids = prompt_ids[:, cache.max_length :]
        num_unread = unread_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(prompt_ids.shape[1], device=cache.device)[None]
        if self.given is not None:
            return self._read_as_given(prompt_ids, unread_ids, position_ids, draft_length)
        positions = position_ids[:, -num_unread:].to(cache.device).expand(num_rows, -1)
        self.check_positions(positions[:, -1:])
        for start in range(0, num_unread, size := self.chunk_size or num_unread):
            ids, places = (given[:, start : start + size] for given in (unread_ids, positions))
            has_masks = has_draft and start + size >= num_unread
            branch_lengths = torch.full((num_rows, int(has_masks)), ids.shape[1], device=cache.device)
            cached_lengths = torch.full((num_rows,), cache.max_length, device=cache.device)
            inputs = with_masks(ids, places, branch_lengths, cached_lengths, draft_length, 1, self.masks)
            found = self._read(inputs, self.rows, is_prefill=True)
            self.num_prefill_forwards += 1
            self.rows.advance([ids.shape[1]] * num_rows)
        logits, predictions = self.split(inputs, *found)
        # The token decided here is the first of a draft.
        predictions = replace(predictions, branch_lengths=torch.ones_like(branch_lengths))
        return logits, predictions, positions[:, -1:] + 1

    def _read_as_given(
        self, prompt_ids: Tensor, unread_ids: Tensor, position_ids: Tensor, draft_length: int
    ) -> tuple[Tensor, MaskPredictions, Tensor]:
        """`prefill` of a model of several parts, by the stock forward with all that the caller gave."""
        cache, num_rows = self.rows.cache, len(prompt_ids)
        nothing = torch.full((num_rows, 0), 0, device=cache.device)
        lengths = torch.full((num_rows,), cache.max_length, device=cache.device)
        inputs = with_masks(unread_ids, unread_ids, nothing, lengths, draft_length, 1, self.masks)
        cache.begin_forward(lengths, unread_ids.shape[1])
        padding = self.rows.padding()
        given = self.model.prepare_inputs_for_generation(
            prompt_ids,
            next_sequence_length=unread_ids.shape[1],
            is_first_iteration=True,
            attention_mask=None if padding is None else padding.long(),
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache},
            **self.given,
        )
        reading = self._reading(inputs, self.rows, True) if has_states(self.model.config) else None
        with self.form.forward(0, None, None, None, reading):
            logits = self.model(**given, return_dict=True).logits
        self.num_prefill_forwards += 1
        self.rows.advance([unread_ids.shape[1]] * num_rows)
        next_positions = position_ids.reshape(-1, *position_ids.shape[-2:])[-1][:, -1:].expand(num_rows, -1) + 1
        return *self.split(inputs, logits, logits[:, :0]), next_positions.to(cache.device)

    def __call__(self, inputs: DraftInputs) -> tuple[Tensor, MaskPredictions]:
        """A decode step's forward: logits of each clean token [A, N, V], and what the masks predict."""
        return self.split(inputs, *self.read(inputs))

    def read(self, inputs: DraftInputs) -> tuple[Tensor, ...]:
        """Logits and the masks' states of a step. Over a static cache all B rows are read, in tensors of one layout."""
        cache = self.rows.cache
        if not cache.is_step:
            return self._read(inputs, self.rows)
        is_part = len(inputs.input_ids) != self.rows.batch_size
        of_all = inputs.mapped(lambda given: (cache.spread(given) if is_part else given).contiguous())
        found = self._read(of_all, self.rows)
        return tuple(cache.gather(tensor) for tensor in found) if is_part else found

    def read_alone(self, state: StepState, place: int, num_before: int) -> Tensor:
        """Logits [1, 1, V] of the token after `num_before` of one row's draft, read again as plain decoding reads it.
        Its keys and values replace what the draft left in the cache."""
        rows = self.rows.alone(place, self.rows.lengths[place] + num_before)
        token_id = state.draft_ids[place, num_before].view(1, 1)
        position = state.next_positions[place : place + 1] + num_before
        cached_lengths = state.cached_lengths[place : place + 1] + num_before
        inputs = with_masks(token_id, position, position.new_empty(1, 0), cached_lengths, 0, 1, self.masks)
        logits, _ = self._read(inputs, rows)
        self.num_tie_forwards += 1
        return logits.to(self.device_of_ids)

    def final_cache(self, state: StepState, text_lengths: list[int], last_ids: list[int]) -> DynamicCache:
        """What plain decoding caches of texts of these lengths and last tokens: all but the longest text's last token,
        and zeros after shorter texts."""
        self.rows.set_aside(state, range(len(self.rows.rows)))
        ended = self.rows.ended
        assert ended is not None
        if lacking := self.rows.lacking_last(text_lengths):
            rows, positions = self.rows.of_ended(lacking)
            ids = torch.tensor([[last_ids[row]] for row in lacking], device=rows.cache.device)
            lengths = torch.tensor(rows.lengths, device=ids.device)
            self._read(with_masks(ids, positions, ids[:, :0], lengths, 0, 1, self.masks), rows)
            self.num_prefill_forwards += 1
            for place, row in enumerate(lacking):
                length = rows.lengths[place] + 1
                ended[row] = ended[row]._replace(states=rows.cache.row(place, length), length=length)
        states = [ended[row].states for row in sorted(ended)]
        return stack_rows(states, [min(length, max(text_lengths) - 1) for length in text_lengths])

    def check_positions(self, next_positions: Tensor) -> None:
        """Refuses decided tokens after the end of a learned position table."""
        last_position = self.masks.last_position
        if last_position is not None and next_positions.max() > last_position:
            raise ValueError(
                f"The text may have at most {last_position + 1} tokens, prompt included (`config."
                "max_position_embeddings`, the rows of this model's position table), and goes on. Shorten the prompt, "
                "or lower `max_new_tokens`."
            )

    def _read(self, inputs: DraftInputs, rows: DraftRows, is_prefill: bool = False) -> tuple[Tensor, ...]:
        """The network's one call.

        Returns:
            logits [A, num_read, V] or, with each block's masks but its first, [A, num_read + M * (K - 1), V]; the
            masks' states, [A, M * K, D].
        """
        cache = rows.cache
        cache.begin_forward(inputs.cached_lengths, inputs.input_ids.shape[1])
        has_window = any(self.windows.values())
        spans = None if is_prefill else Spans(rows.lengths, inputs.num_clean, rows.padding(), has_window)
        shape = len(inputs.input_ids), inputs.num_clean, inputs.num_masks, cache.num_slots
        reading = self._reading(inputs, rows, is_prefill) if has_states(self.model.config) else None
        numbers = rows.rows if shape[0] == len(rows.rows) else range(rows.batch_size)
        with self.form.forward(inputs.num_masks, spans, (cache, shape) if cache.is_step else None, numbers, reading):
            output = self.model(
                input_ids=inputs.input_ids,
                attention_mask=self._attention_mask(inputs, rows, is_prefill),
                position_ids=inputs.position_ids,
                use_cache=True,
                logits_to_keep=self._places_read(inputs),
                return_dict=True,
                **{CACHE: cache},
            )
        states = output.logits[:, :0] if not inputs.num_masks else self.form.last_states[:, inputs.num_clean :]
        return output.logits, states

    def _reading(self, inputs: DraftInputs, rows: DraftRows, is_prefill: bool) -> Reading:
        """What layers with states must know. On a GPU one more host sync."""
        is_real, first = rows.padding(), rows.lengths[0]
        is_real = is_real[:, first : first + inputs.num_clean] if is_real is not None and is_prefill else None
        branches = inputs.branch_lengths.tolist()
        return Reading(rows.lengths, inputs.num_clean, is_prefill, inputs.draft_length, branches, is_real)

    def split(self, inputs: DraftInputs, logits: Tensor, states: Tensor) -> tuple[Tensor, MaskPredictions]:
        """The clean tokens' logits, where the ids came from, and what the masks predict."""
        of_masks = logits[:, inputs.num_read :] if logits.shape[1] > inputs.num_read else None
        predictions = MaskPredictions(
            self.model, self.head, inputs.draft_length, inputs.branch_lengths, states, of_masks, self.device_of_ids
        )
        return logits[:, : inputs.num_read].to(self.device_of_ids), predictions

    def _places_read(self, inputs: DraftInputs) -> Any:
        """The queries whose logits are read: how many of the last, or which."""
        if not inputs.num_masks:
            return inputs.num_read
        device = inputs.input_ids.device
        places = torch.arange(inputs.num_clean - inputs.num_read, inputs.num_clean, device=device)
        if not self.reads_all_masks(len(inputs.input_ids), inputs):
            return places
        masks = torch.arange(inputs.num_masks, device=device).view(inputs.num_blocks, -1)[:, 1:]
        return torch.cat([places, inputs.num_clean + masks.flatten()])

    def reads_all_masks(self, num_rows: int, inputs: DraftInputs) -> bool:
        """Whether every block's logits are read with the clean tokens'. A second pass of the lm_head reads all of its
        weights again. Where rows are dear, on a CPU, a few rows more cost less than that, up to
        `MOST_READ_AT_ONCE` masks."""
        num_masks = num_rows * inputs.num_blocks * (inputs.draft_length - 1)
        is_cpu = self.rows.cache.device.type == "cpu"
        return 0 < num_masks <= MOST_READ_AT_ONCE and (inputs.num_blocks <= 2 or not is_cpu)

    def _attention_mask(self, inputs: DraftInputs, rows: DraftRows, is_prefill: bool) -> Any:
        """None or a row of padding, as in plain decoding, or the structured mask."""
        padding, num_masks = rows.padding(), inputs.num_masks
        is_in_order = is_prefill or (inputs.num_clean == inputs.num_blocks == 1 and not self.form.is_token_by_token)
        is_plain = not num_masks or (self.masks.is_causal and is_in_order)
        if is_plain and not rows.cache.is_step and len(set(rows.lengths)) == 1:
            return None if padding is None else padding.long()
        is_bare = padding is None and not any(rows.lengths) and not any(self.windows.values())
        if is_prefill and is_bare and num_masks and self.form.is_grouped:
            return mask_over_prompt(num_masks, inputs.input_ids.shape[1], inputs.input_ids.device)
        is_compiled = self.form.compiled is not None and self.form.is_grouped and rows.cache.is_step
        make = self._compiled_mask if is_compiled else self._structured_mask
        return make(inputs, rows, padding)

    def _structured_mask(self, inputs: DraftInputs, rows: DraftRows, padding: Tensor | None) -> Any:
        lengths, of_blocks = inputs.cached_lengths, (inputs.num_clean, inputs.draft_length, inputs.branch_lengths)
        conditions = [] if padding is None else [real_slot_function(padding, lengths)]
        return structured_attention_mask(
            self.model.config,
            lambda window: draft_mask_function(*of_blocks, lengths, window, self.masks.is_causal),
            *conditions,
            batch_size=len(lengths),
            query_length=inputs.input_ids.shape[1],
            key_length=rows.cache.num_slots,
            dtype=self.model.dtype,
            device=lengths.device,
            implementation=self.form.implementation,
        )

    def _compiled_mask(self, inputs: DraftInputs, rows: DraftRows, padding: Tensor | None) -> Any:
        """The same for a step of one shape, compiled."""
        num_groups = None
        if self.has_grouped_masks:
            config = self.model.config.get_text_config()
            num_heads = config.num_attention_heads
            num_groups = num_heads // (getattr(config, "num_key_value_heads", None) or num_heads)
        windows = tuple(self.windows.values())
        slots, is_causal = rows.cache.num_slots, self.masks.is_causal
        about = inputs.num_clean, inputs.draft_length, slots, windows, is_causal, num_groups, self.model.dtype
        make = self.form.compiled.compiled(masks_of_step, (*inputs.branch_lengths.shape, *about))
        masks = make(inputs.branch_lengths, inputs.cached_lengths, padding, *about)
        return dict(zip(self.windows, masks, strict=True)) if len(masks) > 1 else masks[0]


def new_network(model: Any, num_rows: int, mask_embedding_id: int, **form: Any) -> DraftNetwork:
    """A model that begins with nothing cached.

    Args:
        form: of `ModelForm`, whose `applied` must be open during calls.
    """
    cache = DraftCache(num_rows, num_cache_layers(model), device_of(model))
    masks = mask_embedding_id, has_causal_blocks(taught_of(model))
    return DraftNetwork(model, DraftRows(cache, num_rows, None), ModelForm(model, **form), masks)
