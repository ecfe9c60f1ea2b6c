"""TiDAR: one forward verifies the last draft and writes the next (arXiv 2511.08923).

B sequences, A of them unfinished, P prompt tokens, K drafted tokens, V vocabulary.
"""

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, StaticCache

from ..execution.compiled_layers import compile_config_of, is_captured
from ..execution.model_form import ModelForm
from ..execution.step_graph import StepGraphs
from ..kept_with_model import one_thread_at_a_time
from ..processed_scores import ProcessedScores
from ..stock_model import device_of, is_users_cache, num_cache_layers
from ..transcript import TokenScores, Transcript, pad_token_of
from .choice import Choice, Greedy, Sampled, TieSafeGreedy
from .draft_cache import DraftCache, StaticDraftCache, num_slots_for
from .draft_head import draft_head_of
from .draft_network import DraftNetwork
from .draft_planner import planner_of
from .draft_rows import DraftRows
from .draft_step import PLAIN, Decided, Plan, StepState
from .options_tidar import TiDAROptions
from .outputs_tidar import Record, TiDARGenerateOutput
from .step_runner import StepRunner


@one_thread_at_a_time
@torch.no_grad()
def decode_tidar(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    options: TiDAROptions,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    streamer: Any = None,
) -> TiDARGenerateOutput | torch.Tensor:
    """Writes the text plain decoding would write, in fewer forwards.

    Greedy decoding gives the same tokens; sampling draws from the same distribution (arXiv 2211.17192), whatever
    the drafts are worth.

    Args:
        model: a stock causal language model, or one of ours.
        input_ids: [B, P] prompts, left-padded.
        options: K, seeds and the mask token, checked.
        attention_mask: [B, P], 0 for padding.
        position_ids: [B, uncached part of P].
        past_key_values: the cache of an earlier turn, a prefix of `input_ids`; a user's own is brought up to date.
        streamer: gets tokens as they are decided, 1-D; a draft too where it has `put_draft` (transformers'
            `TextDiffusionStreamer`); several rows where it has `put_row(row, ids)`.

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
    scores = ProcessedScores(logits_processor, transcript, options.excluded_id)
    choice = choice_of(network, scores, options, generation_config)
    record = Record(len(input_ids), options.draft_length, generation_config)
    with network.form.applied():
        state = write(StepRunner(network, choice, graphs), transcript, record, options, position_ids)
        if streamer is not None:
            streamer.end()
        cache = network.final_cache(state, transcript.lengths, transcript.last_ids()) if returns_cache else None
    if cache is not None and (is_users_cache(past_key_values) or isinstance(past_key_values, StaticCache)):
        cache = handed_back(past_key_values, cache)
    return record.output(transcript, network, cache)


def write(
    run: StepRunner, transcript: Transcript, record: Record, options: TiDAROptions, position_ids: torch.Tensor | None
) -> StepState:
    """Writes the texts of a batch to their ends; returns the state after the last step."""
    network, choice = run.network, run.choice
    # 1. Prefill: the prompt decides the first token, and on some devices a block of masks drafts what follows it.
    state, decided = begin(run, transcript, options, position_ids)
    _, drafted = transcript.extend(decided.ids, decided.num_accepted, state.num_drafted, decided.chosen_by)
    planner = planner_of(run, state, options)
    while places := transcript.drop_ended():
        # 2. Ended rows leave the forward.
        state, drafted = network.rows.keep(state, places), [drafted[place] for place in places]
        choice.keep_rows(places)
        # 3. The plan: how much of the draft at hand is read, and how much is drafted next.
        plan = planner.choose()
        state = state.with_length(num_read(plan, state, drafted, options))
        num_tokens = state.draft_ids.shape[1]
        if num_tokens > 1 and max(drafted) > 1:
            transcript.show_draft(state.draft_ids[:, : max(drafted)])
        # 4. One forward verifies the draft, and drafts after each token that is likely to be the last accepted.
        state, decided = run(plan, state)
        # 5. Accepted tokens join the text and stay in the cache; the rest is overwritten.
        before = drafted
        counts, drafted = transcript.extend(decided.ids, decided.num_accepted, state.num_drafted, decided.chosen_by)
        network.rows.advance(counts)
        planner.saw(plan, before, num_tokens, counts)
        record.add_forward(transcript.active, counts)
    return state


def begin(
    run: StepRunner, transcript: Transcript, options: TiDAROptions, position_ids: torch.Tensor | None
) -> tuple[StepState, Decided]:
    """Reads the prompts; the state before the first step, and the first tokens.

    On a CPU masks cost as much after a prompt as after the first token, which is then there sooner, and a captured step
    costs less than masks in a forward that is not: only the paper's own form reads masks with the prompt there.
    """
    network, cache = run.network, run.network.rows.cache
    is_step_cheap = cache.device.type == "cpu" or run.graphs is not None
    has_draft = options.exact != "tie-safe" and (options.has_every_branch or not is_step_cheap)
    prompt_ids = transcript.ids[:, : transcript.prompt_length]
    logits, predictions, next_positions = network.prefill(prompt_ids, position_ids, options.draft_length, has_draft)
    if isinstance(cache, StaticDraftCache):
        cache.reserve_all(None if run.graphs is None else run.graphs.layers)
    decided = run.choice.first(logits)
    draft = run.choice.draft(decided, predictions.after(decided.num_accepted))
    cached_lengths = torch.full((len(prompt_ids),), transcript.prompt_length, device=cache.device)
    state = StepState(draft.ids, draft.confidence, draft.num_drafted, next_positions, cached_lengths, draft.probs)
    return state, decided


def num_read(plan: Plan, state: StepState, drafted: list[int], options: TiDAROptions) -> int:
    """N of the next step: tokens of the draft at hand that are read. A static step has room for K, used or not."""
    if plan == PLAIN:
        return 1
    if options.is_static:
        return options.draft_length
    return state.draft_ids.shape[1] if max(drafted) > 1 else 1


def choice_of(
    network: DraftNetwork, scores: ProcessedScores, options: TiDAROptions, generation_config: GenerationConfig
) -> Choice:
    """How tokens are chosen."""
    keeps_scores = scores.transcript.token_scores is not None
    if generation_config.do_sample:
        seeds = options.seeds(len(scores.transcript.lengths))
        return Sampled(scores, seeds, options.draft_length, keeps_scores)
    wants_confidence = not options.has_every_branch
    if options.exact == "tie-safe":
        margin = options.tie_margin_of(network.model.dtype)
        return TieSafeGreedy(scores, network, margin, wants_confidence, keeps_scores)
    return Greedy(scores, wants_confidence, keeps_scores)


def network_of(
    model: Any,
    options: TiDAROptions,
    generation_config: GenerationConfig,
    transcript: Transcript,
    attention_mask: torch.Tensor | None,
    past_key_values: Any,
    returns_cache: bool,
) -> tuple[DraftNetwork, StepGraphs | None]:
    """The model as steps call it, with its cache; and the graphs of its steps, where steps are captured."""
    batch_size, device = len(transcript.lengths), device_of(model)
    compile_config = compile_config_of(model, generation_config) if options.is_static else None
    form = ModelForm(
        model,
        is_tie_safe=options.exact == "tie-safe",
        is_packed=options.packed_weights,
        compile_config=compile_config,
    )
    graphs, cache = None, DraftCache(batch_size, num_cache_layers(model), device)
    if options.is_static:
        capacity = num_slots_for(transcript.max_length, options.num_queries)
        if is_captured(model, compile_config):
            about = batch_size, form.compiled.options, options.mask_embedding_id
            graphs = StepGraphs.of(model, capacity, *about)
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
    head = draft_head_of(model) if options.draft_head is not False else None
    return DraftNetwork(model, rows, form, options.mask_embedding_id, head, graphs is not None), graphs


def handed_back(given: Any, cache: DynamicCache) -> Any:
    """The cache `generate` was given or has prepared, holding what `cache` holds."""
    if type(given) is DynamicCache or cache.get_seq_length() > given.get_max_length() > 0:  # a static one, outgrown
        given.layers = cache.layers
        return given
    given.reset()
    for number, layer in enumerate(cache.layers):
        given.update(layer.keys, layer.values, number)
    return given
