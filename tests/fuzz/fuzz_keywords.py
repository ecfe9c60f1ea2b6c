"""Calls `generate` with random keywords: greedy text is plain decoding's, and what cannot be done is a ValueError.

    python tests/fuzz/fuzz_keywords.py FIRST COUNT [SECONDS]

A case is its number. Every failure is printed with its number and its keywords.
"""

import copy
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import WatermarkingConfig
from transformers.utils import logging

from helpers_tidar import FAMILIES, tiny_tidar

# Keyword: its values. Most calls leave most of them out.
OURS: dict[str, list[Any]] = {
    "draft_length": [0, 1, 2, 4, 5, -1, "x", 2.0, True],
    "num_branches": ["auto", "all", 1, 2, 4, 0, 9, "x", True],
    "seed": [0, 7, [1, 2], [1, 2, 3], -1, "x", 1.5],
    "exact": ["tie-safe", "x", True],
    "tie_margin": [0, 0.01, -1, "x"],
    "mask_embedding_id": [0, 3, 60, 61, -1, "x"],
    "packed_weights": [False, "x", 2],
    "draft_head": [False, "", 3],
}
STOCK: dict[str, list[Any]] = {
    "max_new_tokens": [1, 2, 7, 16, 40],
    "min_new_tokens": [1, 5, 50],
    "max_length": [6, 20],
    "do_sample": [True],
    "num_beams": [1, 2],
    "num_return_sequences": [1, 2],
    "temperature": [0.1, 1.0, 5.0],
    "top_k": [1, 5, 50],
    "top_p": [0.1, 0.9],
    "min_p": [0.1],
    "repetition_penalty": [0.5, 1.3],
    "no_repeat_ngram_size": [1, 2],
    "encoder_no_repeat_ngram_size": [2],
    "bad_words_ids": [[[5]], [[7, 8], [9]]],
    "suppress_tokens": [[4, 5, 6]],
    "begin_suppress_tokens": [[7, 8]],
    "sequence_bias": [{(5,): 3.0}],
    "forced_eos_token_id": [9],
    "eos_token_id": [9, [3, 5, 9]],
    "pad_token_id": [0, 9],
    "guidance_scale": [1.0, 2.0],
    "watermarking_config": [WatermarkingConfig(bias=2.0)],
    "renormalize_logits": [True],
    "remove_invalid_values": [True],
    "exponential_decay_length_penalty": [(3, 1.5)],
    "use_cache": [True, False],
    "cache_implementation": ["dynamic", "static", "quantized", "x"],
    "return_dict_in_generate": [True],
    "output_scores": [True],
    "output_logits": [True],
    "output_attentions": [True],
    "output_hidden_states": [True],
    "prefill_chunk_size": [3],
    "num_beam_groups": [1],
    "logits_to_keep": [1],
}


def with_stock_twin(model: Any) -> tuple[Any, Any]:
    """A drafting model, and the stock model of the same weights."""
    stock = model.stock_class(copy.deepcopy(model.config)).eval()
    stock.load_state_dict(model.state_dict())
    return model, stock


def drawn(choices: dict[str, list[Any]], mean: float, draw: random.Random) -> dict[str, Any]:
    chance = mean / len(choices)
    return {name: draw.choice(values) for name, values in choices.items() if draw.random() < chance}


def prompts_of(draw: random.Random) -> dict[str, torch.Tensor]:
    """One to three prompts of 1 to 12 tokens, padded on the left, or some of them only."""
    num_rows, length = draw.choice([1, 1, 2, 3]), draw.randrange(1, 13)
    ids = torch.tensor([[draw.randrange(1, 61) for _ in range(length)] for _ in range(num_rows)])
    mask = torch.ones_like(ids)
    if draw.random() < 0.5:
        for row in range(num_rows):
            mask[row, : draw.randrange(length)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def answer(call: Any, **keywords: Any) -> torch.Tensor | Exception:
    torch.manual_seed(0)
    try:
        found = call(**keywords)
    except Exception as error:  # judged by its type
        return error
    return found if isinstance(found, torch.Tensor) else found.sequences


def failure_of(number: int, models: dict[str, tuple[Any, Any]]) -> tuple[str | None, str]:
    """What went wrong with one case, or None; and its keywords."""
    draw = random.Random(number)
    family = draw.choice(sorted(models))
    (model, plain), inputs = models[family], prompts_of(draw)
    ours, stock = drawn(OURS, 1.5, draw), {"max_new_tokens": 9, "do_sample": False} | drawn(STOCK, 2.5, draw)
    if "max_length" in stock:
        del stock["max_new_tokens"]
    said = f"{family} {list(inputs['input_ids'].shape)} {ours | stock}"
    found = answer(model.generate, **inputs, **stock, **ours)
    expected = answer(plain.generate, **inputs, **stock)
    if isinstance(found, Exception):
        is_told = isinstance(found, ValueError) or type(found) is type(expected)
        return (None if is_told else f"raw {found!r}"[:300]), said
    if isinstance(expected, Exception):
        return (
            f"writes where plain decoding raises {expected!r}"[:300] if type(expected) is ValueError else None
        ), said
    if not stock.get("do_sample"):
        return (None if found.tolist() == expected.tolist() else f"{found.tolist()} is not {expected.tolist()}"), said
    is_text = found[:, : inputs["input_ids"].shape[1]].tolist() == expected[:, : inputs["input_ids"].shape[1]].tolist()
    return (None if is_text and found.ge(0).all() and found.lt(61).all() else f"sampled {found.tolist()}"), said


def run(first: int, count: int, seconds: float = float("inf")) -> tuple[int, list[str]]:
    """Runs cases until the count or the time is up; how many, and the failures."""
    logging.set_verbosity_error()
    failures, start, done = [], time.monotonic(), 0
    models = {family: with_stock_twin(tiny_tidar(family)) for family in FAMILIES}
    for number in range(first, first + count):
        if time.monotonic() - start > seconds:
            break
        failure, said = failure_of(number, models)
        if failure:
            failures.append(f"{number}: {said}: {failure}")
            print(failures[-1], flush=True)
        done += 1
    return done, failures


if __name__ == "__main__":
    torch.set_num_threads(1)
    done, failures = run(int(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:]))
    print(f"{done} calls, {len(failures)} failures")
    sys.exit(bool(failures))
