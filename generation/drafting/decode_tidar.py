"""TiDAR: one forward verifies the last draft and writes the next (arXiv 2511.08923).

B sequences, A of them unfinished, P prompt tokens, K drafted tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

from ..execution.compiled_layers import compile_config_of, is_captured
from ..execution.model_form import ModelForm
from ..execution.packed_linear import pays_to_pack
from ..kept_with_model import one_thread_at_a_time
from ..processed_scores import ProcessedScores
from ..step_graph import StepGraphs
from ..stock_model import CACHE, device_of, has_causal_blocks, is_users_cache, num_cache_layers, taught_of
from ..transcript import TokenScores, Transcript, pad_token_of
from .choice import Greedy, InOrder, Sampled, TieSafeGreedy
from .copied_drafts import CopiedDrafts
from .draft_cache import DraftCache, DraftRows, StaticDraftCache, num_slots_for
from .draft_head import chosen_head
from .draft_network import DraftNetwork
from .draft_planner import planner_of
from .draft_step import PLAIN, Decided, Plan, StepState
from .options_tidar import TiDAROptions
from .step_runner import StepRunner

logger = logging.get_logger(__name__)


@dataclass
class TiDARGenerateOutput(GenerateDecoderOnlyOutput):
    """`generate(return_dict_in_generate=True)` of a model that drafts. B sequences, K drafted tokens.

    Attributes:
        sequences: [B, P + N] prompt and new ids, padded after each row's end.
        num_forwards: decode forwards of the whole batch, without those below.
        num_prefill_forwards: forwards that read the prompt, and one where the returned cache would lack the last
            tokens of rows that ended before others.
        num_tie_forwards: with `exact="tie-safe"`, forwards of one token of one row that decided near-ties.
        tokens_per_forward: [B] tokens that a row got from each of its decode forwards, up to its end; plain decoding
            has 1.0. NaN for a row without a decode forward.
        accepted_lengths: [B, K] how often a forward of the row accepted 1, 2, ..., K tokens.
        plans: decode forwards by their plan: K drafted tokens after each of B numbers of accepted tokens, as (K, B).
            (0, 0) decoded plainly.
        packed_weights: whether packed weights were read.
        trust: what the model's own logits counted for. Below 1 the text is not plain decoding's.
    """

    num_forwards: int | None = None
    num_prefill_forwards: int | None = None
    num_tie_forwards: int | None = None
    tokens_per_forward: Tensor | None = None
    accepted_lengths: Tensor | None = None
    plans: dict[Plan, int] | None = None
    packed_weights: bool | None = None
    trust: float | None = None


class Record:
    """What each forward of a batch accepted, as `TiDARGenerateOutput` tells it."""

    def __init__(self, batch_size: int, draft_length: int, generation_config: GenerationConfig):
        self.num_forwards = 0
        self.generation_config = generation_config
        self.accepted_lengths = torch.zeros(batch_size, draft_length, dtype=torch.long)
        self.plans: dict[Plan, int] = {}

    def add_forward(self, plan: Plan, rows: list[int], num_accepted: list[int]) -> None:
        self.num_forwards += 1
        self.plans[plan] = self.plans.get(plan, 0) + 1
        for row, count in zip(rows, num_accepted, strict=True):
            self.accepted_lengths[row, count - 1] += 1

    def output(self, transcript: Transcript, run: StepRunner, cache: DynamicCache | None) -> Any:
        """The ids [B, P + N], or all that a caller may ask for."""
        network, trust = run.network, run.choice.trust
        self.log(network.form.is_packed, trust)
        if not self.generation_config.return_dict_in_generate:
            return transcript.sequences()
        num_new_tokens = transcript.num_new_tokens
        kept = transcript.token_scores
        logits, scores = kept.columns(num_new_tokens) if kept else (None, None)
        return TiDARGenerateOutput(
            sequences=transcript.sequences(),
            scores=scores,
            logits=logits,
            num_forwards=self.num_forwards,
            num_prefill_forwards=network.num_prefill_forwards,
            num_tie_forwards=network.num_tie_forwards,
            tokens_per_forward=(torch.tensor(num_new_tokens) - 1) / self.accepted_lengths.sum(dim=1),
            accepted_lengths=self.accepted_lengths,
            plans=self.plans,
            packed_weights=network.form.is_packed,
            trust=trust,
            **{CACHE: cache},
        )

    def log(self, is_packed: bool, trust: float) -> None:
        """Says what was chosen, where transformers' verbosity is info."""
        plans = ", ".join(f"K={k} B={b}: {count}" if k else f"plain: {count}" for (k, b), count in self.plans.items())
        packed = ", packed weights" * is_packed
        mixed = f", trust={trust}: the text is not plain decoding's" if trust < 1 else ""
        logger.info(f"{self.num_forwards} decode forwards ({plans}){packed}{mixed}")


