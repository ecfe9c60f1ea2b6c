"""Our products of bfloat16: PyTorch's bits where its sums run in the same order, a slow twin's numbers everywhere."""

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from wavedraft.generation.bfloat16_kernel import bfloat16_kernel, build_kernel
from wavedraft.generation.bfloat16_products import LowRank, WidenedWeight
from wavedraft.generation.packed_weights import has_onednn_products

pytestmark = pytest.mark.skipif(isinstance(bfloat16_kernel(), str), reason=str(bfloat16_kernel()))
SHAPES = [(64, 48), (576, 192), (192, 37), (1536, 576), (72, 10), (8, 5)]  # D, E


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)


def rounded_exactly(x, weight, bias=0.0):
    """The product in float64, with the rounding of bfloat16 as the tolerance of what is compared."""
    return x.double() @ weight.double().t() + bias


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(
    has_onednn_products(torch.bfloat16) or torch.backends.cpu.get_cpu_capability() != "AVX2",
    reason="PyTorch sums up in another order on this CPU",
)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_channels", "num_outputs"), [shape for shape in SHAPES if shape[0] % 64 == 0])
def test_every_bit_is_pytorchs(num_channels, num_outputs, has_bias, _threads):
    torch.manual_seed(0)
    weight, bias = numbers(num_outputs, num_channels), numbers(num_outputs) if has_bias else None
    widened = WidenedWeight(weight)
    for num_rows in (1, 2, 3, 4, 5, 6, 7, 11, 40):
        x = numbers(1, num_rows, num_channels)
        assert torch.equal(widened.times(x, bias), nn.functional.linear(x, weight, bias)), num_rows


@pytest.mark.parametrize(("num_channels", "num_outputs"), SHAPES)
def test_numbers_are_those_of_an_exact_product(num_channels, num_outputs, _threads):
    torch.manual_seed(0)
    weight, bias = numbers(num_outputs, num_channels), numbers(num_outputs)
    x = numbers(3, 7, num_channels)
    expected = rounded_exactly(x, weight, bias.double())
    # Of a sum of D products in float32 and one rounding to eight bits.
    size = x.double().abs() @ weight.double().abs().t() + 1
    error = (WidenedWeight(weight).times(x, bias).double() - expected).abs()
    assert (error <= expected.abs() * 2**-8 + size * 2**-22).all()


def test_a_row_has_the_same_bits_beside_any_others():
    torch.manual_seed(0)
    widened, x = WidenedWeight(numbers(64, 100)), numbers(1, 23, 100)
    alone = torch.cat([widened.times(x[:, i : i + 1], None) for i in range(23)], dim=1)
    assert torch.equal(widened.times(x, None), alone)
    assert torch.equal(widened.times(x.transpose(0, 1), None), alone.transpose(0, 1))  # strides are looked at


@pytest.mark.parametrize("rank", [4, 16, 20])
@pytest.mark.parametrize(("batch_size", "num_rows", "num_masks"), [(1, 8, 4), (1, 3, 3), (3, 9, 7), (2, 4, 1)])
def test_an_adapter_acts_on_the_last_rows_of_each_sequence_alone(rank, batch_size, num_rows, num_masks, _threads):
    torch.manual_seed(0)
    weight, x = numbers(40, 192), numbers(batch_size, num_rows, 192)
    down, up = torch.randn(192, rank) / 8, torch.randn(rank, 40)
    widened = WidenedWeight(weight)
    result, base = widened.adapted_times(x, None, LowRank(down, up), num_masks), widened.times(x, None)
    assert torch.equal(result[:, : num_rows - num_masks], base[:, : num_rows - num_masks])
    for b in range(batch_size):
        for row in range(num_rows - num_masks, num_rows):
            delta = x[b, row].double() @ down.bfloat16().double() @ up.bfloat16().double()
            torch.testing.assert_close(result[b, row].double(), base[b, row].double() + delta, rtol=2**-7, atol=1e-3)
    assert not torch.equal(result, base)


def test_what_is_not_a_number_stays_so():
    x = torch.tensor([[float("nan")] + [1.0] * 63, [float("inf")] + [1.0] * 63, [3.3e38] * 64]).bfloat16()
    result = WidenedWeight(torch.ones(2, 64, dtype=torch.bfloat16)).times(x, None)
    assert result[0].isnan().all() and result[1].isposinf().all() and result[2].isposinf().all()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is loaded")
def test_threads_are_pytorchs_own():
    """A second OpenMP library would bring threads of its own, which wait for each other in turn."""
    torch.ones(2).sum(), bfloat16_kernel()
    loaded = set(re.findall(r"\S*lib[gi]?omp\S*\.so\S*", Path("/proc/self/maps").read_text()))
    assert len(loaded) == 1, loaded


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "failed: `no-such-compiler -std=c"),
        (f"{sys.executable} -c 'raise SystemExit(\"too old\")'", "too old"),
    ],
)
def test_without_a_compiler_it_is_said_what_was_tried(compiler, message, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    said = build_kernel()
    assert isinstance(said, str) and message in said


def test_without_any_compiler_it_is_said_which_were_looked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "none of c++, g++, clang++ is on the PATH" in build_kernel()


def test_a_second_copy_of_this_code_builds_nothing(monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "wavedraft.generation.another_copy", bfloat16_kernel.__wrapped__.__code__.co_filename
    )
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert not isinstance(bfloat16_kernel(), str)
    monkeypatch.setenv("CXX", "no-such-compiler")
    addresses = [
        [ctypes.cast(function, ctypes.c_void_p).value for function in kernel]
        for kernel in (bfloat16_kernel(), copy.bfloat16_kernel())
    ]
    assert addresses[0] == addresses[1]
