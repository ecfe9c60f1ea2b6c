"""The decode for a stock model: `model.generate(..., custom_generate=tidar)`."""

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from ..stock_model import CACHE, is_shared_by_ranks
from .decode_tidar import TiDARGenerateOutput, decode_tidar
from .draft_head import chosen_head
from .draftable import refuse_undraftable
from .options_tidar import TiDAROptions, given_beside, reason_for_plain_decoding


def tidar(
    model: Any,
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
    trust: float | None = None,
    draft_copies: bool | None = None,
    streamer: Any = None,
    synced_gpus: bool | None = None,
    **model_kwargs: Any,
) -> TiDARGenerateOutput | torch.Tensor:
    """The same decode for a stock model: `model.generate(..., custom_generate=tidar)`.

    A stock model drafts usefully with a gated adapter (`model.load_adapter`). Its config may hold a `tidar_config`, as
    that of a converted folder does, and must for causal blocks; else `draft_length` and `mask_embedding_id` must be
    given as the adapter was taught. transformers hands no streamer, tokenizer, `assistant_model` or `synced_gpus` to a
    custom decode: pass `custom_generate=functools.partial(tidar, streamer=streamer)`, and for stop strings
    `stopping_criteria=[StopStringCriteria(tokenizer, ["stop"])]`.

    Args:
        mask_embedding_id: the row of the embedding table that masks read.
        streamer: as of `decode_tidar`; it gets the prompt first.
        synced_gpus: whether ranks share the model, which is refused; where absent, told by the model. False where each
            rank has gathered all of it.
        others: as in `generate` of our own classes.
    """
    refuse_undraftable(type(model), model.config, model)
    given: dict[str, Any] = {"draft_length": draft_length, "num_branches": num_branches, "seed": seed}
    given |= {"exact": exact, "tie_margin": tie_margin, "mask_embedding_id": mask_embedding_id}
    given |= {"packed_weights": packed_weights, "draft_head": draft_head, "trust": trust, "draft_copies": draft_copies}
    for name, value in given.items():
        if value is not None:
            setattr(generation_config, name, value)
    options = TiDAROptions.of(generation_config, model.config)
    is_shared = is_shared_by_ranks(model) if synced_gpus is None else synced_gpus
    refuse_plain_decoding(model, options, generation_config, is_shared, model_kwargs, input_ids, logits_processor)
    chosen_head(model, options.draft_head)
    used = {name: model_kwargs.get(name) for name in ("attention_mask", "position_ids")}
    used |= {"given": given_beside(model_kwargs), "past_key_values": model_kwargs.get(CACHE)}
    if streamer is not None:
        streamer.put(input_ids.cpu())
    return decode_tidar(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        options=options,
        streamer=streamer,
        **used,
    )


def refuse_plain_decoding(
    model: Any,
    options: TiDAROptions,
    generation_config: GenerationConfig,
    is_shared: bool,
    model_kwargs: dict[str, Any],
    input_ids: torch.Tensor,
    processors: LogitsProcessorList,
) -> None:
    """Raises where nothing would be drafted: a stock model decodes plainly without this function."""
    if not options.draft_length:
        raise ValueError(
            "`draft_length` must be at least 1 with `custom_generate=tidar`. Leave it out to decode plainly."
        )
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"`num_beams` must be 1 with `custom_generate=tidar`, but is {generation_config.num_beams}: a draft "
            "continues one text, not several. Leave `custom_generate` out to search with beams and without drafts."
        )
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"`custom_generate=tidar` searches greedily or samples, but other keywords ask for a {mode.value}. Leave "
            f"them or `custom_generate` out."
        )
    if reason := reason_for_plain_decoding(model, generation_config, is_shared, model_kwargs, input_ids, processors):
        raise ValueError(f"`custom_generate=tidar` cannot draft: {reason}. Leave it out to decode plainly.")