@one_thread_at_a_time
@torch.no_grad()
def decode_tidar(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    options: TiDAROptions,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    streamer: Any = None,
    given: dict[str, Any] | None = None,
) -> TiDARGenerateOutput | Tensor:
    """Writes the text plain decoding would write, in fewer forwards.

    Greedy decoding gives the same tokens, unless `options.trust` is below 1; sampling draws from the same distribution
    (arXiv 2403.10444).

    Args:
        input_ids: [B, P] prompts, left-padded.
        attention_mask: [B, P], 0 for padding.
        position_ids: [B or 1, uncached part of P].
        past_key_values: the cache of a prefix of `input_ids`; a user's own is brought up to date.
        given: images and the like, for a model of several parts.
        streamer: gets decided tokens, 1-D; of several rows by `put_row(row, ids)`; drafts by `put_draft`
            (transformers' `TextDiffusionStreamer`).

    Returns:
        [B, P + N] ids, or `TiDARGenerateOutput` where `generation_config.return_dict_in_generate`.
    """
    returns_cache = is_users_cache(past_key_values) or generation_config.return_dict_in_generate
    token_scores = TokenScores.asked_for(generation_config, len(input_ids))
    pad_token_id = pad_token_of(generation_config)
    transcript = Transcript(input_ids, stopping_criteria, pad_token_id, options.draft_length, streamer, token_scores)
    network, graphs = network_of(
        model, options, generation_config, transcript, attention_mask, past_key_values, returns_cache
    )
    if network.given is not None:
        network.given = given or {}
    scores = ProcessedScores(logits_processor, transcript, options.excluded_id)
    choice = choice_of(network, scores, options, generation_config)
    record, run = Record(len(input_ids), options.draft_length, generation_config), StepRunner(network, choice, graphs)
    with network.form.applied():
        state = write_texts(run, transcript, record, options, position_ids)
        if streamer is not None:
            streamer.end()
        cache = network.final_cache(state, transcript.lengths, transcript.last_ids()) if returns_cache else None
    if cache is not None and (is_users_cache(past_key_values) or isinstance(past_key_values, StaticCache)):
        cache = handed_back(past_key_values, cache)
    return record.output(transcript, run, cache)


def write_texts(
    run: StepRunner, transcript: Transcript, record: Record, options: TiDAROptions, position_ids: Tensor | None
) -> StepState:
    """Writes the texts of a batch to their ends; returns the state after the last step."""
    network, choice = run.network, run.choice
    # 1. Prefill: the prompt decides the first token, and a block of masks may draft what follows it.
    state, decided = begin(run, transcript, options, position_ids)
    _, drafted = choice.join(decided, state.num_drafted)
    planner = planner_of(run, len(transcript.lengths), options)
    copies = CopiedDrafts(transcript, network.rows.is_real_in_prompt, options)
    while places := transcript.drop_ended():
        # 2. Ended rows leave the forward.
        state, drafted = network.rows.keep(state, places), [drafted[place] for place in places]
        choice.keep_rows(places)
        # 3. The plan: how much is read of the draft at hand or of a copy, and how much is drafted next.
        plan = planner.choose()
        state, drafted, of_masks = copies.offer(state, transcript.active, drafted, plan, planner)
        state = state.with_length(num_read(plan, state, drafted, of_masks, options))
        num_tokens = state.draft_ids.shape[1]
        if num_tokens > 1 and max(drafted) > 1:
            transcript.show_draft(state.draft_ids[:, : max(drafted)])
        # 4. One forward verifies the draft, and drafts after each token that is likely to be the last accepted.
        state, decided = run(plan, state)
        # 5. Accepted tokens join the text and stay in the cache; the rest is overwritten.
        counts, drafted = choice.join(decided, state.num_drafted)
        network.rows.advance(counts)
        planner.saw(plan, of_masks, num_tokens, counts)
        record.add_forward(plan, transcript.active, counts)
    return state


