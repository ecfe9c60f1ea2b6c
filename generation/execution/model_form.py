"""The form of a model during one decode: chosen and applied before the first forward, undone after the last.

Nothing here changes a token. Q queries, S slots.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig
from transformers.masking_utils import sdpa_mask

from ..kept_with_model import kept_with
from ..stock_model import attend_by, attention_of, decoder_of
from ..torch_internals import hooks_of
from .attention_forms import (
    Rounding,
    Spans,
    attend,
    attend_token_by_token,
    clean_tokens_alone,
    products_token_by_token,
    rounding_of,
)
from .compiled_layers import CompiledLayers, swapped
from .gated_linear import OF_ROWS, MaskGate, adapters_of, gated_linear, sole_adapter, told_by_row, with_base
from .packed_linear import check_packable, options_of_compiler, packable_linears, packed_copy
from .stateful_layers import Reading, reading_twice, stateful_layers

DRAFTING, TOKEN_BY_TOKEN = "wavedraft_drafting", "wavedraft_token_by_token"
CHECKPOINTING = "gradient_checkpointing"
MANY = 1 << 30  # more tokens than a forward has


class ModelForm:
    """The form in which a decode runs its model.

    Args:
        is_drafting: whether forwards contain masks; false for plain decoding.
        is_tie_safe: whether sdpa attention computes clean tokens as if they were alone.
        compile_config: how to compile the layers for each shape of step; None: not compiled.

    Attributes:
        gate: of gated adapters; None without such.
        implementation: of attention, which masks are made for.
        is_grouped: whether attention is `attend`, which takes short and grouped masks.
        rounding: of this model, with `is_tie_safe`, while the form is applied.
        reading: what the forward under way reads, for layers with states.
        last_states: [A, Q, D] input of the lm_head in the last forward.
    """

    def __init__(
        self,
        model: Any,
        *,
        is_drafting: bool = True,
        is_tie_safe: bool = False,
        is_packed: bool = False,
        compile_config: CompileConfig | None = None,
    ):
        self.model = model
        self.is_drafting, self.is_packed = is_drafting, is_packed
        self.implementation = attention_of(model.config)
        has_interface = self.implementation == "sdpa" and getattr(model, "_supports_attention_backend", False)
        self.is_token_by_token = has_interface and is_tie_safe and is_drafting
        self.is_grouped = has_interface and is_drafting and not is_tie_safe
        self.is_tie_safe = is_tie_safe
        self.rounding: Rounding | None = None
        self.gate: MaskGate | None = None
        self.rows: Sequence[int] | None = None
        self.num_masks_of_prompt: int | None = None
        self.compiled: CompiledLayers | None = None
        self.reading: Reading | None = None
        self.last_states: Tensor | None = None
        if is_packed:
            check_packable(model)
        if compile_config is not None:
            self.compiled = CompiledLayers(model, compile_config, options_of_compiler() if is_packed else None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the model in this form inside the context, and restores the model afterwards. In plain decoding an
        adapter acts on no token."""
        with ExitStack() as stack:
            adapters = adapters_of(self.model)
            told = told_by_row(self.model)
            for module in told if self.is_drafting else ():
                stack.callback(module.register_forward_pre_hook(self._of_rows, with_kwargs=True).remove)
            has_own = any("adapter_names" in names for names in told.values())  # PEFT's layers choose each row's
            sole = [one for one in adapters if not has_own and sole_adapter(one.layer) == one.name]
            if self.model.training:  # layers under gradient checkpointing take no cache
                parts = [vars(module) for module in self.model.modules()]
                checkpointed = [part for part in parts if part.get(CHECKPOINTING)]
                stack.enter_context(swapped([(part, CHECKPOINTING, False) for part in checkpointed]))
            self.gate = MaskGate() if adapters else None
            stack.enter_context(swapped([(one.variants, one.name, self.gate) for one in adapters]))
            copies = kept_with(self.model).copies
            acting = [one for one in sole if self.is_drafting or hooks_of(one.layer)]
            gated = {one.layer: gated_linear(one.layer, one.name, self.gate, copies) for one in acting}
            if self.is_packed:
                reducers = {layer.base_layer: stand_in.down for layer, stand_in in gated.items()}
                places = packable_linears(self.model)
                packed = [(parts, name, packed_copy(one, copies, reducers.get(one))) for parts, name, one in places]
                stack.enter_context(swapped(packed))
            stand_ins = [(parts, place, with_base(gated.get(one), one.base_layer)) for one, parts, place, *_ in sole]
            stack.enter_context(swapped(stand_ins))
            if self.is_tie_safe:
                self.rounding = rounding_of(self.model, self.is_packed)
            if self.is_token_by_token:
                stack.enter_context(products_token_by_token(self.model, self.rounding))
                stack.enter_context(self._attending_by(TOKEN_BY_TOKEN, attend_token_by_token))
            elif self.is_grouped:
                stack.enter_context(self._attending_by(DRAFTING, attend))
            if self.is_drafting:
                states = [(vars(layer), "forward", reading_twice(self, layer)) for layer in stateful_layers(self.model)]
                stack.enter_context(swapped(states))
            if self.compiled is not None:
                stack.enter_context(self.compiled.applied())
            if self.is_drafting:
                stack.enter_context(self._catching_last_states())
            yield

    @contextmanager
    def forward(
        self,
        num_masks: int,
        spans: Spans | None,
        step: tuple[Any, tuple[int, ...]] | None,
        rows: Sequence[int] | None = None,
        reading: Reading | None = None,
    ) -> Iterator[None]:
        """The context of one forward of this model.

        Args:
            spans: the slots that each clean token sees; None for the prompt.
            step: the cache and the shape of a compiled step.
            rows: the numbers in the batch of the rows that are read; None: all.
            reading: for layers with states.
        """
        self.reading = reading
        self.rows, self.num_masks_of_prompt = rows, None if spans else num_masks
        is_alone = self.is_token_by_token and spans is not None
        is_compiled = self.compiled is not None and step is not None
        with (
            self.gate.open(num_masks) if self.gate else nullcontext(),
            clean_tokens_alone(spans) if is_alone else nullcontext(),
            self.compiled.step(*step) if is_compiled else nullcontext(),
        ):
            yield

    def _of_rows(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """A hook after PEFT's: tells a layer only of the rows in this forward, since ended rows have left it. A user's
        own aLoRA acts on all tokens after its invocation, as in plain decoding."""
        told = {name: values for name in OF_ROWS if (values := kwargs.get(name))}
        for name, values in told.items():
            if self.rows is not None and self.num_masks_of_prompt is None:  # the prompt's forward has all rows
                told[name] = values = [values[row] for row in self.rows]
            if name == "alora_offsets":
                more = MANY if self.num_masks_of_prompt is None else self.num_masks_of_prompt
                told[name] = [offset and offset + more for offset in values]
        return args, kwargs | told

    @contextmanager
    def _attending_by(self, name: str, function: Any) -> Iterator[None]:
        """Makes the model use this attention function, inside the context."""
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)  # for forwards with transformers' masks
        config = self.model.config
        attend_by(config, name)
        try:
            yield
        finally:
            attend_by(config, self.implementation)

    @contextmanager
    def _catching_last_states(self) -> Iterator[None]:
        def catch(module: nn.Module, args: Any, output: Any) -> None:
            self.last_states = output if isinstance(output, Tensor) else output[0]

        handle = decoder_of(self.model).register_forward_hook(catch)
        try:
            yield
        finally:
            handle.remove()
            self.last_states = None


def in_plain_form(model: Any, is_packed: bool) -> AbstractContextManager[None]:
    """Makes the model decode plainly inside the context: a gated adapter acts on no token and costs no time."""
    return ModelForm(model, is_drafting=False, is_packed=is_packed).applied()
