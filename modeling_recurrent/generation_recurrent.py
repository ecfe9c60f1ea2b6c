"""Connects `generate` to the decoders of recurrent-depth models: reads keywords, runs the policy's decoder."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import logging

from ..generation.processed_scores import PURE, ProcessedScores
from ..generation.recurrent.decode_adaptive import decode_adaptive
from ..generation.recurrent.decode_diffusion_forcing import decode_diffusion_forcing
from ..generation.recurrent.decode_exact import decode_exact
from ..generation.recurrent.decode_published import PublishedChoice, decode_published
from ..generation.recurrent.decode_self_speculative import decode_self_speculative
from ..generation.recurrent.options_recurrent import RecurrentOptions
from ..generation.recurrent.outputs_recurrent import Costs, RecurrentGenerateOutput
from ..generation.recurrent.session_recurrent import Prompts, Session, check_cache
from ..generation.step_graph import LAYER_MODES, StepGraphs
from ..generation.stock_model import (
    CACHE,
    CACHE_NAMES,
    device_of,
    devices_of,
    is_hooked,
    is_users_cache,
    mark_users_cache,
    num_columns_of,
)
from ..generation.torch_internals import compiler_options_of
from ..generation.transcript import TokenScores, Transcript, pad_token_of
from .cache_recurrent import RecurrentCache
from .static_recurrent import CompiledParts, StaticParts, StaticRecurrentCache

if TYPE_CHECKING:

    class Stock(PreTrainedModel): ...
else:
    Stock = object

logger = logging.get_logger(__name__)
# Calls of loops and products are themselves compiled, and do not check sizes, which are those they were compiled for.
CALLS_ON_CPU = {"size_asserts": False, "cpp_wrapper": True, "triton.cudagraphs": False}
# For single tokens: matrix products become loops, fused with the operations around them. A value that a loop reads
# repeatedly is stored, not recomputed. Loops of several tokens compile for minutes, and gain nothing.
LOOPS_ON_CPU = {"post_grad_fusion_options": {"decompose_mm_pass": {}}, "realize_reads_threshold": 1}
READ_KEYWORDS = {
    "input_ids",
    "attention_mask",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    *CACHE_NAMES,
}
DECODERS = {
    "adaptive": decode_adaptive,
    "self-speculative": decode_self_speculative,
    "diffusion-forcing": decode_diffusion_forcing,
    "exact": decode_exact,
}


class RecurrentGenerationMixin(Stock):
    """`generate(policy=..., ...)`: the keywords of `RecurrentOptions` beside transformers' own.

    Each may also be a field of the generation config. A keyword overrides the config passed, which overrides the
    model's own.
    """

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict]:
        keywords = {name: kwargs.pop(name) for name in sorted(RecurrentOptions.names()) if name in kwargs}
        layers = [keywords]
        for config in (generation_config, self.generation_config):
            stored = {} if config is None else {n: getattr(config, n, None) for n in sorted(RecurrentOptions.names())}
            layers.append({name: value for name, value in stored.items() if value is not None})
        options = RecurrentOptions.from_layers(layers, self.config.mean_recurrence)
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        refuse_everywhere(prepared)
        if options.policy == "autoregressive":  # transformers' own loops pass these to every forward
            if options.seed is not None and prepared.do_sample:
                raise ValueError(
                    f"`seed` must be left out where plain decoding samples, but is {options.seed}: transformers' own "
                    f"loop draws from the global generator. Call `torch.manual_seed`, or use `policy='exact'`, whose "
                    f"texts have the same probabilities."
                )
            model_kwargs |= {"num_recurrences": options.num_recurrences, "init_scale": options.init_scale}
        else:
            refuse_unsupported(prepared, model_kwargs, options)
            if self.exit_of(options.num_recurrences) is not None:
                raise ValueError(
                    f"`policy` must be 'autoregressive' where the config has an early exit (`early_exit_step`, or an "
                    f"`early_exit_threshold` below 1), but is {options.policy!r}, whose tokens take all steps."
                )
        prepared.recurrent_options = options
        return prepared, model_kwargs

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, str | None, dict]:
        inputs, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        if not inputs.shape[1]:
            raise ValueError(
                f"`{name}` must have at least one token per row (the last predicts the first new one), but has "
                f"shape {tuple(inputs.shape)}. Start with the tokenizer's `bos_token_id`."
            )
        return inputs, name, model_kwargs

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        options = generation_config.recurrent_options
        is_plain = options.policy == "autoregressive"
        if not is_plain and generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(
                f"`policy` must be 'autoregressive' for {generation_mode.value.replace('_', ' ')}, but is "
                f"{options.policy!r}, which drafts and verifies by itself. Leave one of the two out."
            )
        num_beams = generation_config.num_beams or 1
        rows = batch_size * (generation_config.num_return_sequences if num_beams == 1 else 1)
        if is_plain and options.init_scale:
            seeds = torch.tensor(options.seeds(rows, generation_config.do_sample), device=device_of(self))
            model_kwargs["state_seeds"] = seeds.repeat_interleave(num_beams)
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            if not isinstance(cache, RecurrentCache):
                raise ValueError(
                    f"`{CACHE}` must be a `RecurrentCache` (this model stores several recurrences per layer), "
                    f"but is a {type(cache).__name__}. Leave it out, or pass the one an earlier call returned."
                )
            check_static(generation_config, options, cache)
            mark_users_cache(cache)
            return
        check_static(generation_config, options, None)
        if generation_config.use_cache:
            stored = options.stored_recurrences
            is_static = generation_config.cache_implementation == "static"
            if is_static and len(devices_of(self)) > 1:
                logger.warning_once("`cache_implementation='static'` is ignored: layers are on several devices.")
                is_static = False
            make = StaticRecurrentCache if is_static else RecurrentCache
            if is_static:
                max_cache_length = max(max_cache_length, generation_config.max_cache_len or 0)
            model_kwargs[CACHE] = make(
                self.config, rows * num_beams, max_cache_length, stored, self.dtype, device_of(self)
            )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Unsupported: transformers' paged cache stores one recurrence per layer."""
        raise ValueError(
            "Continuous batching (`generate_batch`, `transformers serve --continuous-batching`) must be left out for "
            "recurrent-depth models: its pages store one recurrence per layer. Use `generate` for ragged batches."
        )

    def _valid_auto_compile_criteria(self, model_kwargs: dict, generation_config: GenerationConfig) -> bool:
        """Never: a static cache compiles the three parts. A compiled forward would have one copy of the core per
        recurrence."""
        return False

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> RecurrentGenerateOutput | torch.Tensor:
        """The loop of `generate` for greedy search and sampling: the policy's, or transformers' own."""
        options = generation_config.recurrent_options
        attention_mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE)
        if isinstance(cache, StaticRecurrentCache):
            cache.compiled = compiled_parts(self, generation_config)
        if options.policy == "autoregressive":
            num_read = num_unread(input_ids, attention_mask, cache, generation_config)
            model_kwargs |= {"synced_gpus": synced_gpus, "streamer": streamer}
            output = super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
            return output if isinstance(output, torch.Tensor) else plain_output(output, input_ids, num_read, options)
        if synced_gpus:
            raise ValueError(
                f"`policy` must be 'autoregressive' if ranks share one model (FSDP, ZeRO-3), but is "
                f"{options.policy!r}: all must run equally many forwards, and a wavefront needs as many as its text "
                f"takes. If each rank has a whole model, pass `synced_gpus=False`."
            )
        num_columns = num_columns_of(input_ids, attention_mask, generation_config)
        input_ids = input_ids.to(device_of(self))
        self._check_policy(options, input_ids, attention_mask, cache, num_columns)
        check_processors(options, logits_processor)
        is_published = options.policy == "published"
        transcript = Transcript(
            input_ids,
            stopping_criteria,
            pad_token_of(generation_config),
            options.num_undecided,
            None if is_published else streamer,
            TokenScores.asked_for(generation_config, len(input_ids)),
        )
        if is_published:
            choose = PublishedChoice(logits_processor, generation_config.do_sample, options.generator)
            output = decode_published(self, transcript, options, cache, choose, streamer)
        else:
            wants_dict = generation_config.return_dict_in_generate
            session = Session(
                self,
                StaticParts(self, cache.compiled) if isinstance(cache, StaticRecurrentCache) else self,
                Prompts(input_ids, attention_mask),
                transcript,
                ProcessedScores(logits_processor, transcript),
                options,
                cache,
                generation_config.do_sample,
                returns_cache=wants_dict or is_users_cache(cache),
            )
            output = DECODERS[options.policy](session)
        if streamer is not None:
            streamer.end()
        return output if generation_config.return_dict_in_generate else output.sequences

    def _check_policy(
        self,
        options: RecurrentOptions,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Any,
        num_columns: int,
    ) -> None:
        if num_columns != input_ids.shape[1]:
            raise ValueError(
                f"`input_ids` must be whole rows with `policy={options.policy!r}`, cached tokens included, but have "
                f"{input_ids.shape[1]} columns, and `attention_mask` {num_columns}. Use `policy='autoregressive'` to "
                f"go on from a cache with new tokens alone."
            )
        if options.policy in ("diffusion-forcing", "published") and not self.reinjects_input:
            raise ValueError(
                f"`policy` must not be {options.policy!r} for {type(self).__name__}, whose core does not read the "
                f"tokens at each recurrence (`reinjects_input`): a state stays that of its first token. Use 'exact'."
            )
        if options.reference_compat and (len(input_ids) > 1 or attention_mask is not None):
            raise ValueError(
                f"`input_ids` must be one row without padding with `reference_compat` (the published code supports "
                f"only that), but has {len(input_ids)} rows. Leave `reference_compat` out."
            )
        if options.reference_compat and cache.get_seq_length():
            raise ValueError(
                f"`{CACHE}` must be left out with `reference_compat` (the published code starts empty), but "
                f"has {cache.get_seq_length()} tokens. Leave `reference_compat` out."
            )


