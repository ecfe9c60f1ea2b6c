"""A packed layer: the same results up to rounding, and never stale weights."""

import copy
import gc
import importlib.util
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers_tidar import random_prompts, tiny_tidar
from wavedraft.generation.execution import packed_linear
from wavedraft.generation.execution.packed_linear import (
    C_FUNCTION,
    PRIVATE_OPERATORS,
    SHIMS_OPTION,
    PackedLinear,
    check_packable,
    has_packed_products,
    options_of_compiler,
    packable_linears,
    packed_copy,
)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    if not has_packed_products(dtype := getattr(torch, request.param)):
        pytest.skip("this CPU has no oneDNN products of bfloat16")
    return dtype


@pytest.fixture
def model(dtype):
    """A random model whose best two tokens are far apart."""
    return tiny_tidar(initializer_range=0.6).to(dtype)


@contextmanager
def reading_packed(model, kept):
    """While this is open, `PackedLinear`s stand in the places of the model's layers."""
    places = packable_linears(model)
    for siblings, name, linear in places:
        siblings[name] = packed_copy(linear, kept)
    try:
        yield kept
    finally:
        for siblings, name, linear in places:
            siblings[name] = linear


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits.float()


def packed_logits(model, ids, kept):
    with reading_packed(model, kept):
        return logits_of(model, ids)


def assert_equal_but_for_rounding(result, expected):
    tolerance = 2**-7 if expected.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (9,), (1, 9), (3, 20), (2, 0), (1, 257)])
