"""How one decodes with TiDAR: the keywords `generate` and `generation_config.json` take beside the stock ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.utils import logging

from ..execution.gated_linear import told_by_row
from ..processed_scores import PURE
from ..stock_model import CACHE, CACHE_NAMES, has_states, is_composite, longest_in_rotary_table, num_columns_of
from .draftable import reason_of_layers

logger = logging.get_logger(__name__)
ACCEPTANCE = "draft_acceptance"  # of a generation config: what an evaluation found

# Keywords of a forward that drafts read, and the caches that they go on from.
READ_KEYWORDS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "tokenizer", *CACHE_NAMES}
READ_CACHES = {"DynamicCache", "DummyLayer", "DynamicLayer", "DynamicSlidingWindowLayer", "StaticCache", "StaticLayer"}
READ_CACHES |= {"LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer"}
TIE_MARGINS = {torch.bfloat16: 0.5, torch.float16: 0.0625, torch.float32: 0.001}


@dataclass(frozen=True)
class TiDAROptions:
    """
    Drafting asks a caller's own `logits_processor` and `prefix_allowed_tokens_fn` as plain decoding does: each prefix
    of the text once, in order. Rows of a batch then advance together.

    Args:
        draft_length: K, tokens drafted at a time; by default, and at most, as taught. 0 decodes without drafts.
        num_branches: "auto" (the default) chooses K and B for each step: the most expected tokens a second by the
            steps seen so far. Where drafts do not pay, it rarely tries one. An integer from 1 to K: each step prepares
            the next draft for the B likeliest numbers of accepted tokens. After another outcome a shorter draft is
            left, or none. "all": each number, as in the paper. With `seed`, by default 1: "auto" goes by the clock.
        seed: for sampling: one integer for each row, whose text then does not depend on its batch; s stands for s + b
            in row b. By default the device's global generator draws.
        exact: "tie-safe", for greedy decoding: forwards of one token decide near-ties, as in plain decoding. By default
            wide forwards do, which round differently, above all in half precision.
        tie_margin: with `exact`, the difference of the two best processed scores below which they are nearly tied, 0
            or more; by default 0.5 in bfloat16, 0.0625 in float16, 0.001 in float32. 0 asks for no such forward.
        mask_embedding_id: the row of the embedding table that masks read; by default the checkpoint's.
        excluded_id: an id that is never generated: a mask token inside the vocabulary.
        is_static: `cache_implementation="static"`: every step has one shape, over a cache with room for the longest
            text, or for `max_cache_len` tokens. Its layers can be compiled: on an accelerator unless
            `disable_compile`, on a CPU with a `compile_config`. On a GPU a step becomes one CUDA graph, unless the
            config's `mode` has none.
        packed_weights: for bfloat16 or float32 on a CPU: linear layers read a second copy of their weights, in oneDNN's
            order. Their products round differently from a stock model's (in float32 only for several tokens). By
            default drafting reads them where the CPU has such products and the weights fit eight times into memory.
        draft_acceptance: how often each slot after the first stood after those before it in an evaluation: what "auto"
            expects at first. In generation_config.json: {"chances": [...], "num_prompts": ...}.
        draft_head: a folder or Hub repository with a stock model's draft head, read once; False drafts without. By
            default the model's own, if any.
        trust: from 0 to 1, how much the model's own logits A count beside those of the masks, D: a token is decided by
            trust * A + (1 - trust) * D (the beta of arXiv 2511.08923). D are the logits of the first mask of the block
            that saw the same tokens, so every branch is drafted: `num_branches` is "all". Greedy decoding only. The
            first token after a prompt is decided by A alone. Below 1 the text is not plain decoding's. By default 1.
        draft_copies: True (the default): where a text repeats itself, what followed there is the draft if more of it is
            expected to stand than of the masks'. False drafts by masks alone.
    """

    draft_length: int
    num_branches: int | str
    seed: int | list[int] | None = None
    exact: str | None = None
    tie_margin: float | None = None
    mask_embedding_id: int = 0
    excluded_id: int | None = None
    is_static: bool = False
    packed_weights: bool | None = None
    draft_head: str | bool | None = None
    draft_acceptance: tuple[float, ...] | None = None
    trust: float = 1.0
    draft_copies: bool = True

    KEYWORDS = (
        "draft_length",
        "num_branches",
        "seed",
        "mask_embedding_id",
        "exact",
        "tie_margin",
        "packed_weights",
        "draft_head",
        "trust",
        "draft_copies",
    )

    @classmethod
    def of(cls, generation_config: Any, config: Any, taught: dict[str, int] | None = None) -> "TiDAROptions":
        """Reads and checks the options of one call. `taught` stands in for a missing `config.tidar_config`.

        Raises:
            ValueError: an option is out of range.
        """
        given = {name: getattr(generation_config, name, None) for name in cls.KEYWORDS}
        taught = getattr(config, "tidar_config", None) or taught or _taught_by_keywords(given, config)
        vocab_size, token = config.get_text_config().vocab_size, taught["mask_token_id"]
        is_inside = taught.get("mask_embedding_id") in (None, token)  # else the mask is input-only
        draft_length = _draft_length(given["draft_length"], taught["draft_length"])
        given["mask_embedding_id"] = _mask_row(given["mask_embedding_id"], taught, vocab_size)
        given["seed"] = _seed(given["seed"])
        given["trust"] = _trust(given, draft_length, generation_config)
        given["num_branches"] = _num_branches(given["num_branches"], draft_length, generation_config)
        _check_exact(given["exact"], given["tie_margin"], generation_config)
        is_static = generation_config.cache_implementation == "static"
        if draft_length:
            _check_static(is_static, given["exact"], generation_config)
            if not _is_integer(size := generation_config.prefill_chunk_size or 1, 1, 2**31):
                raise ValueError(f"`prefill_chunk_size` must be an integer of 1 or more, but is {size!r}.")
        given["draft_copies"] = True if given["draft_copies"] is None else given["draft_copies"]
        _check_weights_and_drafts(given["packed_weights"], given["draft_head"], given["draft_copies"])
        return cls(
            **given | {"draft_length": draft_length},
            excluded_id=token if is_inside and token < vocab_size else None,
            is_static=is_static,
            draft_acceptance=_acceptance(generation_config),
        )

    @property
    def is_untaught(self) -> bool:
        """Whether the caller leaves it to us how to draft, and no drafted token has stood yet."""
        return self.num_branches == "auto" and bool(self.draft_acceptance) and not any(self.draft_acceptance)

    @property
    def num_queries(self) -> int:
        """Of the widest step: a draft, and a block of masks for each branch."""
        num_branches = self.draft_length if isinstance(self.num_branches, str) else self.num_branches
        return self.draft_length * (1 + num_branches)

    def tie_margin_of(self, dtype: torch.dtype) -> float:
        """The difference of the two best scores under which wide forwards may order them differently from forwards of
        one token. In bfloat16 it moved by up to 0.375 at 336 tokens of SmolLM2-135M; the others follow from their
        rounding."""
        return TIE_MARGINS.get(dtype, TIE_MARGINS[torch.bfloat16]) if self.tie_margin is None else self.tie_margin

    def seeds(self, batch_size: int) -> list[int] | None:
        """One seed a row, or None."""
        if self.seed is None:
            return None
        if isinstance(self.seed, int):
            return [self.seed + row for row in range(batch_size)]
        if len(self.seed) != batch_size:
            raise ValueError(
                f"`seed` must be one integer or one for each of the {batch_size} rows of the batch (prompts times "
                f"`num_return_sequences`), but has {len(self.seed)} of them."
            )
        return self.seed


def _taught_by_keywords(given: dict[str, Any], config: Any) -> dict[str, int]:
    if given["draft_length"] is None or given["mask_embedding_id"] is None:
        raise ValueError(
            f"This {config.model_type!r} config has no `tidar_config`, so both `draft_length` and "
            "`mask_embedding_id` must be given, as they were when its adapter was taught. Or convert the "
            "checkpoint: `wavedraft convert SOURCE TARGET`."
        )
    return given | {"mask_token_id": config.get_text_config().vocab_size}


def _draft_length(given: Any, longest: int) -> int:
    draft_length = longest if given is None else given
    if not _is_integer(draft_length, 0, longest):
        raise ValueError(
            f"`draft_length` must be an integer between 1 and {longest}, the length this checkpoint was taught to "
            f"draft (`config.tidar_config.draft_length`), or 0 to decode without drafts, but is {draft_length!r}."
        )
    return draft_length


def _mask_row(given: Any, taught: dict[str, int], vocab_size: int) -> int:
    row = next(row for row in (given, taught.get("mask_embedding_id"), taught["mask_token_id"]) if row is not None)
    if not _is_integer(row, 0, vocab_size - 1):
        raise ValueError(
            f"`mask_embedding_id` must be a row of the embedding table, from 0 to {vocab_size - 1} "
            f"(`config.vocab_size` is {vocab_size}), but is {row!r}."
        )
    return row


def _seed(given: Any) -> int | list[int] | None:
    seeds = given if isinstance(given, list | tuple) else [0 if given is None else given]
    if not all(_is_integer(one, 0, 2**63 - 1) for one in seeds):
        raise ValueError(f"`seed` must be an integer from 0 to 2^63 - 1, or one for each row, but is {given!r}.")
    return list(given) if isinstance(given, tuple) else given


def _num_branches(given: Any, draft_length: int, generation_config: Any) -> int | str:
    is_seeded = generation_config.do_sample and getattr(generation_config, "seed", None) is not None
    if given is None:
        return 1 if is_seeded else "auto"
    if given == "auto" and draft_length and is_seeded:
        raise ValueError(
            "`seed` promises the same sampled text again, but `num_branches='auto'` lets the clock decide what is "
            "drafted, and drafts decide which draw a token comes from. Give a number of branches, or no seed."
        )
    if draft_length and given not in ("auto", "all") and not _is_integer(given, 1, draft_length):
        raise ValueError(
            f"`num_branches` must be 'auto', 'all' or an integer from 1 to {draft_length}, the `draft_length` of this "
            f"call: one for each number of tokens that may be accepted. It is {given!r}."
        )
    return draft_length if given == "all" else given


def _trust(given: dict[str, Any], draft_length: int, generation_config: Any) -> float:
    """Below 1 every branch is needed: without `num_branches` among the `given`, it becomes "all"."""
    trust, branches, exact = 1.0 if given["trust"] is None else given["trust"], given["num_branches"], given["exact"]
    if isinstance(trust, bool) or not isinstance(trust, int | float) or not 0 <= trust <= 1:
        raise ValueError(f"`trust` must be a number from 0 to 1, but is {trust!r}.")
    if trust == 1 or not draft_length:  # without drafts, the text is plain decoding's
        return 1.0
    problem = None
    if branches not in (None, "all", draft_length):
        problem = f"a mask after each number of tokens: `num_branches` must be 'all', but is {branches!r}"
    elif generation_config.do_sample:
        problem = "greedy decoding: no rule is written yet that samples from the blend"
    elif exact:
        problem = f"another text than plain decoding's, which `exact={exact!r}` promises"
    if problem:
        raise ValueError(f"`trust={trust}` needs {problem}. Leave one of them out.")
    given["num_branches"] = "all"
    return float(trust)


def _check_static(is_static: bool, exact: Any, generation_config: Any) -> None:
    asks_to_compile = generation_config.compile_config is not None and not generation_config.disable_compile
    if asks_to_compile and generation_config.cache_implementation in (None, "dynamic"):
        logger.warning_once(
            "`compile_config` is left aside: it compiles steps of one shape. Give `cache_implementation='static'` too."
        )
    if is_static and exact:
        raise ValueError(
            f"`exact={exact!r}` runs steps of several shapes, and `cache_implementation='static'` has one. Leave "
            "either out."
        )


def _check_weights_and_drafts(packed_weights: Any, head: Any, copies: Any) -> None:
    for name, given in (("packed_weights", packed_weights or False), ("draft_copies", copies)):
        if not isinstance(given, bool):
            raise ValueError(f"`{name}` must be True or False, but is {given!r}.")
    if head is not None and head is not False and not (isinstance(head, str) and head):
        raise ValueError(f"`draft_head` must be a folder or Hub repository that has one, or False, but is {head!r}.")


def _acceptance(generation_config: Any) -> tuple[float, ...] | None:
    record = getattr(generation_config, ACCEPTANCE, None)
    if record is None:
        return None
    chances = record.get("chances") if isinstance(record, dict) else None
    if not isinstance(chances, list) or not all(isinstance(x, float | int) and 0 <= x <= 1 for x in chances):
        raise ValueError(
            f"`draft_acceptance` must be a dictionary with a list of `chances` from 0 to 1, but is {record!r}. Leave "
            "it out of generation_config.json to begin without a record."
        )
    return tuple(chances)


def _check_exact(exact: Any, tie_margin: Any, generation_config: Any) -> None:
    if exact not in (None, "tie-safe"):
        raise ValueError(f"`exact` must be 'tie-safe' or None, but is {exact!r}.")
    if exact and generation_config.do_sample:
        raise ValueError(
            f"`exact={exact!r}` is for greedy decoding: sampled texts share a distribution, not their tokens. Leave it "
            "out, or pass `do_sample=False`."
        )
    if tie_margin is None:
        return
    if not exact:
        raise ValueError(f"`tie_margin` is {tie_margin!r}, but only `exact='tie-safe'` reads it. Give both or neither.")
    if isinstance(tie_margin, bool) or not isinstance(tie_margin, int | float) or not tie_margin >= 0:
        raise ValueError(f"`tie_margin` must be a number of 0 or more, a difference of scores, but is {tie_margin!r}.")


def reason_for_plain_decoding(
    model: Any,
    generation_config: Any,
    synced_gpus: bool,
    model_kwargs: dict[str, Any],
    input_ids: Tensor,
    processors: Sequence[Any],
) -> str | None:
    """What drafting forwards cannot do, of all that `generate` was asked for; usually None."""
    longest = longest_in_rotary_table(model.config.get_text_config())
    if longest is not None and generation_config.max_length > longest:
        return f"rotary positions change where a text passes {longest} tokens, and `max_length` allows that"
    for processor in processors:
        if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            return "guidance (`guidance_scale`) runs the model at each token"
        if getattr(generation_config, "exact", None) and type(processor) not in PURE:
            return f"{type(processor).__name__} may be asked once a token, and `exact` asks again where scores tie"
    if synced_gpus:
        return "ranks that share a model (`synced_gpus`: FSDP, ZeRO-3) must run the same number of forwards"
    if generation_config.is_assistant:
        return "it drafts for another model, which counts its tokens one by one"
    if not model_kwargs.get("use_cache", True):
        return "there is no cache"
    if generation_config.cache_implementation not in (None, "dynamic", "static"):
        return f"the cache is of the kind {generation_config.cache_implementation!r}"
    if (unread := given_beside(model_kwargs)) and not is_composite(model.config):
        return f"`{next(iter(unread))}` is for forwards of one token"
    cache, mask, positions = (model_kwargs.get(name) for name in (CACHE, "attention_mask", "position_ids"))
    num_cached = 0 if cache is None else cache.get_seq_length()
    num_unread = input_ids.shape[1] - num_cached
    if num_columns_of(input_ids, mask, generation_config) != input_ids.shape[1] or num_unread < 1:
        return "`input_ids` are not whole texts, longer than the cache and as long as the mask"
    if num_cached:
        kinds = {type(part).__name__ for part in (cache, *getattr(cache, "layers", ()))} - READ_CACHES
        if kinds or cache.offloading:
            return f"the cache handed in is of another kind ({', '.join(kinds) or 'offloaded'})"
        if {len(layer.keys) for layer in cache.layers if getattr(layer, "keys", None) is not None} != {len(input_ids)}:
            return "the cache handed in has other rows"
    shape = (1, num_unread) if positions is None else positions.shape[-2:]  # in front: text, time, height, width
    if positions is not None and positions.ndim > 2 and not is_composite(model.config):
        shape = positions.shape
    if len(shape) != 2 or shape[0] not in (1, len(input_ids)) or shape[1] < num_unread:
        return f"`position_ids` are {[*shape]} for {[len(input_ids), num_unread]} tokens"
    if mask is not None and not mask[:, -1].all():
        return "a prompt ends on padding, which belongs on the left (`tokenizer.padding_side = 'left'`)"
    return _reason_of_model(model) or _reason_of_states(model, generation_config, cache)


def given_beside(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What was given to the model besides text: images, and what says where they are."""
    return {name: value for name, value in model_kwargs.items() if name not in READ_KEYWORDS and value is not None}


