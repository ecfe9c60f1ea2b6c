"""TiDAR: one forward verifies the last draft and writes the next (arXiv 2511.08923).

B sequences, A of them unfinished, P prompt tokens, K drafted tokens, M branches, V vocabulary, D channels.
"""

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from .choice import Greedy, Sampled
from .draft_forward import DraftForward
from .outputs import Statistics, StepScores, TiDARGenerateOutput
from .transcript import Scores, Transcript


@torch.no_grad()
def decode_tidar(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    draft_length: int,
    seeds: list[int] | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: DynamicCache | None = None,
    streamer: Any = None,
) -> TiDARGenerateOutput | torch.Tensor:
    """Writes the text plain decoding would write, in fewer forwards.

    Greedy decoding gives the same tokens; sampling draws from the same distribution (arXiv 2211.17192), whatever
    the drafts are worth.

    Args:
        model: a causal language model whose `config.tidar_config` says how it drafts.
        input_ids: [B, P] prompts, left-padded.
        draft_length: K, from 1 to the length the checkpoint was taught.
        seeds: one for each row; by default the device's global generator.
        attention_mask: [B, P], 0 for padding.
        position_ids: [B, uncached part of P].
        past_key_values: the cache of an earlier turn, a prefix of `input_ids`; a user's own is brought up to date.
        streamer: gets tokens as they are decided, 1-D; a draft too where it has `put_draft` (transformers'
            `TextDiffusionStreamer`); several rows where it has `put_row(row, ids)`.

    Returns:
        [B, P + N] ids, or `TiDARGenerateOutput` where `generation_config.return_dict_in_generate`.
    """
    pad_token_id = generation_config.pad_token_id
    tidar_config = model.config.tidar_config
    vocab_size = model.config.get_text_config().vocab_size
    excluded_id = tidar_config["mask_token_id"] if tidar_config["mask_token_id"] < vocab_size else None

    transcript = Transcript(input_ids, stopping_criteria, pad_token_id, draft_length, streamer)
    scores = Scores(logits_processor, transcript, excluded_id)
    choice = Sampled(scores, seeds) if generation_config.do_sample else Greedy(scores)
    has_own_cache = getattr(past_key_values, "_is_user_defined", False)
    returns_cache = has_own_cache or generation_config.return_dict_in_generate
    forward = DraftForward(model, draft_length, len(input_ids), attention_mask, past_key_values, returns_cache)
    statistics = Statistics(len(input_ids), draft_length)
    wants_scores = generation_config.return_dict_in_generate and (
        generation_config.output_scores or generation_config.output_logits
    )
    step_scores = StepScores(len(input_ids)) if wants_scores else None

    # 1. Prefill: the prompt decides the first token, and one block of masks drafts what follows it.
    target_logits = forward.prefill(input_ids, position_ids)
    decided_ids, num_decided = choice.first(target_logits)
    branch = torch.zeros_like(num_decided)
    counts = transcript.extend(decided_ids, num_decided)
    if step_scores:
        step_scores.add(transcript.active, counts, target_logits, choice.target_scores)
    while places := transcript.drop_ended():
        # 2. Finished rows leave the forward.
        if len(places) < len(decided_ids):
            forward.keep_rows(places)
            choice.keep_rows(places)
            decided_ids, num_decided, branch = decided_ids[places], num_decided[places], branch[places]
        # 3. The draft: the last decided token, then what the masks of the branch that came true predict.
        draft_ids = choice.draft(decided_ids, num_decided, forward.branch_logits(branch))
        transcript.show_draft(draft_ids)
        # 4. One forward verifies it, and drafts behind each token that may turn out to be the last accepted.
        target_logits = forward.verify_and_draft(draft_ids)
        decided_ids, num_decided = choice.verify(draft_ids, target_logits)
        branch = num_decided - 1
        # 5. Accepted tokens join the text and stay in the cache; the rest is overwritten.
        counts = transcript.extend(decided_ids, num_decided)
        forward.accept(num_decided, counts)
        statistics.add(transcript.active, counts)
        if step_scores:
            step_scores.add(transcript.active, counts, target_logits, choice.target_scores)
    if streamer is not None:
        streamer.end()
    cache = forward.final_cache(transcript.lengths) if returns_cache else None
    if has_own_cache:
        past_key_values.layers = cache.layers
    if not generation_config.return_dict_in_generate:
        return transcript.sequences()
    logits, token_scores = step_scores.steps(transcript.num_new_tokens) if step_scores else (None, None)
    return TiDARGenerateOutput(
        sequences=transcript.sequences(),
        scores=token_scores if generation_config.output_scores else None,
        logits=logits if generation_config.output_logits else None,
        past_key_values=cache,
        num_forwards=forward.num_forwards,
        num_prefill_forwards=forward.num_prefill_forwards,
        tokens_per_forward=statistics.tokens_per_forward(transcript.num_new_tokens),
        accepted_lengths=statistics.accepted_lengths,
    )
