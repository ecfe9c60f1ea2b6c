"""Steps of one shape with a static cache write the text of the dynamic decode, compiled or not."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CompileConfig, StaticCache

from helpers_marks import slow_but
from helpers_restless_plans import restless_plans
from helpers_tidar import (
    CountedForwards,
    gated,
    plain_greedy_loop,
    ragged,
    random_prompts,
    tiny_tidar,
)
from wavedraft.generation import kept_with_model
from wavedraft.generation.drafting import options_tidar
from wavedraft.generation.drafting.draft_cache import num_slots_for
from wavedraft.generation.drafting.draft_planner import StepTimes
from wavedraft.generation.drafting.draft_step import PLAIN
from wavedraft.generation.kept_with_model import kept_with
from wavedraft.generation.step_graph import what_a_step_reads
from wavedraft.generation.stock_model import CACHE
from wavedraft.modeling_tidar.generation_tidar import drafting_view, generate

STATIC = {"cache_implementation": "static"}
COMPILED = STATIC | {"compile_config": CompileConfig(backend="eager", mode="default", dynamic=False, fullgraph=True)}
INDUCTOR = STATIC | {"compile_config": CompileConfig(mode="default", dynamic=False, fullgraph=True)}


@pytest.mark.parametrize("num_branches", ["all", 1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_a_ragged_batch_writes_what_the_dynamic_cache_writes(family, num_branches):
    model = tiny_tidar(family, draft_length=4)
    keywords = ragged() | {"max_new_tokens": 24, "num_branches": num_branches, "eos_token_id": [25, 36, 44]}
    for how in ({"do_sample": False}, {"do_sample": True, "seed": 3}):
        expected = model.generate(**keywords, **how)
        assert model.generate(**keywords, **how, **STATIC).tolist() == expected.tolist()


def test_every_step_has_one_shape_and_finished_rows_stay_in_it():
    model = tiny_tidar(draft_length=4)
    prompts = random_prompts(2, 5, seed=3)
    text = plain_greedy_loop(model, prompts[0], num_new=30)
    hook = CountedForwards(model)
    seen = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["hidden_states"].shape, kwargs["attention_mask"])),
        with_kwargs=True,
    )
    output = model.generate(
        prompts, max_new_tokens=30, do_sample=False, num_branches=2, eos_token_id=int(text[9]), pad_token_id=0, **STATIC
    )
    end = text[5:].tolist().index(int(text[9])) + 6
    assert output[0, :end].tolist() == text[:end].tolist() and output.shape[1] > end
    assert set(hook.num_queries[1:]) == {4 * 3}
    assert {(*hidden[:2], mask.shape[-1]) for hidden, mask in seen[1:]} == {(2, 12, num_slots_for(35, 12))}


def test_a_second_turn_continues_from_the_cache_it_returns():
    model = tiny_tidar("qwen3", draft_length=4)
    prompts = random_prompts(2, 6)
    first = model.generate(prompts, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, **STATIC)
    longer = torch.cat([first.sequences, random_prompts(2, 3, seed=5)], dim=1)
    expected = model.generate(longer, max_new_tokens=11, do_sample=False)
    cache = first[CACHE]
    assert type(cache) is StaticCache and cache.get_seq_length() == 14
    found = model.generate(longer, max_new_tokens=11, do_sample=False, **{CACHE: cache})
    assert found.tolist() == expected.tolist()


def test_layers_are_compiled_once_and_not_again_as_texts_grow():
    model = tiny_tidar(draft_length=4)
    torch._dynamo.reset()
    counters.clear()
    expected = model.generate(**ragged(), max_new_tokens=24, do_sample=False)
    assert counters["stats"]["unique_graphs"] == 0
    for max_new_tokens in (24, 5, 17):
        found = model.generate(**ragged(), max_new_tokens=max_new_tokens, do_sample=False, **COMPILED)
        assert found.tolist() == expected[:, : 7 + max_new_tokens].tolist()
        assert counters["stats"]["unique_graphs"] == 2  # the layers', and the mask's
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("is_of_one_kind", [True, False])
def test_what_has_changed_since_the_last_decode_is_seen(is_of_one_kind, backend):
    model = tiny_tidar(draft_length=4)
    if not is_of_one_kind:
        model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    torch._dynamo.reset()
    config = CompileConfig(backend=backend, mode="default", dynamic=False, fullgraph=True)
    keywords = ragged() | {"max_new_tokens": 24, "do_sample": False, **STATIC, "compile_config": config}
    expected = model.generate(**ragged(), max_new_tokens=24, do_sample=False)
    for _ in range(2):
        assert model.generate(**keywords).tolist() == expected.tolist()
    with torch.no_grad():  # what has changed since is seen: the first step of a decode looks
        model.set_attn_implementation("eager")
        assert model.generate(**keywords).tolist() == expected.tolist()
        mlp = model.model.layers[1].mlp
        mlp.forward = lambda x: -type(mlp).forward(mlp, x)
        changed = model.generate(**ragged(), max_new_tokens=24, do_sample=False)
        assert changed.tolist() != expected.tolist()
        assert model.generate(**keywords).tolist() == changed.tolist()


@pytest.mark.parametrize("prompt_length", [150, 231])
def test_a_cache_has_its_own_capacity_however_long_the_prompt(prompt_length):
    model = tiny_tidar(draft_length=4)
    prompt = random_prompts(1, prompt_length)
    expected = model.generate(prompt, max_new_tokens=9, do_sample=False)
    assert num_slots_for(prompt_length + 9, 4 * 5) == 512 if prompt_length > 227 else 256
    for how in (STATIC, COMPILED):
        assert model.generate(prompt, max_new_tokens=9, do_sample=False, **how).tolist() == expected.tolist()


def test_an_adapter_drafts_compiled_as_it_drafts_uncompiled():
    model = tiny_tidar(draft_length=4)
    peft_model = gated(model)
    keywords = ragged() | {"max_new_tokens": 16, "do_sample": False, "num_branches": 1, "return_dict_in_generate": True}
    expected = peft_model.generate(**keywords)
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        found = peft_model.generate(**keywords, **COMPILED)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found.num_forwards == expected.num_forwards
        assert counters["stats"]["unique_graphs"] == 2


def test_an_adapter_whose_first_masks_come_in_a_compiled_step():
    """`auto` reads the prompt without masks."""
    peft_model = gated(tiny_tidar(draft_length=4))
    keywords = ragged() | {"max_new_tokens": 16, "do_sample": False}
    expected = peft_model.generate(**keywords, draft_length=0)
    torch._dynamo.reset()
    for _ in range(2):
        found = peft_model.generate(**keywords, num_branches="auto", **COMPILED)
        assert found.tolist() == expected.tolist()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("num_branches", slow_but({1}, ("all", 1)))
def test_code_made_by_the_compiler_writes_the_same_text(num_branches):
    """While all rows are written, and when some have ended."""
    peft_model = gated(tiny_tidar(draft_length=4))
    keywords = ragged() | {"max_new_tokens": 24, "do_sample": False, "num_branches": num_branches}
    keywords["eos_token_id"] = int(peft_model.generate(**keywords)[1, 14])
    expected = peft_model.generate(**keywords)
    assert peft_model.generate(**keywords, **INDUCTOR).tolist() == expected.tolist()


def test_disable_compile_leaves_the_layers_as_they_are():
    model = tiny_tidar(draft_length=4)
    torch._dynamo.reset()
    counters.clear()
    model.generate(**ragged(), max_new_tokens=5, do_sample=False, disable_compile=True, **COMPILED)
    assert counters["stats"]["unique_graphs"] == 0


def test_auto_keeps_to_two_draft_lengths_and_leaves_the_text_alone():
    model = tiny_tidar("qwen3", draft_length=4)
    keywords = ragged() | {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(**keywords)
    hook = CountedForwards(model)
    for _ in range(3):
        assert model.generate(**keywords, num_branches="auto", **STATIC).tolist() == expected.tolist()
    assert set(hook.num_queries) - {7} <= {1, 2 + 2, 4 + 4}


def test_plans_that_change_all_the_time_leave_the_text_alone(monkeypatch):
    model = tiny_tidar("gemma2", draft_length=4)
    restless_plans(monkeypatch)
    keywords = ragged() | {"max_new_tokens": 24, "do_sample": False, "eos_token_id": [25, 36, 44]}
    expected = model.generate(**keywords)
    for _ in range(3):
        assert model.generate(**keywords, num_branches="auto", **STATIC).tolist() == expected.tolist()


def test_what_needs_several_shapes_is_refused():
    with pytest.raises(ValueError, match=r"exact.*cache_implementation"):
        tiny_tidar().generate(random_prompts(1, 4), max_new_tokens=3, do_sample=False, exact="tie-safe", **STATIC)


def test_a_compile_config_without_a_static_cache_is_left_aside_and_said(monkeypatch):
    said, model, ids = [], tiny_tidar(), random_prompts(1, 4)
    monkeypatch.setattr(options_tidar.logger, "warning_once", said.append)
    config = CompileConfig(backend="eager", mode="default")
    text = model.generate(ids, max_new_tokens=3, do_sample=False, compile_config=config)
    assert "`compile_config` is left aside" in said[0]
    assert text[0].tolist() == plain_greedy_loop(model, ids[0], num_new=3).tolist()


def test_what_is_known_of_a_model_outlives_the_view_that_custom_generate_takes_of_it():
    """Compiled layers, costs of forwards, and graphs; nothing of it is the view's."""
    ours = tiny_tidar(draft_length=4)
    stock = AutoModelForCausalLM.from_config(ours.config).eval()
    stock.load_state_dict(ours.state_dict())
    torch._dynamo.reset()
    counters.clear()
    expected = ours.generate(**ragged(), max_new_tokens=12, do_sample=False).tolist()
    num_graphs = []
    for num_branches in (1, 1, "auto", "auto"):
        keywords = ragged() | {"max_new_tokens": 12, "do_sample": False, "num_branches": num_branches, **COMPILED}
        # As by `custom_generate="path"`.
        assert generate(keywords.pop("input_ids"), model=stock, **keywords).tolist() == expected
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[:2] == [2, 2]
    (times,) = (one for one in kept_with(stock).step_times.values() if isinstance(one, StepTimes))
    assert times.num_seen[PLAIN] >= 2
    assert (
        what_a_step_reads(drafting_view(stock)) == what_a_step_reads(drafting_view(stock)) == what_a_step_reads(stock)
    )


def test_the_processor_is_checked_while_functions_are_traced(monkeypatch):
    calls = []
    monkeypatch.setattr(kept_with_model, "check_processor_meanwhile", lambda: calls.append(1))
    model = tiny_tidar()

    def function():
        return None

    kept_with_model.compiled_for(model, function, (1,), {"backend": "eager"})
    assert not calls, "another compiler asks for nothing"
    for _ in range(2):
        kept_with_model.compiled_for(model, function, (2,), {})
    assert len(calls) == 1