def _reason_of_model(model: Any) -> str | None:
    """What drafting forwards cannot do with this model; usually None."""
    of_peft = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)  # while PEFT generates
    if getattr(getattr(of_peft, "active_peft_config", None), "is_prompt_learning", False):
        return "the adapter puts virtual tokens before the prompt"
    quantization = getattr(model.config, "quantization_config", None)
    if getattr(quantization, "load_in_8bit", False) and quantization.llm_int8_threshold > 0:
        return (
            "bitsandbytes' 8-bit layers choose outliers over all tokens of a forward, masks too. Load the model with "
            "`llm_int8_threshold=0.0` to draft"
        )
    return reason_of_layers(model)


def _reason_of_states(model: Any, generation_config: Any, cache: Any) -> str | None:
    """What layers that keep a state cannot do; usually None."""
    if not has_states(model.config):
        return None
    if getattr(generation_config, "exact", None):
        return "`exact` reads tokens again, but layers of this model keep a state, which cannot take a token back"
    if generation_config.cache_implementation == "static":
        return "layers of this model keep a state, which steps of one shape cannot advance"
    if any(getattr(layer, "record_past", False) for layer in getattr(cache, "layers", ())):
        return "the cache handed in records the past of its states"
    return "rows have adapters of their own, and layers keep a state" if told_by_row(model) else None


