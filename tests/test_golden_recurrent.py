"""Every decoding record of the golden fixture: plain, adaptive, self-speculative and diffusion forcing."""

import functools

import pytest

from helpers_marks import slow_but
from helpers_recurrent import common_prefix, golden_model, keywords, kv_cache_of, new_tokens, prompt_ids, records

AR, DF = records()["ar"], list(enumerate(records()["df"]))
# Of the stalled runs, 400 steps each, those of narrow wavefronts.
REPEATED = [r for r in DF if not r[1]["stalled"] or r[1]["params"]["max_wavefront"] < 128]


def name(value):
    return f"{value[0]}-{value[1]['variant']}" if isinstance(value, tuple) else None


def name_of_plain(record):
    return f"{record['variant']}-{record['prompt']}-{record['num_steps']}-{record['cache']}"


@functools.cache
def plain_text(variant: str, prompt: str, num_recurrences: int, num_new: int) -> list[int]:
    """Greedy text decoded token by token with the cache that all the fixture's wavefronts share."""
    model = golden_model(variant)
    return new_tokens(model, prompt, num_new, num_recurrences=num_recurrences, init_scale=0.0, kv_cache="latest-only")


@pytest.mark.parametrize("record", slow_but(AR[::2], AR), ids=name_of_plain)
def test_plain_decoding_writes_the_references_text(record):
    tokens = new_tokens(
        golden_model(record["variant"]),
        record["prompt"],
        len(record["tokens"]),
        num_recurrences=record["num_steps"],
        init_scale=0.0,
        kv_cache=kv_cache_of(record["cache"]),
    )
    assert tokens == record["tokens"]


@pytest.mark.parametrize("record", records()["adaptive"], ids=lambda r: f"{r['variant']}-{r['exit_threshold']}")
def test_adaptive_decoding_writes_the_references_text(record):
    tokens = new_tokens(
        golden_model(record["variant"]),
        record["prompt"],
        len(record["tokens"]),
        policy="adaptive",
        num_recurrences=record["num_steps"],
        exit_threshold=record["exit_threshold"],
        init_scale=0.0,
        reference_compat=True,
    )
    assert tokens == record["tokens"]


@pytest.mark.parametrize("record", records()["speculative"], ids=lambda r: f"{r['variant']}-{r['draft_steps']}")
def test_self_speculative_decoding_writes_the_references_text(record):
    tokens = new_tokens(
        golden_model(record["variant"]),
        record["prompt"],
        len(record["tokens"]),
        policy="self-speculative",
        num_recurrences=record["num_steps"],
        draft_recurrences=record["draft_steps"],
        draft_length=record["lookahead"],
        init_scale=0.0,
        kv_cache="latest-only",
    )
    assert tokens == record["tokens"]


def reference_run(record: dict, **options):
    """The record's run of the reference, as `reference_compat` repeats it."""
    ids = prompt_ids(record["prompt"])
    common = {"max_new_tokens": record["N"], "return_dict_in_generate": True, "reference_compat": True}
    return golden_model(record["variant"]).generate(ids, **common, **keywords(record["params"]), **options)


@pytest.mark.parametrize("record", slow_but(REPEATED[::3], REPEATED), ids=name)
def test_reference_compat_repeats_the_reference_exactly(record):
    _, record = record
    output = reference_run(record, max_steps=400)

    assert output.sequences[0, prompt_ids(record["prompt"]).shape[1] :].tolist() == record["tokens"]
    assert output.num_steps == record["diffusion_steps"]
    assert output.num_core_passes == record["num_core_forward_passes"]
    assert output.num_positions == record["num_tokens_forward"]
    assert output.recurrences_per_position[0].tolist() == record["recurrence_per_position"]


@pytest.mark.parametrize("record", [r for r in DF if "trace" in r[1] and not r[1]["stalled"]], ids=name)
def test_reference_compat_repeats_the_reference_step_by_step(record):
    _, record = record
    output = reference_run(record, record_wavefront=True)

    for step, expected in zip(output.wavefront, record["trace"], strict=True):
        width = len(step.fed_ids)
        assert step.predicted_ids == expected["new_tokens"]
        assert step.start + width == expected["cache_len_before_clear"]
        assert width - step.num_frozen == expected["cleared"]


@pytest.mark.parametrize("record", slow_but(DF[::3], DF), ids=name)
def test_the_corrected_sampler_finishes_and_agrees_with_plain_decoding_at_least_as_long(record):
    _, record = record
    model, num_new = golden_model(record["variant"]), record["N"]
    options = keywords(record["params"])

    tokens = new_tokens(model, record["prompt"], num_new, **options)

    assert len(tokens) == num_new
    for num_recurrences in {32, options["num_recurrences"]}:
        plain = plain_text(record["variant"], record["prompt"], num_recurrences, num_new)
        assert common_prefix(tokens, plain) >= common_prefix(record["tokens"][:num_new], plain)
