"""In half precision, wide forwards round differently; `exact="tie-safe"` still writes plain decoding's text."""

import pytest
import torch
from transformers import DynamicCache

from helpers_marks import slow_but
from helpers_tidar import CountedForwards, gated, random_prompts, tiny_tidar
from wavedraft.generation.drafting.draft_network import new_network
from wavedraft.generation.drafting.draft_step import with_masks
from wavedraft.generation.execution.attention_forms import NUM_BELIEVED, rounding_of
from wavedraft.generation.execution.packed_linear import has_packed_products, pays_to_pack
from wavedraft.generation.stock_model import CACHE

needs_packed_products = pytest.mark.skipif(
    not has_packed_products(torch.bfloat16), reason="this CPU has no oneDNN products of bfloat16"
)


def half(family="llama", implementation="sdpa"):
    """A model whose every token has a twin that its head can hardly tell from it; its inner products are long enough
    that bfloat16 kernels split them."""
    model = tiny_tidar(family, draft_length=8, hidden_size=64, intermediate_size=1536, head_dim=16)
    with torch.no_grad():
        weight = model.lm_head.weight
        twins = weight[: len(weight) // 2 * 2].view(-1, 2, weight.shape[1])
        twins[:, 1] = twins[:, 0] * (1 + 0.01 * torch.randn_like(twins[:, 0]))
    model.set_attn_implementation(implementation)
    return model.to(torch.bfloat16)


def texts(model, prompts, **keywords):
    common = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 40, "do_sample": False}
    return model.generate(prompts, **{**common, **keywords}).tolist()


@pytest.mark.parametrize("family", slow_but({"llama"}, ("llama", "qwen3", "mistral")))
def test_the_text_is_plain_decodings_where_wide_forwards_write_another(family):
    model = half(family)
    num_same_wide = 0
    for seed in range(4):
        prompts = random_prompts(1, 11 + seed, seed)
        plain = texts(model, prompts, draft_length=0)
        num_same_wide += texts(model, prompts) == plain
        assert texts(model, prompts, exact="tie-safe") == plain
    assert num_same_wide < 4, "no near-tie among them, so nothing was tested"


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_of_a_padded_batch_are_plain_decodings_of_that_batch(family):
    model = half(family)
    prompts = random_prompts(3, 14)
    attention_mask = torch.ones_like(prompts)
    attention_mask[1, :5] = attention_mask[2, :9] = 0
    keywords = {"attention_mask": attention_mask, "eos_token_id": [25, 36], "max_new_tokens": 30}
    plain = texts(model, prompts, draft_length=0, **keywords)
    assert texts(model, prompts, exact="tie-safe", **keywords) == plain


def test_processors_decide_what_a_tie_is():
    model = half("qwen3")
    for seed in range(3):
        prompts = random_prompts(2, 9, seed)
        keywords = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
        plain = texts(model, prompts, draft_length=0, **keywords)
        assert texts(model, prompts, exact="tie-safe", **keywords) == plain


@needs_packed_products
@pytest.mark.parametrize("adapted", [False, True])
def test_packed_weights_too_write_plain_decodings_text(adapted):
    model = half()
    if adapted:
        gated(model)
    prompts = random_prompts(2, 12)
    plain = texts(model, prompts, draft_length=0)
    for branches in (1, "all"):
        assert texts(model, prompts, exact="tie-safe", packed_weights=True, num_branches=branches) == plain


def logits_of_draft(network, prompt_ids, draft_ids):
    """Logits after each token of a draft that is read with every block of masks."""
    length = draft_ids.shape[1]
    with network.form.applied():
        _, _, next_positions = network.prefill(prompt_ids, None, length, has_draft=False)
        every, cached = torch.arange(1, length + 1)[None], torch.tensor([prompt_ids.shape[1]])
        positions = next_positions + torch.arange(length)
        return network(with_masks(draft_ids, positions, every, cached, length, length, network.masks))[0][0]