def say_what_is_idle(given: dict[str, Any], options: TiDAROptions, do_sample: bool) -> None:
    """Warns of keywords that change nothing in this call. `trust` is refused instead."""
    if not options.draft_length:
        refuse_trust(given.get("trust"), "`draft_length` is 0")
    said = {name for name, value in given.items() if value is not None}
    if not options.draft_length and (idle := sorted(said - {"draft_length", "seed", "packed_weights"})):
        names = ", ".join(f"`{name}`" for name in idle) + (" is" if len(idle) == 1 else " are")
        logger.warning_once(f"{names} left aside: `draft_length=0` decodes without drafts.")
    if "seed" in said and not do_sample:
        logger.warning_once("`seed` is left aside: greedy decoding draws nothing.")


def refuse_trust(trust: float | None, reason: str) -> None:
    """Refuses `trust` below 1 where nothing is drafted: the text would be another one than was asked for."""
    if trust not in (None, 1):
        raise ValueError(f"`trust` must be 1 where nothing is drafted ({reason}), but is {trust!r}. Leave it out.")


def refuse_seed(options: TiDAROptions, reason: str) -> None:
    """Refuses a seed where plain decoding samples."""
    if options.seed is not None:
        raise ValueError(
            f"`seed` must be left out where plain decoding samples ({reason}), but is {options.seed}: transformers' "
            "own loop draws from the global generator. Call `torch.manual_seed`, or draft."
        )


def _is_integer(value: Any, smallest: int, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest
