"""Invariants of models with random shapes, decoded with random settings.

In fp64, so rounding, which differs between a single row and a batch, does not choose tokens.
"""

import random

import pytest
import torch

from helpers_marks import slow_but
from helpers_plain_wavefront import PlainRaven, published_run
from helpers_recurrent import left_padded, random_model

SEEDS = slow_but(range(4), range(10))


def drawn_model(draw: random.Random):
    form = draw.choice(["sandwich", "sandwich", "pre-norm", "post-norm"])
    num_heads, head_dim = draw.choice([(1, 2), (2, 6), (3, 8), (4, 4), (6, 2)])
    fields = {
        "n_embd": num_heads * head_dim,
        "n_heads": num_heads,
        "intermediate_size": draw.choice([2, 17, 40]),
        "vocab_size": draw.choice([5, 37, 300]),
        "n_layers_in_prelude": draw.choice([1, 2, 3]),
        "n_layers_in_recurrent_block": draw.choice([1, 2, 3, 5, 8]),
        "n_layers_in_coda": draw.choice([1, 2]),
        "mean_recurrence": draw.choice([1, 2, 3, 6, 9]),
        "tie_embeddings": draw.random() < 0.5,
        "bias": draw.random() < 0.3,
        "qk_bias": form == "sandwich" and draw.random() < 0.7,
        "norm_eps": draw.choice([1e-6, 1e-2]),
    }
    if form != "sandwich":
        key_heads = draw.choice([n for n in range(1, num_heads + 1) if num_heads % n == 0])
        fields |= {"block_form": form, "num_key_value_heads": key_heads}
        fields |= {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}}
    model = random_model(draw.randrange(1000), **fields).double()
    model.generation_config.pad_token_id = 0
    return model


def drawn_prompts(draw: random.Random, model) -> list[list[int]]:
    return [[draw.randrange(model.config.vocab_size) for _ in range(draw.choice([1, 1, 2, 9]))] for _ in range(3)]


def drawn_forcing(draw: random.Random) -> dict:
    """Diffusion forcing with settings out to their edges."""
    options = {
        "policy": "diffusion-forcing",
        "inner_recurrence": draw.choice([1, 2, 4, 7, 32]),
        "headway": draw.choice([1, 1, 2, 8]),
        "max_wavefront": draw.choice([1, 2, 5, 128]),
        "exit_threshold": draw.choice([0.0, 0.03, 1e9]),
        "embedding_ema": draw.choice([0.0, 0.1, 1.0]),
        "state_noise": draw.choice([0.0, 0.2, 1.0]),
        "noise_schedule": draw.choice(["constant", "dampened", "linear", "sqrt"]),
        "freeze_criterion": draw.choice(
            ["latent-difference", "latent-acceleration-1", "latent-acceleration-2", "token-stability", "fixed"]
        ),
        "kv_cache": draw.choice(["latest-only", 2, "every-recurrence"]),
        "init_scale": draw.choice([0.0, 1.0]),
    }
    if draw.random() < 0.3:
        options["max_recurrences"] = draw.choice([options["inner_recurrence"], 40])
    return options


def texts(model, prompts: list[list[int]], num_new: int, **options) -> list[list[int]]:
    inputs = left_padded(prompts)
    sequences = model.generate(**inputs, max_new_tokens=num_new, **options)
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


def until(row: list[int], end: int | None) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row


@pytest.mark.parametrize("seed", SEEDS)
def test_policies_that_verify_write_the_full_depth_text(seed):
    draw = random.Random(seed)
    model, num_new = drawn_model(draw), draw.choice([1, 2, 14])
    prompts, depth = drawn_prompts(draw, model), model.config.mean_recurrence
    drafts = sorted(draw.sample(range(1, depth), min(depth - 1, draw.choice([1, 2, 3])))) or None
    expected = [texts(model, [prompt], num_new, seed=7 + row)[0] for row, prompt in enumerate(prompts)]
    wavefront = {"draft_recurrences": drafts, "max_wavefront": draw.choice([1, 2, 3, 128])}
    speculation = {"draft_recurrences": drafts and drafts[:1], "draft_length": draw.choice([1, 3, 9])}
    for options in ({"policy": "exact", **wavefront}, {"policy": "self-speculative", **speculation}):
        options = {name: value for name, value in options.items() if value is not None}
        assert texts(model, prompts, num_new, seed=7, **options) == expected, options
        assert texts(model, prompts[:1], num_new, seed=7, **options) == expected[:1], options


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lossy_row_is_the_row_alone_ends_in_time_and_is_the_same_in_few_shapes(seed):
    draw = random.Random(100 + seed)
    model, num_new = drawn_model(draw), draw.choice([1, 2, 14])
    prompts = drawn_prompts(draw, model)
    end = draw.choice([None, draw.randrange(model.config.vocab_size)])
    for options in (drawn_forcing(draw), {"policy": "adaptive", "exit_threshold": draw.choice([0.0, 0.03, 1e9])}):
        options |= {"eos_token_id": end}
        static = options | {"cache_implementation": "static"}
        alone = [texts(model, [prompt], num_new, seed=3 + row, **options)[0] for row, prompt in enumerate(prompts)]

        assert all(len(row) == num_new or row[-1] == end for row in alone), options
        for together in (texts(model, prompts, num_new, seed=3, **form) for form in (options, static)):
            assert [until(row, end) for row in together] == alone, options
        assert texts(model, prompts[:1], num_new, seed=3, **static) == alone[:1], options


