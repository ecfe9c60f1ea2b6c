"""Our attention of bfloat16: a slow twin's numbers, sdpa's bits for a query alone, whatever stands beside it."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from wavedraft.generation.bfloat16_attention import attend_in_bfloat16, bfloat16_attention, can_attend, has_bits_of_sdpa
from wavedraft.generation.bfloat16_kernel import bfloat16_kernel
from wavedraft.generation.cpp_operators import options_of_compiler
from wavedraft.generation.grouped_attention import attend_grouped

pytestmark = pytest.mark.skipif(isinstance(bfloat16_kernel(), str), reason=str(bfloat16_kernel()))
of_avx2 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX2", reason="PyTorch sums up in another order on this CPU"
)


class Attention(torch.nn.Module):
    def __init__(self, num_key_value_groups):
        super().__init__()
        self.num_key_value_groups, self.is_causal = num_key_value_groups, True


@pytest.fixture(params=[1, 2], ids="{} threads".format, autouse=True)
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random_states(batch_size, num_heads, num_key_heads, num_queries, num_slots, num_channels=64):
    """Queries as a layer hands them over, keys and values of a cache with room behind them, and who sees whom."""
    torch.manual_seed(num_slots + num_queries)
    query = torch.randn(batch_size, num_queries, num_heads, num_channels).bfloat16().transpose(1, 2)
    key, value = torch.randn(2, batch_size, num_key_heads, num_slots + 5, num_channels).bfloat16()[..., :num_slots, :]
    mask = torch.rand(batch_size, 1, num_queries, num_slots) < 0.7
    mask[..., 0] = True
    mask[..., num_slots * 2 // 3 :] = False
    return query, key, value, mask


def attended_slowly(query, key, value, mask, scale):
    """[A, Q, H, D] in float64, query by query and slot by slot, and what the values would weigh without their signs;
    zeros where nothing is seen."""
    num_groups = query.shape[1] // key.shape[1]
    found, sizes = torch.zeros(2, *query.transpose(1, 2).shape, dtype=torch.float64)
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            for place in range(query.shape[2]):
                slots = [slot for slot in range(key.shape[2]) if mask[row, 0, place, slot]]
                if not slots:
                    continue
                keys, values = (states[row, head // num_groups, slots].double() for states in (key, value))
                weights = (scale * keys @ query[row, head, place].double()).softmax(dim=0)
                found[row, place, head] = weights @ values
                sizes[row, place, head] = weights @ values.abs()
    return found, sizes


SHAPES = [(1, 9, 3, 1, 40), (2, 4, 4, 3, 16), (1, 6, 1, 7, 133), (3, 2, 2, 2, 5)]  # A, H, G, Q, S


@pytest.mark.parametrize("num_channels", [16, 64, 80, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_those_of_an_exact_attention(shape, num_channels):
    states = random_states(*shape, num_channels)
    expected, sizes = attended_slowly(*states, 0.3)
    found = bfloat16_attention()(*states, 0.3)
    assert found.shape == expected.shape and found.is_contiguous() and found.dtype == torch.bfloat16
    # weights and results are rounded to bfloat16
    assert ((found.double() - expected).abs() <= (expected.abs() + sizes) * 2**-8 + 2e-6).all()


def alone(query, key, value, scale, mask=None):
    """PyTorch's attention for one query and all these slots [A, 1, H, D]."""
    num_groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(num_groups, dim=1) for states in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


@of_avx2
@pytest.mark.parametrize("num_channels", [16, 64, 80, 128])
@pytest.mark.parametrize("num_slots", [*range(1, 36), 63, 64, 100, 255, 256, 511, 512, 513, 1023, 1024, 1029, 1540])
def test_a_query_has_the_bits_of_sdpa_for_it_alone(num_slots, num_channels):
    torch.manual_seed(num_slots)
    query = 2 * torch.randn(1, 6, 1, num_channels).bfloat16()
    key, value = torch.randn(2, 1, 3, num_slots, num_channels).bfloat16()
    value[..., 1::2] *= torch.tensor(2.0) ** torch.randint(-12, 12, (num_slots, 1))  # sums hang on their order
    mask = torch.ones(1, 1, 1, num_slots, dtype=torch.bool)
    expected = alone(query, key, value, 0.3)
    assert torch.equal(bfloat16_attention()(query, key, value, mask, 0.3), expected)
    key, value, mask = (  # in a cache with room
        nn.functional.pad(states, (0, 0) * (states.dim() - 1 - axis) + (0, 80))
        for states, axis in ((key, 2), (value, 2), (mask, 3))
    )
    assert torch.equal(bfloat16_attention()(query, key, value, mask, 0.3), expected)


@of_avx2
def test_it_is_found_out_whether_sdpa_has_these_bits(monkeypatch):
    assert has_bits_of_sdpa()
    sdpa = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda q, k, v: sdpa(q, k.flip(2), v.flip(2)))
    assert not has_bits_of_sdpa.__wrapped__()