def num_unread(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: Any, generation_config: GenerationConfig
) -> int:
    """Number of prompt tokens that plain decoding will read: all but those in the caller's cache. Checks the cache."""
    length = 0 if cache is None else cache.get_seq_length()
    num_columns = num_columns_of(input_ids, attention_mask, generation_config)  # ids may be embeddings
    if length:
        check_cache(generation_config.recurrent_options, cache, len(input_ids), num_columns)
    if attention_mask is not None:
        return int(attention_mask[:, length:].sum())
    return len(input_ids) * (num_columns - length)


def check_static(generation_config: GenerationConfig, options: RecurrentOptions, cache: Any) -> None:
    """Raise ValueError if a static cache is requested but impossible; warn if compiling lacks one."""
    kind = generation_config.cache_implementation
    if kind not in (None, "dynamic", "static"):
        raise ValueError(
            f"`cache_implementation` must be 'static' or left out (this model has its own caches; `kv_cache` "
            f"chooses what they store), but is {kind!r}."
        )
    is_static = isinstance(cache, StaticRecurrentCache) or (cache is None and kind == "static")
    if kind == "static" and not is_static:
        raise ValueError(
            f"`cache_implementation` must be left out with a `{CACHE}` that was made without it, but is "
            "'static'. Pass it in the call that makes the cache."
        )
    if is_static and (options.policy == "exact" or options.reference_compat):
        raise ValueError(
            f"`cache_implementation` must be left out with `policy={options.policy!r}`"
            f"{' and `reference_compat`' if options.reference_compat else ''}, whose wavefront has one shape per "
            f"depth and width, but is 'static'."
        )
    if generation_config.compile_config is not None and not generation_config.disable_compile and not is_static:
        logger.warning_once(
            "`compile_config` is ignored: it compiles steps of one shape, which need `cache_implementation='static'`."
        )


