"""What TiDAR's `generate` does on tiny random models: one case for each way to call it."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from frozen_runs import (
    AXES,
    CACHE,
    CACHES,
    HOWS,
    LEANS,
    NUM_NEW,
    STATIC,
    adapted,
    cache_keywords,
    gated,
    inputs,
    leaning,
    ran,
    recording_on_cpu,
    told_of,
)
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from helpers_tidar import VOCAB_SIZE, random_prompts, with_random_head
from wavedraft import TiDARForCausalLM
from wavedraft.generation import tidar


def decoded(family: str, how: str, branches: int | None, cache: str, adapter: str, rows: str, **more: Any) -> Any:
    """One case of the product of all axes; twice where steps are compiled or recorded: kept ones must do the same."""
    model = adapted(family, adapter)
    keywords = inputs(rows, family) | HOWS[how] | {"num_branches": branches} | cache_keywords(cache) | more
    if cache in ("dynamic", "static"):
        return ran(model, **keywords)
    torch._dynamo.reset()
    if cache == "compiled":
        return [ran(model, False, **keywords) for _ in range(2)]
    with recording_on_cpu():
        return [ran(model, False, **keywords) for _ in range(2)]


def product_cases() -> Iterator[tuple[str, Any]]:
    """The whole product for Llama, half of it compiled; of other families each fifth: every pair of values occurs."""
    for family in LEANS:
        for places in itertools.product(*(range(len(values)) for values in AXES.values())):
            is_compiled = AXES["cache"][places[2]] == "compiled"
            part = (2 if is_compiled else 1) if family == "llama" else 5
            if sum(places) % part == list(LEANS).index(family) % part:
                how, branches, cache, adapter, rows = (
                    values[place] for values, place in zip(AXES.values(), places, strict=True)
                )
                name = f"{family}, {how}, branches {branches or 'all'}, {cache}, {adapter}, {rows}"
                yield name, partial(decoded, family, how, branches, cache, adapter, rows)


class EndsAtMultiple(StoppingCriteria):
    """Ends a row whose length is a multiple of 11: it must be asked at every length."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] % 11 == 0)


class Watcher(BaseStreamer):
    """Keeps all that it is given, in order."""

    def __init__(self):
        self.seen: list[list] = []

    def put(self, value):
        self.seen.append(["put", value.tolist()])

    def end(self):
        self.seen.append(["end"])


class DraftWatcher(Watcher):
    def put_draft(self, value):
        self.seen.append(["draft", value.tolist()])


class RowWatcher(Watcher):
    def put_row(self, row, ids):
        self.seen.append(["row", row, ids.tolist()])


def letters() -> PreTrainedTokenizerFast:
    """One letter a token."""
    vocabulary = {chr(ord("A") + token): token for token in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def streamed(streamer_class: type, rows: str, **keywords: Any) -> dict[str, Any]:
    streamer = streamer_class()
    told = ran(leaning(), **inputs(rows), streamer=streamer, **keywords)
    return told | {"streamed": streamer.seen}


def in_two_turns(family: str, cache: str, rows: str, **keywords: Any) -> list:
    """A text, and a second one that goes on from its cache with three tokens more."""
    model, asked = leaning(family), inputs(rows, family) | {"do_sample": False} | cache_keywords(cache) | keywords
    asked |= {"eos_token_id": None, "max_new_tokens": 9}
    first = model.generate(**asked, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, random_prompts(len(first.sequences), 3, seed=5)], dim=1)
    asked["input_ids"] = longer
    if "attention_mask" in asked:
        mask = asked["attention_mask"]
        asked["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), longer.shape[1] - mask.shape[1])], dim=1)
    asked.pop("cache_implementation", None)
    told = told_of(first, 7)
    return [told, ran(model, **asked, **{CACHE: first[CACHE]})]


def on_stock(adapter: str = "bare", **keywords: Any) -> dict[str, Any]:
    """A stock model that drafts through `custom_generate`."""
    with TemporaryDirectory() as folder:
        leaning().save_pretrained(folder)
        stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapter == "gated":
        stock = gated(stock)
    return ran(stock, custom_generate=tidar, draft_copies=False, **inputs("one"), **keywords)


def saved_and_loaded(**keywords: Any) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        with_random_head(leaning(), size=0.3).save_pretrained(folder)
        files = sorted(path.name for path in Path(folder).iterdir() if path.suffix != ".py")
        return ran(TiDARForCausalLM.from_pretrained(folder).eval(), **inputs("one"), **keywords) | {"files": files}


def with_mask_inside(**keywords: Any) -> dict[str, Any]:
    """A mask token of the vocabulary, which is never written."""
    model = leaning()
    wanted = int(model.generate(random_prompts(1, 7), max_new_tokens=2, do_sample=False)[0, 8])
    model.config.tidar_config = {"draft_length": 4, "mask_token_id": wanted}
    return ran(model, **inputs("one"), **keywords)


def only_sequences(model: Any, **keywords: Any) -> Any:
    """Twice: `num_branches="auto"` measures first. What it drafts goes by the clock, its text does not."""
    return [model.generate(max_new_tokens=NUM_NEW, **keywords).tolist() for _ in range(2)]


PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 8},
    "bad_words_ids": {"bad_words_ids": [[46], [19, 20]]},
    "forced_eos": {"forced_eos_token_id": 20},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=1.5)},
    "temperature": {"do_sample": True, "seed": 5, "temperature": 0.7},
    "top_k": {"do_sample": True, "seed": 5, "top_k": 5},
    "top_p": {"do_sample": True, "seed": 5, "top_p": 0.8, "top_k": 0},
    "min_p": {"do_sample": True, "seed": 5, "min_p": 0.1, "temperature": 1.5},
    "penalty and temperature": {"do_sample": True, "seed": [4, 9, 2], "repetition_penalty": 1.2, "temperature": 1.3},
}


