"""Decoding in constant shapes: a cache that keeps its size, and the model's parts on windows of few widths, compiled.

A rows, R rows computed (A and, where they were more, filling), T tokens, S columns of the cache, E channels.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..generation.kept_with_model import compiled_for
from ..generation.recurrent.wavefront import wavefront_step
from ..generation.step_graph import StepGraphs
from ..generation.stock_model import attention_of, device_of
from .cache_recurrent import RecurrentCache, Window

COLUMNS = 128  # a cache has a multiple of them, so that texts of most lengths share their shapes
NARROWEST = 8  # tokens of a wavefront: as many cost hardly more than one
STEPS_A_CALL = 8  # core steps; a call costs a small model a tenth of a step, each further step seconds of compiling


class StaticRecurrentCache(RecurrentCache):
    """A cache whose capacity is a multiple of `COLUMNS` and whose rows stay where they are when others leave.

    The last column is nobody's: what a filled-up call computes in vain is written there.

    Attributes:
        compiled: the compiled parts of the model whose forwards continue it; None where they are not compiled.
    """

    def __init__(
        self,
        config: Any,
        batch_size: int,
        max_length: int,
        stored_recurrences: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        super().__init__(config, batch_size, rounded(max_length), stored_recurrences, dtype, device)
        self._views: dict[tuple[int, int], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._views_of = self.keys[0]
        self.compiled: CompiledParts | None = None

    def views(self, recurrence: int, num_rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values of every layer at a recurrence, each [num_rows, H, S, D], the same objects at every call."""
        if self._views_of is not self.keys[0]:
            self._views, self._views_of = {}, self.keys[0]
        place = (recurrence - 1) % self.stored_recurrences, num_rows
        if place not in self._views:
            self._views[place] = tuple(  # type: ignore[assignment]
                [tensor[min(place[0], len(tensor) - 1), :num_rows] for tensor in tensors]
                for tensors in (self.keys, self.values)
            )
        return self._views[place]

    def reserve(self, length: int) -> None:
        """Make room for `length` columns a row and nobody's, in multiples."""
        if length >= self.capacity:
            super().reserve(rounded(max(length, 2 * self.capacity)))

    def keep_rows(self, rows: Any) -> None:
        """Keep the given rows, in the given order, and the room of the others."""
        everything = self.keys, self.values
        super().keep_rows(rows)
        self.keys, self.values = everything


