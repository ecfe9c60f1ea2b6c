"""Connects `generate` to TiDAR decoding: a mixin for our own classes, a function for unmodified stock models."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)
from transformers.utils import logging

from ..generation.drafting.decode_tidar import decode_tidar
from ..generation.drafting.draft_head import chosen_head
from ..generation.drafting.draftable import refuse_undraftable
from ..generation.drafting.options_tidar import (
    TiDAROptions,
    given_beside,
    reason_for_plain_decoding,
    refuse_seed,
    refuse_trust,
    say_what_is_idle,
)
from ..generation.execution.model_form import in_plain_form
from ..generation.execution.packed_linear import check_packable
from ..generation.kept_with_model import one_thread_at_a_time
from ..generation.stock_model import CACHE

if TYPE_CHECKING:

    class Stock(PreTrainedModel): ...
else:
    Stock = object

logger = logging.get_logger(__name__)
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_drafting_views: dict[tuple, type[PreTrainedModel]] = {}


class TiDARGenerationMixin(Stock):
    """A `generate` that drafts, and takes the keywords of `TiDAROptions`.

    Attributes:
        taught: the `tidar_config` of an adapter, for a model whose own config has none.
    """

    taught: dict[str, int] | None = None

    def options_of_adapters(self) -> dict[str, Any]:
        """Options that came with active adapters."""
        return {}

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any) -> Any:
        """Takes our keywords out of `generate`'s, and checks them first."""
        if of_training := [name for name in ("objective", "document_ids") if kwargs.get(name) is not None]:
            raise ValueError(
                f"`{of_training[0]}` must be left out of `generate`: it is of a training step's `forward`."
            )
        given = {name: kwargs.pop(name) for name in TiDAROptions.KEYWORDS if name in kwargs}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, value in given.items():
            setattr(generation_config, name, value)
        for name, value in self.options_of_adapters().items():
            setattr(generation_config, name, value)
        options = TiDAROptions.of(generation_config, self.config, self.taught)
        if options.packed_weights:
            check_packable(self)
        chosen_head(self, options.draft_head)
        say_what_is_idle(given, options, generation_config.do_sample)
        if options.is_untaught and getattr(self, "peft_config", None):
            options = replace(options, draft_acceptance=None)  # the adapter may have been taught
        if options.is_untaught:
            logger.warning_once(
                "Decoding without drafts: this checkpoint was never taught to draft. Teach it: `wavedraft train`. Or "
                "pass `num_branches=1` to draft all the same."
            )
        generation_config.tidar_options = options
        return generation_config, model_kwargs

    @one_thread_at_a_time
    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """`generate`'s loop of greedy search and sampling: drafts."""
        options = generation_config.tidar_options
        about = self, generation_config, synced_gpus, model_kwargs, input_ids, logits_processor
        reason = reason_for_plain_decoding(*about) if options.draft_length else ""
        if options.draft_length and not reason:
            return decode_tidar(
                self,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                options=options,
                streamer=streamer,
                attention_mask=model_kwargs.get("attention_mask"),
                position_ids=model_kwargs.get("position_ids"),
                past_key_values=model_kwargs.get(CACHE),
                given=given_beside(model_kwargs),
            )
        call = input_ids, logits_processor, stopping_criteria, generation_config
        return self._plainly(super()._sample, reason, *call, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)

    @one_thread_at_a_time
    def _beam_search(self, *call: Any, **kwargs: Any) -> Any:
        return self._plainly(super()._beam_search, "beams continue several texts", *call, **kwargs)

    @one_thread_at_a_time
    def _assisted_decoding(self, *call: Any, inputs_tensor: Tensor | None = None, **kwargs: Any) -> Any:
        kwargs["inputs_tensor"] = inputs_tensor  # given to those that name it
        return self._plainly(super()._assisted_decoding, "transformers drafts in another way", *call, **kwargs)

    def init_continuous_batching(self, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        trust = getattr(generation_config or self.generation_config, "trust", None)
        refuse_trust(trust, "continuous batching has a loop of its own")
        logger.warning_once("Decoding without drafts: continuous batching has a loop of its own. The text is the same.")
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def _plainly(
        self,
        loop: Any,
        reason: str | None,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        """A loop of transformers, which never writes the mask token. Says why drafts are not."""
        options = generation_config.tidar_options
        refuse_trust(options.trust, str(reason))
        if generation_config.do_sample:
            refuse_seed(options, reason or "`draft_length` is 0")
        if options.draft_length:
            kept = "probabilities are" if generation_config.do_sample else "text is"
            logger.warning_once(f"Decoding without drafts: {reason}. The {kept} the same.")
        if options.excluded_id is not None:
            suppress = SuppressTokensLogitsProcessor([options.excluded_id], device=str(input_ids.device))
            logits_processor = LogitsProcessorList([suppress, *logits_processor])
        with in_plain_form(self, bool(options.packed_weights)):
            return loop(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)


def generate(*args: Any, model: PreTrainedModel, taught: dict[str, int] | None = None, **kwargs: Any) -> Any:
    """`model.generate` with drafts, for a stock model too: `custom_generate="path-or-repo"` runs it.

    If a repository has this file, transformers also replaces its models' `generate` with it.

    Args:
        kwargs: of `generate`; those that only located this file on the Hub are dropped.
        taught: the `tidar_config` of a stock model's adapter, if the model's config has none.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in HUB_KEYWORDS}
    if kwargs.get("custom_generate") is None and not hasattr(type(model), "taught"):
        model = drafting_view(model, taught)
    return type(model).generate(model, *args, **kwargs)


def drafting_view(model: PreTrainedModel, taught: dict[str, int] | None = None) -> PreTrainedModel:
    """A view of a stock model whose `generate` drafts: both share one `__dict__`."""
    stock_class = type(model)
    refuse_undraftable(stock_class, model.config, model)
    key = (stock_class, *sorted((taught or {}).items()))
    if key not in _drafting_views:
        bases = (TiDARGenerationMixin, stock_class)
        _drafting_views[key] = type(f"Drafting{stock_class.__name__}", bases, {"taught": taught})
    view = object.__new__(_drafting_views[key])
    object.__setattr__(view, "__dict__", model.__dict__)
    return view
