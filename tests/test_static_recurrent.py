"""Static caches and compiled steps write the same text as growing caches, in shapes that do not depend on the text."""

import copy
import gc
import shutil
import weakref

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from helpers_marks import slow_but
from helpers_recurrent import PROMPTS, left_padded, random_model
from helpers_step_graph import Recording
from wavedraft.generation.kept_with_model import kept_with
from wavedraft.generation.step_graph import StepGraphs
from wavedraft.generation.stock_model import CACHE
from wavedraft.modeling_recurrent import generation_recurrent, static_recurrent
from wavedraft.modeling_recurrent.static_recurrent import (
    STEPS_A_CALL,
    CompiledParts,
    StaticParts,
    StaticRecurrentCache,
    attend_by_products,
    attend_by_sums,
)
from wavedraft.modeling_recurrent.windows_recurrent import eager_attention

DECODES = {
    "plain": {},
    "plain, shared cache": {"kv_cache": "latest-only"},
    "adaptive": {"policy": "adaptive"},
    "self-speculative": {"policy": "self-speculative"},
    "diffusion forcing": {"preset": "diffusion-forcing-r4"},
    "diffusion forcing, noise and headway": {"preset": "diffusion-forcing-r2", "headway": 3, "embedding_ema": 0.5},
}
QUICK = {"plain", "self-speculative", "diffusion forcing"}


def exact_model(seed: int, **changes):
    """In fp64, so that not even a wavefront that never comes to rest makes its rounding errors into other tokens."""
    model = random_model(seed, block_size=400, **changes).double()
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("decode", slow_but(QUICK, DECODES))
def test_a_static_cache_writes_the_same_text(decode):
    model = exact_model(2)
    for inputs in ({"input_ids": torch.tensor([PROMPTS[0]])}, left_padded(PROMPTS)):
        options = {**inputs, "max_new_tokens": 20, "eos_token_id": 3, "seed": 1, **DECODES[decode]}
        options |= {"return_dict_in_generate": True}
        if "policy" not in DECODES[decode] and "preset" not in DECODES[decode]:
            options |= {"do_sample": False}
        expected, output = (model.generate(**options, **more) for more in ({}, {"cache_implementation": "static"}))

        assert output.sequences.tolist() == expected.sequences.tolist()
        assert output.num_core_passes == expected.num_core_passes
        assert output.recurrences_per_position.tolist() == expected.recurrences_per_position.tolist()
        assert output[CACHE].lengths == expected[CACHE].lengths


@pytest.mark.parametrize("decode", slow_but(QUICK, DECODES))
def test_shapes_do_not_change_with_the_text_so_nothing_is_compiled_twice(decode):
    model = exact_model(1, n_layers_in_prelude=1, n_layers_in_recurrent_block=1, n_layers_in_coda=1)
    compiling = {"cache_implementation": "static", "compile_config": CompileConfig()}
    compiling["compile_config"].backend = "eager"
    options = {"seed": 0, "max_wavefront": 8, **DECODES[decode]} if "preset" in DECODES[decode] else DECODES[decode]
    torch._dynamo.reset()
    counters.clear()
    model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=20, **options, **compiling)
    assert counters["stats"]["unique_graphs"] >= (1 if "preset" in options else 3)  # a whole step, or each part
    counters.clear()

    for prompt, num_new in ((PROMPTS[0], 24), (PROMPTS[1], 31), (PROMPTS[0] * 5, 40)):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=num_new, **options)
        assert model.generate(ids, max_new_tokens=num_new, **options, **compiling).tolist() == expected.tolist()

    assert counters["stats"]["unique_graphs"] == 0 and not counters["recompiles"]