@pytest.mark.parametrize("is_packed", [False, pytest.param(True, marks=needs_packed_products)])
def test_clean_tokens_leave_bit_for_bit_what_plain_decoding_leaves(is_packed):
    model = half()
    prompt_ids, draft_ids = random_prompts(1, 21), random_prompts(1, 8, seed=5)
    network = new_network(model, 1, mask_embedding_id=3, is_tie_safe=True, is_packed=is_packed)
    usual = new_network(model, 1, mask_embedding_id=3, is_packed=is_packed)
    cache = DynamicCache()
    with torch.no_grad():
        model(prompt_ids, **{CACHE: cache}, logits_to_keep=1)
        expected = [model(draft_ids[:, i : i + 1], **{CACHE: cache}, logits_to_keep=1).logits[0, 0] for i in range(8)]
        wide, wide_as_usual = (logits_of_draft(one, prompt_ids, draft_ids) for one in (network, usual))
        assert torch.equal(wide, torch.stack(expected))
        for mine, theirs in zip(network.rows.cache.layers, cache.layers, strict=True):
            assert torch.equal(mine.keys[:, :, :29], theirs.keys)
            assert torch.equal(mine.values[:, :, :29], theirs.values)
        assert not torch.equal(wide_as_usual, wide)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_forwards_for_ties_are_counted_where_the_network_is_called(implementation):
    model = half(implementation=implementation)
    hook = CountedForwards(model)
    output = model.generate(
        random_prompts(1, 7), max_new_tokens=30, do_sample=False, exact="tie-safe", return_dict_in_generate=True
    )
    assert output.num_tie_forwards > 0
    assert hook.num_queries.count(1) == output.num_tie_forwards
    assert len(hook.num_queries) == output.num_forwards + output.num_prefill_forwards + output.num_tie_forwards
    assert hook.num_queries[:2] == [7, 1 + 8]  # the prompt as plain decoding reads it; then its last token and masks


def test_a_forward_of_one_token_decides_every_position_where_all_are_ties():
    """In float32, where wide forwards and narrow ones differ in every token on this kind of processor."""
    model = tiny_tidar("qwen3", draft_length=4)
    model.set_attn_implementation("eager")
    prompts = random_prompts(2, 7)
    keywords = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(prompts, draft_length=0, **keywords)
    output = model.generate(prompts, exact="tie-safe", tie_margin=1e9, **keywords)
    assert output.sequences.tolist() == plain.sequences.tolist()
    if not rounding_of(model, pays_to_pack(model)).is_believed:
        assert output.num_tie_forwards >= 2 * 19


def test_a_wide_forward_that_was_always_right_is_asked_no_more():
    model = half()
    keywords = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(random_prompts(1, 7), exact="tie-safe", tie_margin=1e9, **keywords)
    if not rounding_of(model, pays_to_pack(model)).is_believed:
        pytest.skip("this processor rounds wide forwards otherwise, whatever is called token by token")
    assert first.num_tie_forwards == NUM_BELIEVED
    assert model.generate(random_prompts(1, 9), exact="tie-safe", **keywords).num_tie_forwards == 0


def test_a_margin_of_zero_asks_for_no_forward_and_no_mode_counts_none():
    model = half(implementation="eager")
    keywords = {"max_new_tokens": 15, "do_sample": False, "return_dict_in_generate": True}
    assert model.generate(random_prompts(1, 7), exact="tie-safe", tie_margin=0, **keywords).num_tie_forwards == 0
    assert model.generate(random_prompts(1, 7), **keywords).num_tie_forwards == 0


@pytest.mark.parametrize(
    "keywords, words",
    [
        ({"exact": "always"}, "'tie-safe' or None"),
        ({"exact": "tie-safe", "do_sample": True}, "greedy"),
        ({"tie_margin": 0.1}, "exact='tie-safe'"),
        ({"exact": "tie-safe", "tie_margin": -1}, "0 or more"),
        ({"exact": "tie-safe", "tie_margin": "wide"}, "0 or more"),
    ],
)
def test_what_cannot_be_is_refused_by_name(keywords, words):
    with pytest.raises(ValueError, match=words):
        tiny_tidar().generate(random_prompts(1, 4), max_new_tokens=3, **keywords)


def test_the_mode_may_stand_in_the_generation_config(tmp_path):
    model = tiny_tidar()
    model.generation_config.exact = "tie-safe"
    model.generation_config.tie_margin = 1e9
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    output = loaded.generate(random_prompts(1, 4), max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    assert output.num_tie_forwards > 0


def test_the_attention_implementation_is_left_as_it_was():
    model = half()
    texts(model, random_prompts(1, 5), exact="tie-safe", max_new_tokens=5)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())