def begin(
    run: StepRunner, transcript: Transcript, options: TiDAROptions, position_ids: Tensor | None
) -> tuple[StepState, Decided]:
    """Reads the prompts; the state before the first step, and the first tokens.

    On a CPU, masks after a prompt only delay the first token. A captured step costs less than they do. There only the
    paper's own form, with every branch, reads masks with the prompt.
    """
    network, cache = run.network, run.network.rows.cache
    is_step_cheap = cache.device.type == "cpu" or run.graphs is not None
    has_draft = options.exact != "tie-safe" and (options.num_branches == options.draft_length or not is_step_cheap)
    prompt_ids = transcript.ids[:, : transcript.prompt_length]
    logits, predictions, next_positions = network.prefill(prompt_ids, position_ids, options.draft_length, has_draft)
    if isinstance(cache, StaticDraftCache):
        cache.reserve_all(None if run.graphs is None else run.graphs.layers)
    decided = run.choice.first(logits)
    draft = run.choice.draft(decided, predictions.after(decided.num_accepted))
    cached_lengths = torch.full((len(prompt_ids),), cache.max_length, device=cache.device)
    return StepState(*draft, next_positions, cached_lengths), decided


def num_read(plan: Plan, state: StepState, drafted: list[int], of_masks: list[int], options: TiDAROptions) -> int:
    """N of the next step: tokens of the draft at hand that are read. A plain step reads copies alone, a static one
    K."""
    if options.is_static:
        return max(plan.draft_length, 1)
    if plan == PLAIN:
        return max([1, *(length for length, masked in zip(drafted, of_masks, strict=True) if not masked)])
    return state.draft_ids.shape[1] if max(drafted) > 1 else 1


def choice_of(
    network: DraftNetwork, scores: ProcessedScores, options: TiDAROptions, generation_config: GenerationConfig
) -> Greedy | Sampled:
    if generation_config.do_sample:
        num_rows = len(scores.transcript.lengths)
        seeds = options.seeds(num_rows)
        if not scores.is_in_order:
            return Sampled(scores, seeds, options.draft_length)
        return InOrder(scores, seeds or torch.randint(2**63 - 1, (num_rows,)).tolist())
    if scores.is_in_order:
        return InOrder(scores, None, options.trust)
    if options.exact == "tie-safe":
        return TieSafeGreedy(scores, network, options.tie_margin_of(network.model.dtype))
    return Greedy(scores, options.trust)


def network_of(
    model: Any,
    options: TiDAROptions,
    generation_config: GenerationConfig,
    transcript: Transcript,
    attention_mask: Tensor | None,
    past_key_values: Any,
    returns_cache: bool,
) -> tuple[DraftNetwork, StepGraphs | None]:
    """The model as steps call it, with its cache; and the graphs of captured steps, or None."""
    batch_size, device = len(transcript.lengths), device_of(model)
    compile_config = compile_config_of(model, generation_config) if options.is_static else None
    is_tie_safe, is_packed = options.exact == "tie-safe", packs_weights(model, options)
    form = ModelForm(model, is_tie_safe=is_tie_safe, is_packed=is_packed, compile_config=compile_config)
    of_masks = options.mask_embedding_id, has_causal_blocks(taught_of(model))
    graphs, cache = None, DraftCache(batch_size, num_cache_layers(model), device)
    if options.is_static:
        longest = max(transcript.max_length, generation_config.max_cache_len or 0)
        capacity = num_slots_for(longest, options.num_queries)
        if is_captured(model, compile_config):
            graphs = StepGraphs.of(model, capacity, batch_size, form.compiled.options, of_masks)
            capacity = graphs.capacity
        cache = StaticDraftCache(batch_size, num_cache_layers(model), device, capacity)
    if past_key_values is not None and past_key_values.get_seq_length():
        cache.take_over(past_key_values)
    is_real_slot = None if attention_mask is None else attention_mask.to(device).bool()
    if is_real_slot is not None and is_real_slot.all():
        is_real_slot = None  # as plain decoding has it
    if graphs is not None and is_real_slot is not None:
        is_real_slot = graphs.padding_of(is_real_slot)
    rows = DraftRows(cache, batch_size, is_real_slot, returns_cache)
    head = chosen_head(model, options.draft_head)
    chunk_size = generation_config.prefill_chunk_size
    network = DraftNetwork(model, rows, form, of_masks, head, graphs is not None, chunk_size)
    return network, graphs


def packs_weights(model: Any, options: TiDAROptions) -> bool:
    """Whether packed weights are read: as the caller says, or where they cost nothing but memory."""
    return pays_to_pack(model) if options.packed_weights is None else options.packed_weights


def handed_back(given: Any, cache: DynamicCache) -> Any:
    """The cache given to `generate`, or made by it, with what `cache` holds."""
    if type(given) is DynamicCache or cache.get_seq_length() > given.get_max_length() > 0:  # a static one, outgrown
        given.layers = cache.layers
        return given
    given.reset()
    for number, layer in enumerate(cache.layers):
        given.update(layer.keys, layer.values, number)
    return given