def processor_cases() -> Iterator[tuple[str, Any]]:
    for name, processor in PROCESSORS.items():
        for rows, branches, cache in (("one", None, "dynamic"), ("ragged", 2, "static"), ("ragged", 1, "recorded")):
            more = {"do_sample": False} | processor
            if rows == "one" and isinstance(more.get("seed"), list):
                more = more | {"seed": [4]}
            more |= {"output_scores": True, "output_logits": cache == "static"}
            yield f"{name}, {cache}, {rows}", partial(decoded, "llama", "greedy", branches, cache, "bare", rows, **more)
    for how, cache in itertools.product(HOWS, CACHES):
        more = {"output_scores": True, "output_logits": True}
        yield f"scores and logits, {how}, {cache}", partial(decoded, "qwen3", how, 2, cache, "gated", "ragged", **more)


def option_cases() -> Iterator[tuple[str, Any]]:
    """Draft lengths, packed weights, tie-safe decoding."""
    greedy, sampled = HOWS["greedy"], HOWS["sampled"]
    for length, cache in itertools.product((0, 1, 2, 3), ("dynamic", "static")):
        more = {"draft_length": length} | cache_keywords(cache)
        yield f"draft_length {length}, {cache}", lambda more=more: ran(leaning(), **inputs("ragged"), **greedy, **more)
        if length:
            yield (
                f"draft_length {length}, {cache}, sampled, head",
                lambda more=more: ran(adapted("qwen3", "head"), **inputs("ragged", "qwen3"), **sampled, **more),
            )
    for adapter, rows, cache in itertools.product(("bare", "gated"), ("one", "ragged"), ("dynamic", "static")):
        more = {"packed_weights": True} | cache_keywords(cache)
        yield (
            f"packed_weights, {adapter}, {rows}, {cache}",
            lambda adapter=adapter, rows=rows, more=more: ran(adapted("llama", adapter), **inputs(rows), **more),
        )
    for margin, rows, branches in itertools.product((None, 0.0, 0.3), ("one", "ragged"), (1, None)):
        more = greedy | {"exact": "tie-safe", "tie_margin": margin, "num_branches": branches}
        yield (
            f"tie-safe, margin {margin}, {rows}, branches {branches or 'all'}",
            lambda rows=rows, more=more: ran(adapted("llama", "gated"), **inputs(rows), **more),
        )