def drawn_published(draw: random.Random) -> dict:
    """Settings of the published sampler; a wavefront that is full stops its fixed rule with an error."""
    criterion = draw.choice(["latent-difference", "latent-acceleration-1", "latent-acceleration-2"] * 2 + HOST_CRITERIA)
    num_recurrences = draw.choice([1, 4, 9, 32])
    return {
        "num_recurrences": num_recurrences,
        "inner_recurrence": min(num_recurrences, draw.choice([1, 2, 3, 4, 8])),
        "exit_threshold": draw.choice([0.03, 0.1, 0.3, 0.8, 1e9]),
        "embedding_ema": draw.choice([0.0, 0.1, 0.5]),
        "state_noise": draw.choice([0.0, 0.0, 0.5]),
        "noise_schedule": draw.choice(["constant", "dampened", "sqrt"]),
        "max_wavefront": 128 if criterion == "fixed" else draw.choice([2, 3, 8, 128]),
        "freeze_criterion": criterion,
    }


HOST_CRITERIA = ["token-stability", "fixed"]


@pytest.mark.parametrize("seed", slow_but(range(5), range(12)))
def test_reference_compat_is_the_published_loop(seed):
    draw = random.Random(200 + seed)
    num_heads, head_dim = draw.choice([(1, 4), (2, 6), (4, 4)])
    fields = {
        "n_embd": num_heads * head_dim,
        "n_heads": num_heads,
        "vocab_size": draw.choice([5, 37, 300]),
        "n_layers_in_prelude": draw.choice([1, 2]),
        "n_layers_in_recurrent_block": draw.choice([1, 2, 3]),
        "n_layers_in_coda": draw.choice([1, 2]),
        "tie_embeddings": draw.random() < 0.5,
        "qk_bias": draw.random() < 0.7,
        "block_size": draw.choice([20, 60]),
    }
    model = random_model(draw.randrange(1000), **fields).double()
    with torch.no_grad():
        model.transformer["adapter"].weight.mul_(draw.choice([0.3, 0.6, 1.0]))  # states that settle, and that do not
    weights = {**model.state_dict(), "lm_head.weight": model.lm_head.weight}
    for _ in range(4):
        prompt = [draw.randrange(model.config.vocab_size) for _ in range(draw.choice([1, 3, 7]))]
        options, num_new = drawn_published(draw), draw.choice([1, 4, 12])
        kv_cache = draw.choice(["every-recurrence", "latest-only", 2])
        num_slots = {"every-recurrence": None, "latest-only": 1}.get(kv_cache, kv_cache)
        num_new = min(num_new, model.config.block_size - len(prompt))
        ends = {"eos_token_id": draw.randrange(model.config.vocab_size)} if draw.random() < 0.7 else {}
        common = {"policy": "diffusion-forcing", "reference_compat": True, "init_scale": 0.0, "max_steps": 50}
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=num_new,
            return_dict_in_generate=True,
            kv_cache=kv_cache,
            **common,
            **options,
            **ends,
        )

        raven = PlainRaven(weights, vars(model.config), num_slots and num_slots * fields["n_layers_in_recurrent_block"])
        expected = published_run(raven, prompt, num_new, eos_token_ids=tuple(ends.values()), max_steps=50, **options)

        assert output.sequences[0, len(prompt) :].tolist() == expected["tokens"], options
        assert output.num_steps == expected["num_steps"], options
        assert output.num_core_passes == expected["num_core_passes"]
        assert output.num_positions == expected["num_positions"]
        assert output.recurrences_per_position[0].tolist() == expected["recurrences"]
