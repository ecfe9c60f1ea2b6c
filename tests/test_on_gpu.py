"""On a GPU: steps as CUDA graphs write the same text as steps without graphs and as plain decoding.

WAVEDRAFT_TEST_DEVICE=cpu runs the same tests without graphs and without a GPU.
"""

import os

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from helpers_tidar import gated, ragged, random_prompts, tiny_tidar, with_random_head
from wavedraft.generation.kept_with_model import kept_with

DEVICE = os.environ.get("WAVEDRAFT_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")

STATIC = {"cache_implementation": "static"}
UNRECORDED = STATIC | {"compile_config": CompileConfig(mode="default", dynamic=False)}
WAYS = [{}, STATIC | {"disable_compile": True}, UNRECORDED, STATIC, STATIC]


@pytest.fixture(autouse=True)
def without_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_device(given):
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def num_graphs(model):
    return len(graphs_of(model))


def graphs_of(model):
    return {} if (kept := kept_with(model).graphs) is None else dict(kept.graphs)


@pytest.mark.parametrize("num_branches", ["all", 1, 2, "auto"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_every_way_of_a_step_writes_plain_decodings_text(family, num_branches):
    model = tiny_tidar(family, draft_length=4).to(DEVICE)
    keywords = on_device(ragged()) | {"max_new_tokens": 40, "eos_token_id": [25, 36, 44], "do_sample": False}
    expected = model.generate(**keywords, draft_length=0).tolist()
    for how in WAYS:
        assert model.generate(**keywords, num_branches=num_branches, **how).tolist() == expected, how
    assert num_graphs(model) == (0 if DEVICE == "cpu" else 3 if num_branches == "auto" else 1)


@pytest.mark.parametrize("num_branches", ["all", 1, 3])
def test_a_head_writes_one_draft_however_steps_run(num_branches):
    model = with_random_head(tiny_tidar("qwen3", draft_length=4), size=0.3).to(DEVICE)
    keywords = on_device(ragged()) | {"max_new_tokens": 40, "eos_token_id": [25, 36, 44], "do_sample": False}
    keywords |= {"return_dict_in_generate": True, "num_branches": num_branches}
    expected = model.generate(**keywords)
    for how in WAYS:
        found = model.generate(**keywords, **how)
        assert found.sequences.tolist() == expected.sequences.tolist(), how
        assert found.accepted_lengths.tolist() == expected.accepted_lengths.tolist(), how


@pytest.mark.parametrize("wish", [{"repetition_penalty": 1.3}, {"output_scores": True}])
def test_where_more_than_the_logits_is_asked_for_the_text_is_the_same(wish):
    model = tiny_tidar("qwen3", draft_length=4).to(DEVICE)
    keywords = on_device(ragged()) | {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True} | wish
    expected = model.generate(**keywords, draft_length=0).sequences.tolist()
    for how in WAYS:
        assert model.generate(**keywords, **how).sequences.tolist() == expected, how


@pytest.mark.parametrize("num_branches", ["all", 2])
def test_a_seed_gives_one_text_however_steps_run(num_branches):
    model = tiny_tidar("qwen3", draft_length=4).to(DEVICE)
    keywords = on_device(ragged()) | {"max_new_tokens": 24, "do_sample": True, "seed": 5, "num_branches": num_branches}
    texts = [model.generate(**keywords, **how).tolist() for how in WAYS]
    assert all(text == texts[0] for text in texts)


def test_an_adapter_acts_in_a_graph_until_it_changes():
    model = gated(tiny_tidar(draft_length=4)).base_model.model.to(DEVICE)
    prompt = random_prompts(1, 6).to(DEVICE)
    keywords = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
    for scale in (1.0, 3.0):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(scale)
        expected = model.generate(prompt, **keywords)
        for _ in range(2):
            found = model.generate(prompt, **keywords, **STATIC)
            assert found.sequences.tolist() == expected.sequences.tolist()
            assert found.num_forwards == expected.num_forwards


def test_later_texts_compile_and_record_nothing():
    model = tiny_tidar(draft_length=4).to(DEVICE)
    model.generate(random_prompts(1, 6).to(DEVICE), max_new_tokens=30, do_sample=False, **STATIC)
    counters.clear()
    before = graphs_of(model)
    assert len(before) == (0 if DEVICE == "cpu" else 1)
    for length in (4, 9, 20):
        prompt = random_prompts(1, length, seed=length).to(DEVICE)
        expected = model.generate(prompt, max_new_tokens=30, do_sample=False)
        assert torch.equal(model.generate(prompt, max_new_tokens=30, do_sample=False, **STATIC), expected)
    assert counters["stats"]["unique_graphs"] == 0
    assert graphs_of(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decodes_in_every_way(dtype):
    """Texts may differ at near-ties; each way gives as many tokens, and its own text again."""
    model = tiny_tidar("qwen3", draft_length=4).to(DEVICE, dtype)
    keywords = on_device(ragged()) | {"max_new_tokens": 24, "do_sample": False}
    for how in WAYS:
        first, again = (model.generate(**keywords, **how) for _ in range(2))
        assert first.shape == (3, 31) and torch.equal(first, again)