@pytest.mark.parametrize("size", [(64, 48), (3, 4)])
@torch.no_grad()
def test_a_products_result_is_the_plain_layers_but_for_rounding(size, shape, bias, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(*size, bias=bias, dtype=dtype)
    x = torch.randn(*shape, size[0], dtype=dtype)
    result = PackedLinear(linear)(x)
    assert_equal_but_for_rounding(result, linear(x))
    if dtype == torch.float32 and shape == (1, 1):
        assert torch.equal(result, linear(x))  # plain decoding's very bits
    assert_equal_but_for_rounding(PackedLinear(linear)(x.mT.contiguous().mT), linear(x))


@torch.no_grad()
def test_a_single_token_in_float32_reads_the_plain_weight():
    torch.manual_seed(0)
    linear = nn.Linear(576, 1536)
    packed = PackedLinear(linear)
    x = torch.randn(20, 1, 1, 576)
    assert all(torch.equal(packed(token), linear(token)) for token in x)
    packed.packed = PackedLinear(nn.Linear(576, 1536)).packed
    assert torch.equal(packed(x[0]), linear(x[0]))
    assert (packed(x[:2]) - linear(x[:2])).abs().max() > 0.1


@torch.no_grad()
def test_under_autocast_it_computes_what_the_plain_layer_does():
    linear = nn.Linear(64, 48)
    x = torch.randn(2, 7, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(PackedLinear(linear)(x.bfloat16()), linear(x.bfloat16()))


def test_a_models_results_are_the_plain_models_but_for_rounding(model):
    ids = random_prompts(2, 7)
    before, names = logits_of(model, ids), list(model.state_dict())
    kept = {}
    with reading_packed(model, kept):
        assert sum(type(module) is PackedLinear for module in model.modules()) == 2 * 7 + 1
        assert list(model.state_dict()) == names
        torch.testing.assert_close(logits_of(model, ids), before, rtol=0.05, atol=0.2)
    assert torch.equal(logits_of(model, ids), before)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_weights_changed_in_place_are_packed_anew(is_frozen, model):
    model.requires_grad_(not is_frozen)
    ids, kept = random_prompts(1, 5), {}
    before = packed_logits(model, ids, kept)
    first = dict(kept)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    after = packed_logits(model, ids, kept)
    assert (after - before).abs().max() > 1
    torch.testing.assert_close(after, logits_of(model, ids), rtol=0.05, atol=0.2)
    assert [linear for linear in kept if kept[linear] is not first[linear]] == [model.model.layers[1].mlp.up_proj]


def test_a_step_of_a_fused_optimizer_that_leaves_no_trace_is_seen(model):
    ids, kept = random_prompts(1, 5), {}
    before = packed_logits(model, ids, kept)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(ids).logits.logsumexp(-1).sum().backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    version = weight._version
    optimizer.step()
    assert weight._version == version, "it does leave a trace now: this test shows nothing any more"
    after = packed_logits(model, ids, kept)
    assert (after - before).abs().max() > 1
    torch.testing.assert_close(after, logits_of(model, ids), rtol=0.05, atol=0.2)


def test_replaced_parameters_are_packed_anew(model):
    ids, kept = random_prompts(1, 5), {}
    packed_logits(model, ids, kept)
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(-projection.weight.detach())
    projection.bias = nn.Parameter(torch.ones_like(projection.weight[:, 0]))
    torch.testing.assert_close(packed_logits(model, ids, kept), logits_of(model, ids), rtol=0.05, atol=0.2)


def test_a_copy_lives_until_its_layer_has_gone_from_the_model(model):
    kept = weakref.WeakKeyDictionary()
    with reading_packed(model, kept):
        pass
    packed = weakref.ref(kept[model.model.layers[1].mlp.up_proj])
    model.model.layers[1].mlp.up_proj = copy.deepcopy(model.model.layers[1].mlp.up_proj)
    with reading_packed(model, kept):
        pass
    gc.collect()
    assert packed() is None
    assert len(kept) == 2 * 7 + 1


def test_layers_that_do_more_than_a_product_keep_their_places(model):
    first, second = model.model.layers
    first.mlp.up_proj.register_forward_hook(lambda *args: None)
    first.mlp.gate_proj.forward = first.mlp.gate_proj.forward
    second.mlp.up_proj.half()
    places = packable_linears(model)
    assert len(places) == 2 * 7 + 1 - 3
    assert all(siblings[name] is linear for siblings, name, linear in places)
    base, around = nn.Linear(4, 4), nn.Module()
    around.base_layer, around.other = base.to(model.dtype), nn.Linear(4, 4, dtype=model.dtype)
    model.adapted = around
    assert [linear for siblings, _, linear in packable_linears(model) if siblings is around._modules] == [base]


@pytest.mark.parametrize("has_inference_mode", [False, True])
def test_weights_of_inference_mode_are_packed_too(dtype, has_inference_mode):
    with torch.inference_mode():
        model = tiny_tidar(initializer_range=0.6).to(dtype)
    ids, kept = random_prompts(1, 5), {}
    with torch.inference_mode(has_inference_mode):
        expected = logits_of(model, ids)
        torch.testing.assert_close(packed_logits(model, ids, kept), expected, rtol=0.05, atol=0.2)
    with torch.inference_mode():
        model.lm_head.weight.mul_(-1)
        torch.testing.assert_close(packed_logits(model, ids, kept), -expected, rtol=0.05, atol=0.2)


class Block(nn.Module):
    """Two layers with something between them."""

    def __init__(self, dtype):
        super().__init__()
        self.up, self.down = nn.Linear(16, 48, dtype=dtype), nn.Linear(48, 16, bias=False, dtype=dtype)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def compiled_for_all_blocks(backend):
    options = {"options": options_of_compiler()} if backend == "inductor" else {}
    torch.compiler.reset()
    run = lambda block, x: type(block).forward(block, x)  # noqa: E731
    return torch.compile(run, backend=backend, dynamic=False, fullgraph=True, **options)


def packed_blocks(dtype):
    torch.manual_seed(0)
    blocks = [Block(dtype) for _ in range(3)]
    for block in blocks:
        block.up, block.down = PackedLinear(block.up), PackedLinear(block.down)
    return blocks


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch.no_grad()
def test_one_compiled_function_serves_all_layers(backend, dtype):
    blocks, x = packed_blocks(dtype), torch.randn(1, 8, 16, dtype=dtype)
    compiled = compiled_for_all_blocks(backend)
    assert_equal_but_for_rounding(compiled(blocks[0], x), blocks[0](x))
    with torch.compiler.set_stance("fail_on_recompile"), torch.profiler.profile() as profile:
        results = [compiled(block, x) for block in blocks]
    for block, result in zip(blocks, results, strict=True):
        assert_equal_but_for_rounding(result, block(x))
    through_python = [event for event in profile.events() if event.name == "wavedraft::_linear_pointwise"]
    assert len(through_python) == (0 if backend == "inductor" else 3 * 2)


@torch.no_grad()
def test_compiled_layers_without_the_option_of_the_compiler_compute_the_same(dtype, monkeypatch):
    monkeypatch.setattr(packed_linear, "SHIMS_OPTION", "no.such_option")
    assert options_of_compiler() == {"size_asserts": False}
    blocks, x = packed_blocks(dtype), torch.randn(1, 8, 16, dtype=dtype)
    compiled = compiled_for_all_blocks("inductor")
    for block in blocks:
        assert_equal_but_for_rounding(compiled(block, x), block(x))


@torch.no_grad()
def test_a_compiled_single_token_in_float32_reads_the_plain_weight():
    packed, x = PackedLinear(nn.Linear(16, 48)), torch.randn(1, 1, 16)
    expected = packed(x)
    packed.packed = PackedLinear(nn.Linear(16, 48)).packed
    assert torch.equal(compiled_for_all_blocks("inductor")(packed, x), expected)


@torch.no_grad()
def test_a_layer_packed_anew_needs_no_new_compiling(dtype):
    block, x = packed_blocks(dtype)[0], torch.randn(1, 8, 16, dtype=dtype)
    compiled = compiled_for_all_blocks("aot_eager")
    compiled(block, x)
    linear = nn.Linear(16, 48, dtype=dtype)
    with torch.inference_mode():
        block.up = PackedLinear(linear)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_equal_but_for_rounding(compiled(block, x), block(x))


def test_a_second_copy_of_this_code_shares_the_operator(dtype):
    spec = importlib.util.spec_from_file_location("wavedraft.generation.execution.another_copy", packed_linear.__file__)
    another = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = another
    try:
        spec.loader.exec_module(another)
    finally:
        del sys.modules[spec.name]
    assert another.PackedLinear is not PackedLinear
    assert another.compilable_product is packed_linear.compilable_product


def test_the_private_names_of_torch_are_there():
    """Fails where a new torch has renamed one of them: `packed_linear.py` must then follow."""
    assert [name for name in PRIVATE_OPERATORS if not hasattr(torch.ops.mkldnn, name)] == []
    assert SHIMS_OPTION in torch._inductor.list_options()
    header = Path(torch.__file__).with_name("include") / "torch/csrc/inductor/aoti_torch/c/shim_cpu.h"
    assert "".join(C_FUNCTION.split()) in "".join(header.read_text().split())


def test_a_private_name_that_vanished_is_noticed(monkeypatch):
    monkeypatch.setattr(packed_linear, "PRIVATE_OPERATORS", (*PRIVATE_OPERATORS, "no_such_operator"))
    with pytest.raises(ValueError, match=r"has no oneDNN products of torch.float32. Leave it out.$"):
        check_packable(tiny_tidar())


def test_what_cannot_be_packed_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match=r"must be False for a model in torch.float16 on cpu"):
        check_packable(tiny_tidar().half())
    check_packable(tiny_tidar())
    monkeypatch.setattr(packed_linear, "has_packed_products", lambda dtype: dtype == torch.float32)
    with pytest.raises(ValueError, match=r"products of torch.bfloat16. Leave it out, or load .* `dtype=torch.float32`"):
        check_packable(tiny_tidar().bfloat16())