def family_cases() -> Iterator[tuple[str, Any]]:
    """Attention by eager products, and the clock's choice of branches."""

    def eager(family: str, **asked: Any) -> dict[str, Any]:
        return ran(leaning(family, attn_implementation="eager"), **inputs("ragged", family), **asked)

    def auto(family: str, **asked: Any) -> Any:
        asked |= inputs("ragged", family) | {"num_branches": "auto"}
        return only_sequences(adapted(family, "head"), **asked)

    for family, cache in itertools.product(LEANS, ("dynamic", "static")):
        asked = HOWS["greedy"] | cache_keywords(cache)
        yield f"eager attention, {family}, {cache}", partial(eager, family, **asked)
        if family in ("llama", "gemma2"):
            yield f"auto, {family}, {cache}", partial(auto, family, **asked)


def contract_cases() -> Iterator[tuple[str, Any]]:
    """What transformers' own `generate` promises: streams, stops, caches."""
    greedy = HOWS["greedy"]
    for kind, rows in ((Watcher, "one"), (DraftWatcher, "one"), (RowWatcher, "ragged")):
        for cache in ("dynamic", "static"):
            for name, how in HOWS.items():
                more = how | cache_keywords(cache)
                yield f"{kind.__name__}, {cache}, {name}", partial(streamed, kind, rows, **more)
        stops = StoppingCriteriaList([EndsAtMultiple()])
        yield f"{kind.__name__}, criterion", partial(streamed, kind, rows, **greedy, stopping_criteria=stops)
        yield f"{kind.__name__}, draft_length 0", partial(streamed, kind, rows, **greedy, draft_length=0)
    for rows, cache in itertools.product(("one", "ragged"), ("dynamic", "static")):
        stops = {"stop_strings": ["oo", "[A", "h["], "tokenizer": letters()} | cache_keywords(cache)
        yield f"stop strings, {rows}, {cache}", lambda rows=rows, stops=stops: ran(leaning(), **inputs(rows), **stops)
        criteria = {"stopping_criteria": StoppingCriteriaList([EndsAtMultiple()])} | cache_keywords(cache)
        yield f"criterion, {rows}, {cache}", lambda rows=rows, more=criteria: ran(leaning(), **inputs(rows), **more)
    for family, cache, rows in itertools.product(("llama", "qwen3", "mistral"), ("dynamic", "static"), AXES["rows"]):
        yield f"two turns, {family}, {cache}, {rows}", partial(in_two_turns, family, cache, rows)


def other_cases() -> Iterator[tuple[str, Any]]:
    """Stock models, saved ones, other models, and what transformers decodes by itself."""
    greedy, sampled = HOWS["greedy"], HOWS["sampled"]
    yield "stock", partial(on_stock, **greedy)
    yield "stock, sampled, static", partial(on_stock, **sampled, **STATIC)
    yield "stock, gated, branches 2", partial(on_stock, "gated", **greedy, num_branches=2)
    yield "saved and loaded", partial(saved_and_loaded, **greedy)
    yield "saved and loaded, without its head", partial(saved_and_loaded, **greedy, draft_head=False)
    yield "mask token of the vocabulary", partial(with_mask_inside, **greedy)
    yield "mask token of the vocabulary, sampled, static", partial(with_mask_inside, **sampled, **STATIC)
    plain: dict[str, dict[str, Any]] = {
        "beams": greedy | {"num_beams": 3},
        "beams, two texts": greedy | {"num_beams": 2, "num_return_sequences": 2},
        "prompt lookup": greedy | {"prompt_lookup_num_tokens": 3},
        "three texts, seeded": {"do_sample": True, "seed": 3, "num_return_sequences": 3},
        "hidden states": greedy | {"output_hidden_states": True},
        "no cache": greedy | {"use_cache": False},
        "one new token": greedy | {"max_new_tokens": 1},
        "no dictionary": greedy | {"return_dict_in_generate": False},
        "offset mask row": greedy | {"mask_embedding_id": 9},
    }
    for name, more in plain.items():
        yield name, lambda more=more: ran(leaning(), **inputs("one") | more)
    table = leaning().get_input_embeddings()
    embeds = {"inputs_embeds": table(random_prompts(1, 7)).detach()}
    yield "embeddings", lambda: ran(leaning(), False, **embeds, **greedy)


def cases() -> Iterator[tuple[str, Any]]:
    """Name and call of every case; each makes its model anew."""
    yield from product_cases()
    yield from processor_cases()
    yield from option_cases()
    yield from family_cases()
    yield from contract_cases()
    yield from other_cases()