def compiled_parts(model: PreTrainedModel, generation_config: GenerationConfig) -> CompiledParts | None:
    """The model's parts, compiled for this decode: by default on accelerators, on a CPU only on request."""
    config, is_on_cpu = generation_config.compile_config, device_of(model).type == "cpu"
    if generation_config.disable_compile or (config is None and is_on_cpu):
        return None
    if is_hooked(model):
        logger.warning_once("`compile_config` is ignored: layers with offloaded weights cannot be compiled.")
        return None
    config = config or CompileConfig()
    graphs = StepGraphs(None) if is_captured(model, config) else None
    keywords: dict[str, Any] = {"backend": config.backend, "fullgraph": True, "dynamic": False}
    if config.backend != "inductor":
        return CompiledParts(model, keywords, graphs=graphs)
    if config.options is not None:
        return CompiledParts(model, keywords | {"options": config.options})
    options = compiler_options_of(config.mode if graphs is None else LAYER_MODES[config.mode])
    if is_on_cpu:
        return CompiledParts(model, keywords | {"options": options | CALLS_ON_CPU}, LOOPS_ON_CPU)
    return CompiledParts(model, keywords | {"options": options}, graphs=graphs)


def is_captured(model: PreTrainedModel, config: CompileConfig) -> bool:
    """Whether compiled calls become CUDA graphs: on a GPU in one of `LAYER_MODES`."""
    return device_of(model).type == "cuda" and config.options is None and config.mode in LAYER_MODES