def rounded(length: int) -> int:
    """Columns for `length` tokens."""
    return -(-(length + 1) // COLUMNS) * COLUMNS


class Planes:
    """What layers write to and read from in one call: keys and values of every layer at one recurrence."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor]):
        self.keys = keys
        self.values = values

    def write_and_read(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, recurrence: int, window: Window
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [R, H, T, D] keys and values, and return all there are, [R, H, S, D]."""
        assert isinstance(window.columns, tuple)
        rows, columns = window.columns
        self.keys[layer][rows, :, columns] = keys.transpose(1, 2)
        self.values[layer][rows, :, columns] = values.transpose(1, 2)
        return self.keys[layer], self.values[layer]


class StaticWindow:
    """The tokens a call works on, for `StaticParts`: all tensors, of few shapes.

    Attributes:
        rows, columns: [R, 1] and [R, T], where their keys and values are kept.
        position_ids: [R, T], which differ from the columns where prompts are padded.
        is_padding: [R, S] columns nobody sees, where there are such.
        num_rows: A, how many of the R rows are wanted.
        seen: the mask and the rotation of its tokens, once their prelude has been run.
    """

    def __init__(
        self,
        cache: StaticRecurrentCache,
        columns: torch.Tensor,
        position_ids: torch.Tensor,
        is_padding: torch.Tensor | None,
        num_rows: int,
    ):
        self.cache = cache
        self.rows = torch.arange(len(columns), device=columns.device)[:, None]
        self.columns = columns
        self.position_ids = position_ids
        self.is_padding = is_padding
        self.num_rows = num_rows
        self.seen: tuple[torch.Tensor, ...] = ()

    @property
    def kv_length(self) -> int:
        """The cache's length with these tokens, where all rows go on from one column."""
        return self.cache.get_seq_length() + self.columns.shape[1]

    def shape(self) -> tuple[int, ...]:
        """R, T and S."""
        return (*self.columns.shape, self.cache.capacity)

    def without(self, is_settled: torch.Tensor) -> "StaticWindow":
        """The same, but the rows at which `is_settled` [A] write to nobody's column."""
        settled = nn.functional.pad(is_settled, (0, len(self.columns) - len(is_settled)))[:, None]
        window = copy.copy(self)
        window.columns = torch.where(settled, self.cache.capacity - 1, self.columns)
        return window


class CompiledParts:
    """The compiled functions of one model, as one decode calls them.

    At each call torch checks that the model is as it was compiled, which takes a tenth of the time of a small model's
    parts of one token. A decode does not change its model: their first calls are checked, and later calls are not.

    Args:
        options: keywords of `torch.compile`.
        of_single: inductor options of parts of one token, in addition to those.
        graphs: records each call as a CUDA graph, which later calls replay; None: nothing is recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        options: dict[str, Any],
        of_single: dict[str, Any] | None = None,
        graphs: StepGraphs | None = None,
    ):
        self.model = model
        self.graphs = graphs
        self.options = options | ({"options": options["options"] | of_single} if of_single else {})
        self.options_of_any_width = options | {"dynamic": None}
        self.checked: dict[Any, Callable[..., Any]] = {}
        self.without_checks = torch.compiler.set_stance(skip_guard_eval_unsafe=True)
        with self.without_checks:  # torch takes a new stance when it is made: leaving it restores the one before
            pass

    def run(
        self, function: Callable[..., Any], shape: tuple[int, ...], kind: tuple, about: tuple, tensors: tuple
    ) -> Any:
        """Calls the function as it is compiled for this shape, (R, T, S), and kind of arguments.

        Args:
            about: the arguments that stay in the next calls: model, attention function, keys and values.
            tensors: those that change, or None.
        """
        if self.graphs is None:
            return self._call(function, shape, kind, *about, *tensors)
        given, is_given = tuple(t for t in tensors if t is not None), [t is not None for t in tensors]

        def step(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            rest = iter(inputs)
            found = self._call(function, shape, kind, *about, *(next(rest) if is_one else None for is_one in is_given))
            return found if isinstance(found, tuple) else (found,)

        outputs = self.graphs.run((function, shape, kind, *map(id, about[-1])), step, given, about)
        return outputs if len(outputs) > 1 else outputs[0]

    def _call(self, function: Callable[..., Any], shape: tuple[int, ...], kind: tuple, *arguments: Any) -> Any:
        """Widths T above 1 share a function: torch compiles it for the first, and at the second for any. It takes much
        longer than its checks, so it is always checked."""
        if shape[1] > 1:
            shape_but_width = shape[0], "any", shape[2], *kind
            return compiled_for(self.model, function, shape_but_width, self.options_of_any_width)(*arguments)
        if (checked := self.checked.get((function, shape, kind))) is not None:
            with self.without_checks:
                return checked(*arguments)
        compiled = compiled_for(self.model, function, (*shape, *kind), self.options)
        result = compiled(*arguments)
        self.checked[function, shape, kind] = compiled
        return result


class StaticParts:
    """A model's prelude, core step and coda on a static cache: the model's own, in few shapes, compiled where asked."""

    def __init__(self, model: Any, compiled: CompiledParts | None):
        implementation = attention_of(model.config)
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"`attn_implementation` must be 'sdpa' or 'eager' with `cache_implementation='static'`, whose unused "
                f"columns only they hide, but is {implementation!r}. Call `model.set_attn_implementation('sdpa')`."
            )
        self.model = model
        self.compiled = compiled
        self.attention_function = model._attention_function()
        self.sums_up = compiled is not None and device_of(model).type == "cpu"

    def padded_width(self, width: int, device: torch.device) -> int:
        """The width a wavefront is computed at: from `NARROWEST` up, the next power of two or three quarters of it."""
        whole = max(NARROWEST, 1 << (width - 1).bit_length())
        return 3 * whole // 4 if NARROWEST < width <= 3 * whole // 4 else whole

    def window_at(self, starts: list[int], length: int, cache: StaticRecurrentCache) -> StaticWindow:
        """`length` tokens of each cache row from position starts[row] on; rows are unpadded.

        Tokens beyond the cache's last column are nobody's: a wavefront is filled up with them.
        """
        num_rows = len(starts)
        cache.reserve(max(starts) + 1)
        num_computed = min(1 << (num_rows - 1).bit_length(), cache.keys[0].shape[1])
        filled = torch.tensor(starts + [0] * (num_computed - num_rows), device=cache.device)[:, None]
        columns = (filled + torch.arange(length, device=cache.device)).clamp_(max=cache.capacity - 1)
        return StaticWindow(cache, columns, columns, None, num_rows)

    filled_window = window_at  # it reads all columns there are

    def window_behind(
        self, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: StaticRecurrentCache
    ) -> StaticWindow:
        """The next token of every row, all in one column; padding is told by a [B, columns] mask."""
        num_rows, column = cache.batch_size, cache.get_seq_length()
        cache.reserve(column + 1)
        columns = torch.full((num_rows, 1), column, device=cache.device)
        is_padding = None
        if attention_mask is not None:
            is_padding = nn.functional.pad(attention_mask == 0, (0, cache.capacity - attention_mask.shape[1]))
        return StaticWindow(cache, columns, position_ids.expand(num_rows, 1), is_padding, num_rows)

    def prelude(
        self, input_ids: torch.Tensor | None, window: StaticWindow, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """e: [A, T] ids (or their [A, T, E] embeddings) to [A, T, E]."""
        embeds = self.model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        place = window.position_ids, window.is_padding
        result, *window.seen = self._run(run_prelude, [1], window, place, embeds)  # type: ignore[misc]
        return wanted(result, window)

    def core_step(
        self, latent_states: torch.Tensor, input_embeds: torch.Tensor, window: StaticWindow, recurrence: int = 1
    ) -> torch.Tensor:
        """s_i of s_{i-1} and e, both [A, T, E]."""
        return wanted(self._run(run_core_steps, [recurrence], window, window.seen, latent_states, input_embeds), window)

    def core_steps(
        self, latent_states: torch.Tensor, input_embeds: torch.Tensor, window: StaticWindow, num_steps: int
    ) -> torch.Tensor:
        """s_n of s_0 and e, both [A, T, E], n being `num_steps`: `STEPS_A_CALL` at a call."""
        for first in range(1, num_steps + 1, STEPS_A_CALL):
            of_call = range(first, min(first + STEPS_A_CALL, num_steps + 1))
            states = self._run(run_core_steps, of_call, window, window.seen, latent_states, input_embeds)
            latent_states = wanted(states, window)
        return latent_states

    def coda(self, latent_states: torch.Tensor, window: StaticWindow, logits_to_keep: int = 0) -> torch.Tensor:
        """fp32 logits [A, T, V], of all tokens."""
        return wanted(self._run(run_coda, [1], window, window.seen, latent_states), window)

    def wavefront_step(
        self,
        input_ids: torch.Tensor,
        latent_states: torch.Tensor,
        window: StaticWindow,
        earlier: tuple[torch.Tensor, torch.Tensor],
        num_steps: int,
    ) -> tuple[torch.Tensor, ...]:
        """`generation.recurrent.wavefront.wavefront_step`; of up to `STEPS_A_CALL` core steps, one compiled call."""
        if self.compiled is None or num_steps > STEPS_A_CALL:
            return wavefront_step(self, input_ids, latent_states, window, earlier, num_steps)
        place = window.position_ids, window.is_padding
        tensors = self.model.get_input_embeddings()(input_ids), latent_states, *earlier
        found = self._run(run_wavefront_step, range(1, num_steps + 1), window, place, *tensors)
        return tuple(wanted(one, window) for one in found)

    def _run(
        self, part: Callable, recurrences: Sequence[int], window: StaticWindow, seen: tuple, *tensors: torch.Tensor
    ) -> Any:
        num_computed = len(window.columns)
        planes = [window.cache.views(recurrence, num_computed) for recurrence in recurrences]
        missing = num_computed - window.num_rows
        if missing:
            tensors = tuple(torch.cat([t, t.new_zeros(missing, *t.shape[1:])]) for t in tensors)
        attention = self._attention_of(window.columns.shape[1], window.cache.dtype)
        about, tensors = (self.model, attention, planes), (window.rows, window.columns, *seen, *tensors)
        if self.compiled is None:
            return part(*about, *tensors)
        # A part compiled without padding would not look for it.
        kind = len(planes), window.cache.stored_recurrences, *(tensor is None for tensor in seen)
        return self.compiled.run(part, window.shape(), kind, about, tensors)

    def _attention_of(self, num_tokens: int, dtype: torch.dtype) -> Callable:
        """What is quickest for windows of so many tokens."""
        if self.sums_up and num_tokens == 1:
            return attend_by_sums
        if self.sums_up and dtype == torch.float32:
            return attend_by_products
        return self.attention_function


def wanted(tensor: torch.Tensor, window: StaticWindow) -> torch.Tensor:
    """The [A, ...] rows of [R, ...] that a window is for. (Compiled code tells views from other tensors.)"""
    return tensor if len(tensor) == window.num_rows else tensor[: window.num_rows]


def run_prelude(model, attention, planes, rows, columns, position_ids, is_padding, embeds):
    """The prelude of [R, T, E] token embeddings, and what all parts take of their places: a mask and a rotation."""
    ((keys, values),) = planes
    num_columns = keys[0].shape[2]
    is_hidden = torch.arange(num_columns, device=columns.device) > columns[:, None, :, None]
    if is_padding is not None:
        is_hidden = is_hidden | is_padding[:, None, None]
    mask = torch.zeros(is_hidden.shape, dtype=keys[0].dtype, device=columns.device)
    mask = mask.masked_fill(is_hidden, -torch.inf)  # [R, 1, T, S]
    rotary = model.rotary_at(position_ids, keys[0].dtype)
    window = window_of(attention, keys, values, rows, columns, mask, rotary)
    return model.prelude(None, window, inputs_embeds=embeds), mask, rotary


def run_core_steps(model, attention, planes, rows, columns, mask, rotary, states, embeds):
    """Core steps of [R, T, E] states, one for each of `planes`."""
    for keys, values in planes:
        states = model.core_step(states, embeds, window_of(attention, keys, values, rows, columns, mask, rotary))
    return states


def run_wavefront_step(model, attention, planes, rows, columns, position_ids, is_padding, embeds, states, *earlier):
    """A step of [R, T, E] states: `wavefront_step`, from token embeddings on."""
    places = planes[:1], rows, columns
    embeds, mask, rotary = run_prelude(model, attention, *places, position_ids, is_padding, embeds)
    embeds = torch.lerp(embeds, *earlier)
    states = run_core_steps(model, attention, planes, rows, columns, mask, rotary, states, embeds)
    return embeds, states, run_coda(model, attention, *places, mask, rotary, states)


def run_coda(model, attention, planes, rows, columns, mask, rotary, states):
    """The coda of [R, T, E] states."""
    return model.coda(states, window_of(attention, *planes[0], rows, columns, mask, rotary))


def window_of(attention, keys, values, rows, columns, mask, rotary) -> Window:
    """The window as layers know it."""
    return Window(rotary, mask, attention, Planes(keys, values), (rows, columns), keys[0].shape[2])  # type: ignore[arg-type]


def attend_by_sums(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """Attention of single queries, [R, H, 1, D], without matrix products: loops that a compiler fuses with the layer's
    own, where a call of a kernel costs more than the arithmetic."""
    query = query.unflatten(1, (key.shape[1], -1)).float()  # [R, key heads, group, 1, D]
    key, value = key[:, :, None], value[:, :, None]
    scores = (query * key).sum(dim=-1) * scaling + mask  # [R, key heads, group, S]
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    mixed = (weights[..., None] * value).sum(dim=-2) / weights.sum(dim=-1, keepdim=True)
    return mixed.to(value.dtype).flatten(1, 2)[:, None], None  # [R, 1, H, D]


def attend_by_products(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """Attention of a few queries, [R, H, T, D], as two matrix products and what a compiler fuses between them, without
    the blocks that a kernel for long queries goes by."""
    num_tokens = query.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1)) * scaling  # [R, key heads, group, T, D]
    scores = torch.matmul(grouped.flatten(2, 3), key.transpose(2, 3)).unflatten(2, (-1, num_tokens)) + mask[:, None]
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    mixed = torch.matmul(weights.flatten(2, 3), value).unflatten(2, (-1, num_tokens))
    mixed = mixed / weights.sum(dim=-1, keepdim=True)
    return mixed.flatten(1, 2).transpose(1, 2), None  # [R, T, H, D]