@pytest.mark.parametrize("decode", slow_but({"plain", "diffusion forcing"}, DECODES))
def test_recorded_calls_write_the_same_text_and_a_wavefronts_step_is_one_graph(decode, monkeypatch):
    monkeypatch.setattr(generation_recurrent, "is_captured", lambda model, config: True)
    monkeypatch.setattr(StepGraphs, "record", Recording)
    monkeypatch.setattr(static_recurrent, "compiled_for", lambda model, function, shape, options: function)
    model = exact_model(3, n_layers_in_prelude=1, n_layers_in_recurrent_block=1, n_layers_in_coda=1)
    for inputs in ({"input_ids": torch.tensor([PROMPTS[0]])}, left_padded(PROMPTS)):
        options = {**inputs, "max_new_tokens": 20, "eos_token_id": 3, "seed": 1, "max_wavefront": 8, **DECODES[decode]}
        if "preset" not in options:
            options.pop("max_wavefront")
        expected = model.generate(**options)
        Recording.num_recorded = Recording.num_replays = 0
        output = model.generate(**options, return_dict_in_generate=True, **compiling_eagerly())
        assert output.sequences.tolist() == expected.tolist()
        assert Recording.num_replays > 4
        if decode == "diffusion forcing":  # one graph for each number of rows, since all wavefronts have one width
            assert Recording.num_recorded <= len(inputs["input_ids"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_steps_write_the_same_text_with_whatever_weights_the_model_has():
    """Only the real compiler's code could hold weights, or round a narrow and a wide step to another text."""
    shape = {"n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 1, "n_layers_in_coda": 1}
    model, ids = random_model(0, **shape), torch.tensor([PROMPTS[0]])
    forcing = {"preset": "diffusion-forcing-r4", "max_wavefront": 8}
    modes = [({"kv_cache": "latest-only"}, "inductor"), (forcing, "inductor")]
    modes += [({"policy": "adaptive"}, "aot_eager"), ({"policy": "self-speculative"}, "aot_eager")]
    texts = []
    for seed in (0, 1):  # steps of both widths are compiled once for all modes, and not again for other weights
        model.load_state_dict(random_model(seed, **shape).state_dict())
        for options, backend in modes:
            options = {**options, "max_new_tokens": 16}
            texts.append(model.generate(ids, **options).tolist())
            compiling = {"cache_implementation": "static", "compile_config": CompileConfig()}
            compiling["compile_config"].backend = backend
            counters.clear()
            assert model.generate(ids, **options, **compiling).tolist() == texts[-1], (seed, options)
            assert seed == 0 or counters["stats"]["unique_graphs"] == 0
    assert texts[0] != texts[4]


@pytest.mark.parametrize("order", [["padded", "unpadded"], ["unpadded", "padded"]])
def test_a_part_compiled_for_rows_with_padding_is_another_than_without(order):
    model, ids = exact_model(0), torch.tensor([[5], [6]])
    cache = StaticRecurrentCache(model.config, 2, 20, 1, torch.float64, "cpu")
    cache.lengths = [4, 4]
    masks = {"padded": torch.tensor([[0, 0, 1, 1, 1], [1] * 5]), "unpadded": None}
    torch._dynamo.reset()
    compiled = CompiledParts(model, {"backend": "eager"})
    results = {}
    for name in order:
        for parts in (StaticParts(model, None), StaticParts(model, compiled)):
            window = parts.window_behind(masks[name], torch.tensor([[4], [4]]), cache)
            with torch.no_grad():
                results[name, parts.compiled] = parts.prelude(ids, window)
    assert (results["padded", None] - results["unpadded", None])[0].abs().max() > 1e-3
    for name in order:
        assert torch.equal(results[name, None], results[name, compiled])


def compiling_eagerly() -> dict:
    config = CompileConfig()
    config.backend = "eager"
    return {"cache_implementation": "static", "compile_config": config}


def test_a_model_changed_between_decodes_is_noticed_and_two_models_take_turns():
    """Later calls of one decode skip torch's checks; the first ones do not."""
    shape = {"n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 1, "n_layers_in_coda": 1}
    one, other = exact_model(0, **shape), exact_model(1, **shape)
    ids, options = torch.tensor([PROMPTS[0]]), {"max_new_tokens": 8, "policy": "adaptive"}

    def agree(model):
        expected = model.generate(ids, **options).tolist()
        assert model.generate(ids, **options, **compiling_eagerly()).tolist() == expected

    for model in (one, other, one):
        agree(model)
    one.transformer["core_block"][0].mlp.proj.weight.data.mul_(3)
    agree(one)
    one.float()
    agree(one)
    one.set_attn_implementation("eager")
    agree(one)
    with torch.inference_mode():
        agree(other)


@pytest.mark.parametrize("num_recurrences", slow_but({1}, (1, 2 * STEPS_A_CALL + 1)))
def test_several_core_steps_of_a_call_are_those_steps_one_by_one(num_recurrences):
    model = exact_model(0, n_layers_in_prelude=1, n_layers_in_recurrent_block=1, n_layers_in_coda=1)
    options = {"max_new_tokens": 6, "num_recurrences": num_recurrences, "do_sample": False}
    for policy in ({}, {"policy": "self-speculative", "draft_recurrences": [1]}):
        for inputs in ({"input_ids": torch.tensor([PROMPTS[0]])}, left_padded(PROMPTS)):
            expected = model.generate(**inputs, **options, **policy).tolist()
            assert model.generate(**inputs, **options, **policy, **compiling_eagerly()).tolist() == expected


@pytest.mark.slow
def test_a_wavefront_compiles_its_step_for_its_first_width_and_for_any():
    model = exact_model(2)
    options = {"preset": "diffusion-forcing-r2", "num_recurrences": 24, "exit_threshold": 1e-9, "headway": 3}
    ids, options = torch.tensor([PROMPTS[0]]), options | {"max_new_tokens": 60, "return_dict_in_generate": True}
    torch._dynamo.reset()
    counters.clear()
    output = model.generate(ids, **options, **compiling_eagerly())
    assert output.num_positions > 16 * output.num_core_passes, "wavefronts of several widths"
    assert counters["stats"]["unique_graphs"] == 2
    assert output.sequences.tolist() == model.generate(ids, **options).sequences.tolist()


def test_compiled_parts_go_with_their_model_and_leave_torchs_stance_as_it_was():
    model = exact_model(0)
    model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=4, **compiling_eagerly())
    assert len(kept_with(model).compiled) == 3, "prelude, six core steps and coda, of one token"
    assert torch._dynamo.eval_frame._stance.skip_guard_eval_unsafe is False
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_sums_attend_as_products_do(num_heads, num_key_heads, dtype, tolerance):
    generator = torch.Generator().manual_seed(num_heads)
    query = torch.randn(2, num_heads, 1, 8, generator=generator).to(dtype)
    key, value = torch.randn(2, 2, num_key_heads, 20, 8, generator=generator).to(dtype)
    mask = torch.zeros(2, 1, 1, 20, dtype=dtype)
    mask[0, ..., 7:] = mask[1, ..., :4] = -torch.inf
    arguments = torch.nn.Identity(), query, key, value, mask, 8**-0.5
    expected = eager_attention(*arguments)[0]
    assert (attend_by_sums(*arguments)[0] - expected).abs().max() <= tolerance


@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("num_tokens", [2, 12, 16])
def test_written_out_products_attend_as_the_kernel_does(num_heads, num_key_heads, num_tokens):
    generator = torch.Generator().manual_seed(num_heads)
    query = torch.randn(2, num_heads, num_tokens, 8, generator=generator)
    key, value = torch.randn(2, 2, num_key_heads, 40, 8, generator=generator)
    starts = torch.tensor([7, 20])[:, None, None, None]  # rows of unlike lengths, one of them padded
    is_hidden = torch.arange(40) > starts + torch.arange(num_tokens)[:, None]
    is_hidden[1, ..., :4] = True
    mask = torch.zeros(is_hidden.shape).masked_fill(is_hidden, -torch.inf)
    found = attend_by_products(torch.nn.Identity(), query, key, value, mask, 8**-0.5)[0]
    expected = eager_attention(torch.nn.Identity(), query, key, value, mask, 8**-0.5)[0]
    kernel = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, kernel.transpose(1, 2))


def test_a_returned_static_cache_is_gone_on_from_and_grows():
    model = exact_model(3)
    ids = torch.tensor([PROMPTS[0]])
    common = {"return_dict_in_generate": True, "policy": "self-speculative"}
    first = model.generate(ids, max_new_tokens=10, cache_implementation="static", **common)
    given = copy.deepcopy(first[CACHE])
    longer = torch.cat([first.sequences, torch.tensor([[4, 5]])], dim=1)

    output = model.generate(longer, max_new_tokens=150, **{CACHE: given}, **common)

    assert output.num_prefill_positions == 3
    assert output.sequences.tolist() == model.generate(longer, max_new_tokens=150).tolist()


def test_beams_reorder_a_static_cache():
    model, ids = exact_model(0), torch.tensor([PROMPTS[0]])
    options = {"max_new_tokens": 8, "num_beams": 3}
    static = model.generate(ids, cache_implementation="static", **options)
    assert static.tolist() == model.generate(ids, **options).tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_implementation": "static", "policy": "exact"}, "`cache_implementation` must be left out with `policy"),
        (
            {"cache_implementation": "static", "preset": "diffusion-forcing-r4", "reference_compat": True},
            "and `reference_compat`",
        ),
        ({"cache_implementation": "static", "policy": "published"}, "left out with `policy='published'`"),
        ({"cache_implementation": "offloaded"}, "`cache_implementation` must be 'static'"),
    ],
)
def test_what_cannot_be_static_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        random_model().generate(torch.tensor([PROMPTS[0]]), max_new_tokens=4, **options)


def test_a_static_cache_is_refused_beside_another_and_where_its_unused_columns_cannot_be_hidden():
    model, ids = random_model(), torch.tensor([PROMPTS[0]])
    cache = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True)[CACHE]
    with pytest.raises(ValueError, match="`cache_implementation` must be left out with a"):
        model.generate(torch.cat([ids] * 3, 1), max_new_tokens=4, **{CACHE: cache}, cache_implementation="static")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="`attn_implementation` must be 'sdpa' or 'eager'"):
        model.generate(ids, max_new_tokens=4, cache_implementation="static", policy="adaptive")


def test_a_compile_config_without_a_static_cache_is_left_aside_and_said(monkeypatch):
    said, ids = [], torch.tensor([PROMPTS[0]])
    monkeypatch.setattr(generation_recurrent.logger, "warning_once", said.append)
    model, options = random_model(), {"max_new_tokens": 4, "policy": "adaptive"}
    compiling = model.generate(ids, compile_config=CompileConfig(), **options)
    assert len(said) == 1
    assert "`compile_config` is ignored" in said[0]
    assert compiling.tolist() == model.generate(ids, **options).tolist()
    assert len(said) == 1