def refuse_everywhere(generation_config: GenerationConfig) -> None:
    """Raise ValueError for options that no policy supports."""
    if generation_config.assistant_early_exit is not None:
        raise ValueError(
            f"`assistant_early_exit` must be left out, but is {generation_config.assistant_early_exit}: these models "
            f"exit early at a recurrence, not a layer. Use `policy='self-speculative'`, with `draft_recurrences`."
        )


def refuse_unsupported(generation_config: GenerationConfig, model_kwargs: dict, options: RecurrentOptions) -> None:
    """Raise ValueError for options that only plain decoding supports."""
    requested = {
        "num_beams": generation_config.num_beams not in (None, 1),
        "output_attentions": bool(generation_config.output_attentions),
        "output_hidden_states": bool(generation_config.output_hidden_states),
        "use_cache": generation_config.use_cache is False,
        "prompt_lookup_num_tokens": bool(generation_config.prompt_lookup_num_tokens),
        "prefill_chunk_size": generation_config.prefill_chunk_size is not None,
        "guidance_scale": generation_config.guidance_scale not in (None, 1),
        "is_assistant": bool(generation_config.is_assistant),
    }
    requested |= {name: value is not None for name, value in model_kwargs.items() if name not in READ_KEYWORDS}
    if options.reference_compat:
        requested |= {name: bool(getattr(generation_config, name)) for name in ("output_scores", "output_logits")}
    for name, is_requested in requested.items():
        if is_requested:
            value = getattr(generation_config, name, "given")
            raise ValueError(
                f"`{name}` must be left at its default with `policy={options.policy!r}`, which does not decode "
                f"tokens one at a time, but is {value}. Use `policy='autoregressive'` for it."
            )


def check_processors(options: RecurrentOptions, processors: LogitsProcessorList) -> None:
    """Raise ValueError for logits processors that this policy cannot ask."""
    for processor in processors:
        is_asked_again = options.policy == "published" and type(processor) not in PURE
        if is_asked_again or isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            raise ValueError(
                f"`logits_processor` must be without {type(processor).__name__} with `policy={options.policy!r}`: it "
                f"{'may be asked once a token' if is_asked_again else 'runs the model'}. Use 'autoregressive'."
            )


def plain_output(
    output: Any, input_ids: torch.Tensor, num_read: int, options: RecurrentOptions
) -> RecurrentGenerateOutput:
    """The output of transformers' own loop, with the costs that the other policies report."""
    num_rows, num_new = len(input_ids), output.sequences.shape[1] - input_ids.shape[1]
    costs = Costs(num_rows, options.num_recurrences)
    costs.num_prefill_positions = num_read
    costs.num_steps = num_new - 1
    costs.num_core_passes = options.num_recurrences * costs.num_steps
    costs.num_positions = num_rows * costs.num_core_passes
    costs.row_passes = [costs.num_core_passes] * num_rows
    costs.recurrences = [dict.fromkeys(range(num_new - 1), options.num_recurrences) for _ in range(num_rows)]
    return costs.output(
        output.sequences,
        [num_new] * num_rows,
        scores=output.scores,
        logits=output.logits,
        attentions=output.attentions,
        hidden_states=output.hidden_states,
        **{CACHE: getattr(output, CACHE)},
    )
