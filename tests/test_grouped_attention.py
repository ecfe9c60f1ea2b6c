"""Attention forms: grouped queries, prompts and steps attend like transformers' sdpa with a full mask."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers_tidar import random_prompts, tiny_tidar
from wavedraft.generation.drafting import draft_network
from wavedraft.generation.drafting.structured_mask import draft_mask_function, masks_of_step
from wavedraft.generation.execution import attention_forms, model_form
from wavedraft.generation.execution.attention_forms import attend, attend_grouped, attend_in_step, mask_over_prompt


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


@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(6, 6), (6, 2)])
@pytest.mark.parametrize(("num_tokens", "num_masks"), [(1, 3), (7, 1), (6, 4)])
def test_a_prompt_and_its_masks_attend_as_under_the_mask_written_out(num_tokens, num_masks, num_heads, num_key_heads):
    num_queries = num_tokens + num_masks
    generator = torch.Generator().manual_seed(num_queries)
    query = torch.randn(2, num_heads, num_queries, 8, generator=generator).double()
    key, value = torch.randn(2, 2, num_key_heads, num_queries, 8, generator=generator).double()
    is_seen = torch.zeros(1, 1, num_queries, num_queries, dtype=torch.bool)
    for reader in range(num_queries):
        for read in range(num_queries):
            is_seen[..., reader, read] = read <= reader or reader >= num_tokens
    attention = Attention(num_heads // num_key_heads)
    expected, _ = sdpa_attention_forward(attention, query, key, value, is_seen, scaling=0.3)
    short = mask_over_prompt(num_masks, num_queries, query.device)
    found, weights = attend(attention, query, key, value, short, scaling=0.3)
    torch.testing.assert_close(found, expected)
    assert weights is None


@pytest.mark.parametrize(("family", "is_short"), [("llama", True), ("qwen3", True), ("mistral", False)])
@pytest.mark.parametrize("is_padded", [False, True])
def test_prefill_needs_no_mask_where_nothing_is_cached_padded_or_windowed(family, is_short, is_padded, monkeypatch):
    model, ids = tiny_tidar(family), random_prompts(2, 7)
    mask, asked = torch.ones_like(ids), []
    mask[1, 0] = not is_padded

    def seen(*args):
        asked.append(args)
        return mask_over_prompt(*args)

    monkeypatch.setattr(draft_network, "mask_over_prompt", seen)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=9, draft_length=0)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=9), plain)
    assert len(asked) == (is_short and not is_padded)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_forward_with_masks_is_grouped_and_leaves_the_model_as_it_was(family, monkeypatch):
    model, ids, query_lengths = tiny_tidar(family), random_prompts(1, 7), []

    def seen(module, query, *args, **kwargs):
        query_lengths.append(query.shape[2])
        return attend(module, query, *args, **kwargs)

    monkeypatch.setattr(model_form, "attend", seen)
    plain = model.generate(ids, max_new_tokens=6, draft_length=0)
    assert not query_lengths  # there is nothing to group without masks
    assert torch.equal(model.generate(ids, max_new_tokens=6), plain)
    assert query_lengths[:2] == [7 + 4] * 2 and model.config._attn_implementation == "sdpa"

    monkeypatch.setattr(model_form, "attend", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(ids, max_new_tokens=6)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("windows", [(None,), (3, None)])
@pytest.mark.parametrize("is_padded", [False, True])
def test_masks_of_groups_are_the_structured_mask_written_out(windows, is_padded):
    lengths, branches, num_groups = torch.tensor([5, 7]), torch.tensor([[1, 3], [2, 2]]), 2
    is_real_slot = torch.ones(2, 16, dtype=torch.bool)
    is_real_slot[1, :2] = False
    masks = masks_of_step(
        branches, lengths, is_real_slot if is_padded else None, 3, 2, 16, windows, False, num_groups, torch.float32
    )
    for mask, window in zip(masks, windows, strict=True):
        may_see = draft_mask_function(3, 2, branches, lengths, window)
        for row in range(2):
            for query in range(7):
                for key in range(16):
                    index = (torch.tensor(one) for one in (row, 0, query, key))
                    seen = bool(may_see(*index))
                    if is_padded and not is_real_slot[row, key] and key - lengths[row] != query:
                        seen = False
                    assert mask.shape == (2, 1, num_groups * 7, 16)
                    for group in range(num_groups):
                        assert mask[row, 0, group * 7 + query, key] == (0 if seen else -torch.inf)


@pytest.mark.parametrize("few_tiles", [0, 128])
@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(6, 6), (6, 2), (4, 1)])
def test_a_step_attends_as_sdpa_does_under_a_mask_made_for_all_groups(num_heads, num_key_heads, few_tiles, monkeypatch):
    monkeypatch.setattr(attention_forms, "FEW_TILES", few_tiles)
    query = torch.randn(2, num_heads, 7, 8).double()
    key, value = torch.randn(2, 2, num_key_heads, 16, 8).double()
    lengths, branches = torch.tensor([5, 7]), torch.tensor([[1, 3], [2, 2]])
    attention = Attention(num_heads // num_key_heads)
    about = branches, lengths, None, 3, 2, 16, (None,)
    (plain,), (wide,) = (
        masks_of_step(*about, False, groups, torch.float64) for groups in (1, num_heads // num_key_heads)
    )
    for scaling in ({}, {"scaling": 0.3}):
        expected, _ = sdpa_attention_forward(attention, query, key, value, plain, **scaling)
        torch.testing.assert_close(attend_in_step(attention, query, key, value, wide, **scaling)[0], expected)
        other = plain.repeat(1, 1, 5, 1)  # made for layers with other heads
        torch.testing.assert_close(attend_in_step(attention, query, key, value, other, **scaling)[0], expected)
    with pytest.raises(ValueError, match="softcap"):
        attend_in_step(attention, query, key, value, wide, softcap=30.0)
