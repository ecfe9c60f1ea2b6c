"""TiDAR over a recurrent-depth model: drafts with masks, verified at full depth, give the text of full depth."""

import itertools
import math

import pytest
import torch
from transformers import DynamicCache

from stock_recurrent import drafting_model, num_masks_of
from teach import rows_of_text, teach
from wavedraft import RecurrentDepthForCausalLM, TiDARForCausalLM, convert
from wavedraft.generation.stock_model import CACHE
from wavedraft.modeling_recurrent import OuroConfig, OuroForCausalLM, RecurrentDepthConfig

torch.set_num_threads(1)
VOCAB_SIZE = 37
FORMS = ["sandwich", "pre-norm", "post-norm", "ouro"]


def plain_model(form="sandwich", **changes):
    """A tiny plain model with large random weights, so that its texts vary."""
    torch.manual_seed(0)
    if form == "ouro":
        config = OuroConfig(
            vocab_size=VOCAB_SIZE, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=6, total_ut_steps=4, **changes,
        )  # fmt: skip
        model = OuroForCausalLM(config)
    else:
        sizes = {"n_embd": 24, "n_heads": 3, "intermediate_size": 40, "vocab_size": VOCAB_SIZE, "block_size": 160}
        sizes |= {"n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 3, "n_layers_in_coda": 1}
        sizes |= {"mean_recurrence": 6} | ({} if form == "sandwich" else {"block_form": form, "qk_bias": False})
        model = RecurrentDepthForCausalLM(RecurrentDepthConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                size = 1 if "wte" in name or "embed" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn_like(parameter) * size)
    return model.eval()


def prompts(batch_size, length, seed=0):
    return torch.randint(1, VOCAB_SIZE, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain_text(model, ids, num_new):
    """Greedy text of one row [P] by definition: no cache, no draft."""
    for _ in range(num_new):
        ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
    return ids.tolist()


def core_widths(model):
    """A list that records the widths of all later core steps."""
    widths = []
    model.transformer["adapter"].register_forward_hook(lambda m, args, output: widths.append(args[0].shape[1]))
    return widths


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("draft_length", "mask_recurrences"), [(1, None), (4, None), (4, 1), (3, 2)])
def test_greedy_text_is_that_of_full_depth(form, draft_length, mask_recurrences):
    plain, prompt_ids = plain_model(form), prompts(1, 6)
    model = drafting_model(plain, draft_length, 3, mask_recurrences)
    expected = plain_text(plain, prompt_ids[0], 16)
    output = model.generate(prompt_ids, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    assert output.sequences[0].tolist() == expected and output.num_forwards <= 15
    own = plain.generate(prompt_ids, max_new_tokens=16, do_sample=False, policy="autoregressive")
    undrafted = model.generate(prompt_ids, max_new_tokens=16, do_sample=False, draft_length=0)
    assert own[0].tolist() == undrafted[0].tolist() == expected


@pytest.mark.parametrize(("mask_recurrences", "attn_implementation"), [(None, "sdpa"), (2, "sdpa"), (2, "eager")])
def test_the_rows_of_a_ragged_batch_are_the_rows_alone(mask_recurrences, attn_implementation):
    model = drafting_model(plain_model(), 4, 3, mask_recurrences)
    model.set_attn_implementation(attn_implementation)
    ids, lengths = prompts(4, 9), [9, 5, 2, 7]
    mask = torch.stack([(torch.arange(9) >= 9 - length).long() for length in lengths])
    ids = ids.masked_fill(mask == 0, 0)
    eos = int(model.generate(ids[:1], max_new_tokens=9, do_sample=False)[0, -1])  # row 0 leaves the batch early
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    for branches in ({}, {"num_branches": 1}):
        together = model.generate(ids, attention_mask=mask, **options, **branches)
        for row, length in enumerate(lengths):
            alone = model.generate(ids[row : row + 1, 9 - length :], **options)[0, length:].tolist()
            own = together[row, 9:].tolist()
            assert own[: len(alone)] == alone and not any(own[len(alone) :])


@pytest.mark.parametrize(("draft_length", "mask_recurrences"), [(3, None), (2, 1)])
def test_samples_have_the_exact_distribution_of_full_depth(draft_length, mask_recurrences):
    config = RecurrentDepthConfig(
        vocab_size=5, n_embd=16, n_heads=2, intermediate_size=16, n_layers_in_prelude=1, block_size=32,
        n_layers_in_recurrent_block=1, n_layers_in_coda=1, mean_recurrence=3, tie_embeddings=False, pad_token_id=0,
        init_values={"std": 0.14, "embed_scale": 1.0},
    )  # fmt: skip
    torch.manual_seed(0)
    plain = RecurrentDepthForCausalLM(config).eval()
    model, num_draws, prompt = drafting_model(plain, draft_length, 3, mask_recurrences), 6000, [1, 4, 2, 3]
    texts = list(itertools.product(range(5), repeat=3))
    with torch.no_grad():
        log_probs = (plain(torch.tensor([[*prompt, *text] for text in texts])).logits[:, 3:6] / 0.9).log_softmax(-1)
    expected = log_probs.gather(-1, torch.tensor(texts)[..., None]).sum(dim=(1, 2)).exp() * num_draws
    assert expected.max() < num_draws / 2, "a nearly certain continuation would prove nothing"

    options = {"max_new_tokens": 3, "do_sample": True, "temperature": 0.9, "top_k": 0, "seed": draft_length}
    drawn = model.generate(torch.tensor([prompt] * num_draws), eos_token_id=None, **options)[:, 4:]
    observed = torch.bincount(drawn @ torch.tensor([25, 5, 1]), minlength=125).float()

    is_common = expected >= 5
    observed, expected = (
        torch.cat([counts[is_common], counts[~is_common].sum()[None]]) for counts in (observed, expected)
    )
    freedom = len(expected) - 1
    assert ((observed - expected) ** 2 / expected.clamp(min=1)).sum() < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_masks_leave_the_core_early():
    plain = plain_model()
    model, prompt_ids = drafting_model(plain, 4, 3, mask_recurrences=2), prompts(1, 5)
    widths, depth = core_widths(model), plain.config.mean_recurrence
    output = model.generate(
        prompt_ids, max_new_tokens=12, do_sample=False, num_branches=1, return_dict_in_generate=True
    )
    steps = [widths[i : i + depth] for i in range(0, len(widths), depth)]
    assert len(steps) == output.num_forwards + 1
    for whole, *rest in steps[1:-1]:
        num_clean = rest[-1]
        assert rest == [whole] + [num_clean] * (depth - 2) and (whole, num_clean) in ((4 + 4, 4), (1 + 4, 1))


def test_masks_are_told_by_what_they_see():
    for form in (torch.ones(4, 6, dtype=torch.bool), torch.zeros(4, 6)):  # sdpa's, eager's
        hidden = False if form.dtype == torch.bool else torch.finfo().min
        causal = form.masked_fill(~torch.ones(4, 6, dtype=torch.bool).tril(2), hidden)[None, None]
        with_masks = causal.clone()
        with_masks[..., 2:, :] = form[2:]
        assert (num_masks_of(causal), num_masks_of(with_masks), num_masks_of(None)) == (0, 2, 0)
    with pytest.raises(ValueError, match="`attn_implementation` must be 'sdpa' or 'eager'"):
        num_masks_of(object())


@pytest.mark.parametrize("mask_recurrences", [None, 2])
def test_a_conversation_goes_on_from_the_cache_of_every_recurrence(mask_recurrences):
    model = drafting_model(plain_model(), 4, 3, mask_recurrences)
    first = model.generate(prompts(1, 5), max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    cache = first[CACHE]
    assert type(cache) is DynamicCache and len(cache.layers) == model.num_cache_layers == 1 + 1 + 6 * 3
    longer = torch.cat([first.sequences, prompts(1, 3, seed=5)], dim=1)
    whole = model.generate(longer, max_new_tokens=9, do_sample=False)
    with torch.no_grad():
        plain_cache = model(longer[:, :11], use_cache=True)[CACHE]
    for given in (cache, plain_cache):
        widths = core_widths(model)
        assert torch.equal(model.generate(longer, max_new_tokens=9, do_sample=False, **{CACHE: given}), whole)
        assert widths[0] < longer.shape[1]


def test_what_its_generate_cannot_do_is_refused_and_the_end_of_the_position_table_is_kept():
    plain, ids = plain_model(block_size=24), prompts(1, 6)
    model = drafting_model(plain, 4, 3)
    with pytest.raises(ValueError, match="`cache_implementation` must be left out"):
        model.generate(ids, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ValueError, match=f"`{CACHE}` must be a `DynamicCache`"):
        cache = plain.generate(ids, max_new_tokens=4, return_dict_in_generate=True)[CACHE]
        model.generate(torch.cat([ids, ids], dim=1), max_new_tokens=4, **{CACHE: cache})
    expected = plain_text(model, ids[0], 18)
    assert model.generate(ids, max_new_tokens=18, do_sample=False)[0].tolist() == expected
    with pytest.raises(ValueError, match="at most 24 tokens"):
        model.generate(ids, max_new_tokens=25, do_sample=False)
    with pytest.raises(ValueError, match="`mask_recurrences` must be between 1 and 6"):
        drafting_model(plain, 4, 3, mask_recurrences=7)


@pytest.mark.parametrize("mask_recurrences", [None, 2])
def test_a_gated_adapter_is_taught_to_draft_and_leaves_the_text_alone(tmp_path, mask_recurrences):
    plain = plain_model(mean_recurrence=4, mean_backprop_depth=2)
    ids = prompts(1, 6)
    text = plain.generate(ids, max_new_tokens=24, do_sample=False, policy="autoregressive", eos_token_id=None)
    model = drafting_model(plain, 4, 3, mask_recurrences)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    options |= {"num_branches": "all"}
    untaught = model.generate(ids, **options)

    losses = teach(model, text, tmp_path, max_steps=30, batch_size=1, learning_rate=1e-2, rank=16)

    assert losses[-1] < losses[0] / 2
    fresh = drafting_model(plain, 4, 3, mask_recurrences)
    logits = fresh(text).logits
    fresh.load_adapter(tmp_path)
    assert torch.equal(fresh(text).logits, logits)
    taught = fresh.generate(ids, **options)
    assert torch.equal(taught.sequences, untaught.sequences)
    assert taught.num_forwards < 0.8 * untaught.num_forwards


def test_rows_of_text_are_of_one_length():
    assert rows_of_text(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_product_refuses_it_by_name(tmp_path):
    plain = plain_model()
    plain.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"`draft_length` must be left out for a recurrent-depth .*policy='exact'"):
        convert(tmp_path / "source", tmp_path / "target", draft_length=4)
    with pytest.raises(ValueError, match=r"has a recurrent depth.*policy='exact'"):
        TiDARForCausalLM.from_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"has a recurrent depth.*policy='exact'"):
        TiDARForCausalLM.from_config(drafting_model(plain, 4, 3).config)