@of_avx2
def test_the_order_of_sums_is_that_of_sdpa_where_nothing_else_is_left():
    """Values that cancel each other: what comes out is what rounding leaves of them."""
    torch.manual_seed(0)
    for num_slots in (16, 30, 62, 250, 510, 1022):
        half = torch.randn(1, 2, num_slots // 2, 64) * 2.0 ** torch.randint(-20, 20, (1, 2, num_slots // 2, 64))
        value = torch.cat([half, -half], dim=2)[:, :, torch.randperm(num_slots)].bfloat16()
        query, key = torch.zeros(1, 2, 1, 64).bfloat16(), torch.zeros(1, 2, num_slots, 64).bfloat16()
        expected = alone(query, key, value, 1.0)
        mask = torch.ones(1, 1, 1, num_slots, dtype=torch.bool)
        assert expected.count_nonzero() > 32
        assert torch.equal(bfloat16_attention()(query, key, value, mask, 1.0), expected)


@of_avx2
@pytest.mark.parametrize("num_slots, num_queries", [(40, 5), (133, 9), (600, 4), (1030, 3)])
def test_queries_of_a_draft_in_a_padded_batch_have_the_bits_of_each_alone(num_slots, num_queries):
    query = torch.randn(3, 6, num_queries, 64).bfloat16()
    key, value = torch.randn(2, 3, 2, num_slots, 64).bfloat16()
    place, slot = torch.arange(num_queries)[:, None] + num_slots - num_queries, torch.arange(num_slots)
    num_padding = torch.tensor([0, 7, num_slots // 2 + 1])[:, None, None, None]
    mask = (slot >= num_padding) & (slot <= place)
    found = bfloat16_attention()(query, key, value, mask, 0.125)
    for i in range(num_queries):
        seen = num_slots - num_queries + i + 1
        one = query[:, :, i : i + 1], key[:, :, :seen], value[:, :, :seen]
        assert torch.equal(found[:, i : i + 1], alone(*one, 0.125, mask[:, :, i : i + 1, :seen]))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_query_has_the_same_bits_beside_any_others_and_in_any_cache(shape):
    query, key, value, mask = random_states(*shape)
    together = bfloat16_attention()(query, key, value, mask, 0.125)
    num_seen = int(mask.nonzero()[:, 3].max()) + 1
    key[:, :, num_seen:], value[:, :, num_seen:] = 3e38, -3e38  # what nobody sees may be anything finite
    for row in range(shape[0]):
        for place in range(shape[3]):
            one, only = slice(row, row + 1), slice(place, place + 1)
            alone = query[one, :, only], key[one, :, :num_seen], value[one, :, :num_seen], mask[one, :, only, :num_seen]
            assert torch.equal(bfloat16_attention()(*alone, 0.125), together[one, only]), (row, place)
    assert torch.equal(bfloat16_attention()(query, key, value, mask, 0.125), together)


def test_a_query_that_sees_nothing_and_one_that_is_not_a_number():
    query, key, value, mask = random_states(1, 4, 2, 3, 20)
    mask[:, :, 1] = False
    expected = bfloat16_attention()(query, key, value, mask, 0.125)
    assert not expected[:, 1].any() and expected[:, [0, 2]].abs().min() > 0
    query[:, :, 2, 5] = torch.nan
    found = bfloat16_attention()(query, key, value, mask, 0.125)
    assert found[:, 2].isnan().all() and torch.equal(found[:, :2], expected[:, :2])


@pytest.mark.parametrize("shape", [(1, 9, 3, 1, 40), (2, 4, 2, 3, 70)])
def test_it_stands_for_grouped_sdpa_and_compiles_without_python(shape):
    states = random_states(*shape)
    attention = Attention(shape[1] // shape[2])
    expected, _ = attend_grouped(attention, *states, scaling=0.2)
    found, weights = attend_in_bfloat16(attention, *states, scaling=0.2)
    assert weights is None and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-8)

    def attend(query, key, value, mask):
        return attend_in_bfloat16(attention, query + 1, key, value, mask)[0] * 2

    options = options_of_compiler(bfloat16_attention())
    if not options:
        pytest.skip("this torch calls operators through Python")
    query, *others = states
    expected, _ = attend_in_bfloat16(attention, query + 1, *others)
    assert torch.equal(torch.compile(attend, options=options, dynamic=False)(*states), expected * 2)


@pytest.mark.parametrize("case", ["float32", "a mask to add", "no mask", "40 channels", "a mask of other rows"])
def test_what_it_is_not_written_for_is_left_to_sdpa(case):
    query, key, value, mask = random_states(2, 4, 2, 3, 20, 40 if case == "40 channels" else 64)
    mask[:, :, :, 0] = True
    if case == "float32":
        query, key, value = query.float(), key.float(), value.float()
    elif case == "a mask to add":
        mask = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, -torch.inf)
    elif case == "no mask":
        mask = None
    elif case == "a mask of other rows":
        mask = mask[:1]
    assert mask is None or not can_attend(query, key, value, mask)
    expected, _ = attend_grouped(Attention(2), query, key, value, mask)
    assert torch.equal(attend_in_bfloat16(Attention(2), query, key, value, mask)[0], expected)
    with pytest.raises(ValueError, match="softcap"):
        attend_in_bfloat16(Attention(2), query, key, value, mask, softcap=30.0)
