"""TiDAR: one forward verifies the last draft and writes the next (arXiv 2511.08923).

B sequences, A of them unfinished, P prompt tokens, K drafted tokens, V vocabulary.
"""

import time
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, StaticCache

from ..cache_name import CACHE
from ..execution.compiled_layers import compile_config_of
from ..execution.packed_weights import PackedWeights, reading_packed
from ..steps import Steps
from ..stock_model import device_of, is_shared_by_ranks
from ..transcript import Scores, Transcript, pad_token_of
from ..turns import in_turn
from .choice import Greedy, Sampled, TieSafeGreedy
from .draft_forward import DraftForward
from .draft_head import find_draft_head
from .draft_planner import PLAIN, Plan, pace_of
from .draft_step import DraftStep
from .options_tidar import TiDAROptions, reason_for_plain_decoding
from .outputs_tidar import Record, TiDARGenerateOutput
from .static_draft_cache import num_slots_for


@in_turn
@torch.no_grad()
def decode_tidar(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    options: TiDAROptions,
    packed_weights: PackedWeights | None = None,
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
        packed_weights: what `reading_packed` gives, which is open meanwhile.
        attention_mask: [B, P], 0 for padding.
        position_ids: [B, uncached part of P].
        past_key_values: the cache of an earlier turn, a prefix of `input_ids`; a user's own is brought up to date.
        streamer: gets tokens as they are decided, 1-D; a draft too where it has `put_draft` (transformers'
            `TextDiffusionStreamer`); several rows where it has `put_row(row, ids)`.

    Returns:
        [B, P + N] ids, or `TiDARGenerateOutput` where `generation_config.return_dict_in_generate`.
    """
    batch_size, draft_length = len(input_ids), options.draft_length
    pad_token_id = pad_token_of(generation_config)
    steps = Steps.asked_for(generation_config, batch_size)
    transcript = Transcript(input_ids, stopping_criteria, pad_token_id, draft_length, streamer, steps)
    scores = Scores(logits_processor, transcript, options.excluded_id)
    is_users_cache = getattr(past_key_values, "_is_user_defined", False)
    returns_cache = is_users_cache or generation_config.return_dict_in_generate
    forward = DraftForward(
        model,
        draft_length,
        options.mask_embedding_id,
        batch_size,
        attention_mask,
        past_key_values,
        returns_cache,
        is_tie_safe=options.exact == "tie-safe",
        num_slots=num_slots_for(transcript.max_length, options.num_queries) if options.is_static else None,
        compile_config=compile_config_of(model, generation_config) if options.is_static else None,
        packed_weights=packed_weights,
        has_draft_head=options.draft_head is not False,
    )
    choice: Sampled | Greedy
    is_auto, has_every_branch = options.num_branches == "auto", options.num_branches == draft_length
    if generation_config.do_sample:
        choice = Sampled(scores, options.seeds(batch_size), draft_length)
    elif options.exact == "tie-safe":
        choice = TieSafeGreedy(scores, forward, options.tie_margin_of(model.dtype), not has_every_branch)
    else:
        choice = Greedy(scores, not has_every_branch)
    record = Record(batch_size, draft_length, generation_config)

    # 1. Prefill: the prompt decides the first token, and one block of masks drafts what follows it. On a CPU masks cost
    # as much behind a prompt as behind the first token, which is then there sooner, and a recorded step costs less than
    # masks in a forward that is not recorded: only the paper's own form has them.
    is_step_cheap = device_of(model).type == "cpu" or forward.graphs is not None
    reads_plainly = options.exact == "tie-safe" or (is_step_cheap and not has_every_branch)
    target_logits = forward.prefill(input_ids, position_ids, has_draft=not reads_plainly)
    step = DraftStep(forward, choice, target_logits, keeps_logits=steps is not None)
    counts, masks = transcript.extend(step.decided_ids, step.num_decided, step.num_masks, step.chosen_by)
    plan = Plan(draft_length, int(options.num_branches) if not is_auto else draft_length)
    max_new_tokens = transcript.max_length - transcript.prompt_length
    pace = pace_of(forward, draft_length, max_new_tokens, step.rehearse) if is_auto else None
    while places := transcript.drop_ended():
        # 2. Finished rows leave the forward.
        if len(places) < len(step.num_decided):
            step.keep_rows(places)
        # 3. The draft: the last decided token, then what the masks predict that stand at the right positions.
        began = time.perf_counter()
        plan = plan if pace is None else pace.choose()
        drafted = [0 if plan == PLAIN else masks[place] for place in places]
        has_draft = any(drafted) or (options.is_static and plan != PLAIN)  # a static step has room for one, used or not
        draft_ids, confidence = step.draft(has_draft)
        if any(drafted):
            transcript.show_draft(draft_ids[:, : 1 + max(drafted)])
        # 4. One forward verifies it, and drafts behind each token that is likely to be the last accepted.
        num_clean = draft_ids.shape[1]
        num_blocks = min(plan.num_branches, num_clean) if has_draft else int(plan != PLAIN)
        forward.draft_length = plan.draft_length or forward.draft_length
        step.run(draft_ids, confidence, num_blocks)
        # 5. Accepted tokens join the text and stay in the cache; the rest is overwritten.
        counts, masks = transcript.extend(step.decided_ids, step.num_decided, step.num_masks, step.chosen_by)
        forward.accept(step.num_decided, counts)
        if pace is not None:
            lengths = [num_clean if num == num_clean - 1 else 1 for num in drafted]  # a late block's are worth less
            shape = (num_clean, num_blocks, plan.draft_length if num_blocks else 0)
            seconds = time.perf_counter() - began
            pace.see(list(zip(lengths, counts, strict=True)), shape, seconds, transcript.fewest_new_tokens - 1)
        record.add_forward(transcript.active, counts)
    if pace is not None:
        pace.end()

    if streamer is not None:
        streamer.end()
    cache = forward.final_cache(transcript.lengths, transcript.last_ids()) if returns_cache else None
    if cache is not None and (is_users_cache or isinstance(past_key_values, StaticCache)):
        cache = handed_back(past_key_values, cache)
    return record.output(transcript, forward, cache)


def handed_back(given: Any, cache: DynamicCache) -> Any:
    """The cache `generate` was given or has prepared, holding what `cache` holds."""
    if type(given) is DynamicCache or cache.get_seq_length() > given.get_max_length() > 0:  # a static one, outgrown
        given.layers = cache.layers
        return given
    given.reset()
    for number, layer in enumerate(cache.layers):
        given.update(layer.keys, layer.values, number)
    return given


@in_turn
def tidar(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft_length: int | None = None,
    num_branches: int | str | None = None,
    seed: int | list[int] | None = None,
    exact: str | None = None,
    tie_margin: float | None = None,
    mask_embedding_id: int | None = None,
    packed_weights: bool | None = None,
    draft_head: str | bool | None = None,
    streamer: Any = None,
    synced_gpus: bool | None = None,
    **model_kwargs: Any,
) -> TiDARGenerateOutput | torch.Tensor:
    """The same decode for a stock model: `model.generate(..., custom_generate=tidar)`.

    A stock model drafts usefully with a gated adapter (`model.load_adapter`). Its config may hold a `tidar_config`, as
    that of a converted folder does; otherwise both `draft_length` and `mask_embedding_id` must be given, as they were
    when the adapter was taught. transformers hands no streamer, no tokenizer and no `synced_gpus` to a custom decode:
    pass `custom_generate=functools.partial(tidar, streamer=streamer)`, and for stop strings
    `stopping_criteria=[StopStringCriteria(tokenizer, ["stop"])]`.

    Args:
        draft_length, num_branches, seed, exact, tie_margin, packed_weights, draft_head: as in `generate` of our own
            classes.
        mask_embedding_id: the row of the embedding table that masks read.
        streamer: as of `decode_tidar`; it gets the prompt first.
        synced_gpus: whether ranks share the model, which is refused; where absent, told by the model. False where each
            rank has gathered all of it.
    """
    given: dict[str, Any] = {"draft_length": draft_length, "num_branches": num_branches, "seed": seed}
    given |= {"exact": exact, "tie_margin": tie_margin, "mask_embedding_id": mask_embedding_id}
    given |= {"packed_weights": packed_weights, "draft_head": draft_head}
    for name, value in given.items():
        if value is not None:
            setattr(generation_config, name, value)
    options = TiDAROptions.of(generation_config, model.config)
    if not options.draft_length:
        raise ValueError(
            "`draft_length` must be at least 1 with `custom_generate=tidar`. Leave it out to decode plainly."
        )
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"`num_beams` must be 1 with `custom_generate=tidar`, but is {generation_config.num_beams}: a draft "
            "continues one text, not several. Leave `custom_generate` out to search with beams and without drafts."
        )
    is_shared = is_shared_by_ranks(model) if synced_gpus is None else synced_gpus
    if reason := reason_for_plain_decoding(generation_config, is_shared, model_kwargs):
        raise ValueError(f"`custom_generate=tidar` cannot draft: {reason}. Leave it out to decode plainly.")
    find_draft_head(model, options.draft_head)
    used = {name: model_kwargs.get(name) for name in ("attention_mask", "position_ids")}
    if streamer is not None:
        streamer.put(input_ids.cpu())
    with reading_packed(model, options.packed_weights) as packed:
        return decode_tidar(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            options=options,
            packed_weights=packed,
            streamer=streamer,
            past_key_values=model_kwargs.get(CACHE),
            **used,
        )
