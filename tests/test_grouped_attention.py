import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tiny_tidar import random_prompts, tiny_tidar
from wavedraft.generation import grouped_attention
from wavedraft.generation.grouped_attention import attend_grouped


class Attention(torch.nn.Module):
    def __init__(self, num_key_value_groups):
        super().__init__()
        self.num_key_value_groups, self.is_causal = num_key_value_groups, True


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(6, 6), (6, 2), (4, 1)])
@pytest.mark.parametrize("mask_rows", [1, 3])
def test_grouped_queries_attend_as_in_sdpa(dtype, num_heads, num_key_heads, mask_rows):
    generator = torch.Generator().manual_seed(num_heads * num_key_heads)
    query = torch.randn(3, 5, num_heads, 8, generator=generator).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, 3, num_key_heads, 11, 8, generator=generator).to(dtype)
    is_seen = torch.rand(mask_rows, 1, 5, 11, generator=generator) < 0.6
    is_seen[..., 0] = True
    additive = torch.zeros(is_seen.shape, dtype=dtype).masked_fill(~is_seen, torch.finfo(dtype).min)
    attention = Attention(num_heads // num_key_heads)
    for mask in (is_seen, additive):
        for options in ({}, {"scaling": 0.3}):
            expected, _ = sdpa_attention_forward(attention, query, key, value, mask, **options)
            found, weights = attend_grouped(attention, query, key, value, mask, **options)
            assert weights is None and found.is_contiguous() and found.shape == (3, 5, num_heads, 8)
            torch.testing.assert_close(found, expected)


def test_what_has_no_mask_is_left_to_sdpa():
    query, key = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8)
    attention = Attention(3)
    expected, _ = sdpa_attention_forward(attention, query, key, key, None, is_causal=True)
    assert torch.equal(attend_grouped(attention, query, key, key, None, is_causal=True)[0], expected)
    with pytest.raises(ValueError, match="softcap"):
        attend_grouped(attention, query, key, key, torch.zeros(2, 1, 5, 5), softcap=30.0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_forward_with_masks_is_grouped_and_leaves_the_model_as_it_was(family, monkeypatch):
    model, ids, query_lengths = tiny_tidar(family), random_prompts(1, 7), []

    def seen(module, query, *args, **kwargs):
        query_lengths.append(query.shape[2])
        return attend_grouped(module, query, *args, **kwargs)

    monkeypatch.setattr(grouped_attention, "attend_grouped", seen)
    plain = model.generate(ids, max_new_tokens=6, draft_length=0)
    assert not query_lengths  # there is nothing to group without masks
    assert torch.equal(model.generate(ids, max_new_tokens=6), plain)
    assert query_lengths[:2] == [7 + 4] * 2 and model.config._attn_implementation == "sdpa"

    monkeypatch.setattr(grouped_attention, "attend_grouped", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(ids, max_new_tokens=6)
    assert model.config._attn_implementation == "sdpa"
