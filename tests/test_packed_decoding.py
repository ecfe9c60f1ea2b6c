"""Decoding with packed weights: the same results up to bfloat16 rounding, and never stale weights."""

import gc
import shutil
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

from helpers_tidar import random_prompts, tiny_tidar
from wavedraft.generation.execution.model_form import ModelForm, in_plain_form
from wavedraft.generation.execution.packed_linear import PackedLinear, has_packed_products
from wavedraft.generation.kept_with_model import kept_with
from wavedraft.training import gated_adapter_config


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    """Each dtype that oneDNN has products of here."""
    dtype = getattr(torch, request.param)
    if not has_packed_products(dtype):
        pytest.skip(f"no oneDNN products of {dtype}")
    return dtype


def model_in(dtype, **changes):
    """A random model whose best two tokens are far apart."""
    return tiny_tidar(draft_length=4, initializer_range=0.6, **changes).to(dtype)


def adapted_model_in(dtype, rank, family="llama"):
    """The same with a gated adapter of random numbers."""
    model = model_in(dtype, family=family)
    adapter = gated_adapter_config(model, rank=rank)
    adapted = get_peft_model(model, adapter, autocast_adapter_dtype=False).eval().requires_grad_(False)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits.float()


def packed_logits(model, ids):
    with in_plain_form(model, is_packed=True):
        return logits_of(model, ids)


@pytest.mark.parametrize("keywords", [{}, {"num_branches": 1}, {"num_branches": "auto"}, {"draft_length": 0}])
def test_the_text_is_that_of_stock_weights(keywords, monkeypatch, dtype):
    model = model_in(dtype)
    prompts = {"input_ids": random_prompts(2, 7), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**prompts, **keywords)
    calls, times = [], PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda layer, x: (calls.append(1), times(layer, x))[1])
    assert model.generate(**prompts, **keywords, packed_weights=True).tolist() == expected.tolist()
    assert len(calls) > 12 * 15 / 4  # two layers of seven products, and the lm_head


@pytest.mark.parametrize("is_frozen", [True, False])
def test_changed_weights_are_packed_anew(is_frozen, dtype):
    model, ids = model_in(dtype).requires_grad_(not is_frozen), random_prompts(1, 5)
    before = packed_logits(model, ids)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    after = packed_logits(model, ids)
    assert (after - before).abs().max() > 1
    torch.testing.assert_close(after, logits_of(model, ids), rtol=0.05, atol=0.2)


def test_a_fused_step_that_leaves_no_trace_is_seen(dtype):
    model, ids = model_in(dtype), random_prompts(1, 5)
    before = packed_logits(model, ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(ids).logits.logsumexp(-1).sum().backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    version = weight._version
    optimizer.step()
    assert weight._version == version, "it does leave a trace now: this test shows nothing any more"
    after = packed_logits(model, ids)
    assert (after - before).abs().max() > 1
    torch.testing.assert_close(after, logits_of(model, ids), rtol=0.05, atol=0.2)


def test_packed_copies_are_kept_from_one_decode_to_the_next_and_die_with_the_layers(dtype):
    model, ids = model_in(dtype), random_prompts(1, 5)
    packed_logits(model, ids)
    first = dict(kept_with(model).copies)
    assert len(first) == 2 * 7 + 1
    packed_logits(model, ids)
    assert dict(kept_with(model).copies) == first
    copies = [weakref.ref(copy) for copy in first.values()]
    del model, first
    gc.collect()
    assert not any(copy() for copy in copies)


def test_compiled_layers_read_packed_weights_too(dtype):
    """In float32 by the real compiler: it alone turns packed products into calls from C, and keeps them on disk."""
    counters.clear()
    packed_backend = "inductor" if dtype == torch.float32 and shutil.which("g++") else "aot_eager"
    model = model_in(dtype)
    keywords = {"input_ids": random_prompts(1, 7), "max_new_tokens": 12, "do_sample": False, "num_branches": 1}
    expected = model.generate(**keywords)
    for backend, is_packed in ((packed_backend, True), ("aot_eager", False)):
        config = CompileConfig(backend=backend, mode="default", dynamic=False, fullgraph=True)
        keywords |= {"cache_implementation": "static", "compile_config": config, "packed_weights": is_packed}
        assert model.generate(**keywords).tolist() == expected.tolist()
    assert not counters["inductor"]["fxgraph_cache_bypass"]


@pytest.mark.parametrize(
    ("given", "keywords", "message"),
    [
        (torch.float16, {"packed_weights": True}, "must be False for a model in torch.float16 on cpu"),
        (torch.bfloat16, {"packed_weights": "yes"}, "`packed_weights` must be True or False, but is 'yes'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given, keywords, message):
    with pytest.raises(ValueError, match=message):
        model_in(given).generate(random_prompts(1, 3), max_new_tokens=2, do_sample=False, **keywords)


def test_inference_mode_and_weights_loaded_in_it(dtype):
    prompts = {"input_ids": random_prompts(2, 7), "max_new_tokens": 8, "do_sample": False}
    with torch.inference_mode():
        model = model_in(dtype)
        expected = model.generate(**prompts)
        assert model.generate(**prompts, packed_weights=True).tolist() == expected.tolist()
        model.lm_head.weight.mul_(-1)
        changed = model.generate(**prompts)
        assert changed.tolist() != expected.tolist()
        assert model.generate(**prompts, packed_weights=True).tolist() == changed.tolist()


def masked_logits(model, ids, num_masks, is_packed):
    form = ModelForm(model, is_packed=is_packed)
    with form.applied(), form.gate.open(num_masks):
        return logits_of(model, ids)


def test_an_adapter_is_read_with_the_packed_weights(dtype):
    model, ids = adapted_model_in(dtype, 8, "qwen2"), random_prompts(2, 9)
    for name, parameter in model.named_parameters():
        if name.endswith("base_layer.bias"):
            nn.init.normal_(parameter)
    near = {"rtol": 0.05, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for num_masks in (1, 4, 9):
        packed = masked_logits(model, ids, num_masks, True)
        torch.testing.assert_close(packed, masked_logits(model, ids, num_masks, False), **near)
        assert (packed - packed_logits(model, ids))[:, -num_masks:].abs().max() > 1


def test_one_copy_of_the_weights_serves_drafting_and_plain_decoding(dtype):
    model, ids = adapted_model_in(dtype, 8, "qwen2"), random_prompts(1, 5)
    linear = model.model.layers[0].mlp.up_proj.base_layer
    masked_logits(model, ids, 2, True)
    copy = kept_with(model).copies[linear]
    packed_logits(model, ids)
    masked_logits(model, ids, 2, True)
    assert kept_with(model).copies[linear] is copy


@pytest.mark.parametrize("changed", ["lora_A", "lora_B", "base_layer.bias"])
def test_a_changed_adapter_is_packed_anew(changed, dtype):
    model, ids = adapted_model_in(dtype, 8, "qwen2"), random_prompts(1, 5)
    before = masked_logits(model, ids, 2, True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if changed in name:
                parameter.add_(1.0)
    after = masked_logits(model, ids, 2, True)
    assert (after - before).abs().max() > 1
    torch.testing.assert_close(after, masked_logits(model, ids, 2, False), rtol=0.05, atol=0.2)
