"""Models of text and images: their text is drafted, and images are read by the stock forward."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from helpers_composites import (
    EVERY_COMPOSITE,
    QWEN,
    followed_by,
    ragged,
    second_turn,
    tiny_composite,
    with_image,
)
from helpers_drafts import draft_now_and_then
from helpers_sampling import chi_square_bound
from helpers_tidar import CountedForwards
from wavedraft import TiDARForCausalLM, convert, to_ar
from wavedraft.generation.stock_model import CACHE

PLAIN = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def assert_same(found, expected):
    assert found.sequences.tolist() == expected.sequences.tolist()
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def assert_drafted(found, expected):
    assert_same(found, expected)
    assert found.accepted_lengths[:, 1:].any()  # drafts did stand


def text_alone(batch_size=2):
    ids = torch.randint(1, 57, (batch_size, 9), generator=torch.Generator().manual_seed(1))
    ids[1:, :3] = 0
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


@pytest.mark.parametrize("num_branches", [1, "all"])
@pytest.mark.parametrize("family", EVERY_COMPOSITE)
def test_text_alone_is_the_stock_models(family, num_branches, monkeypatch):
    stock, model = tiny_composite(family)
    for batch_size in (1, 2):
        expected = stock.generate(**text_alone(batch_size), **PLAIN)
        draft_now_and_then(monkeypatch, expected.sequences)
        found = model.generate(**text_alone(batch_size), num_branches=num_branches, **PLAIN)
        assert_drafted(found, expected)


@pytest.mark.parametrize("num_branches", [1, "all"])
@pytest.mark.parametrize("family", EVERY_COMPOSITE)
def test_after_an_image_drafting_goes_on(family, num_branches, monkeypatch):
    stock, model = tiny_composite(family)
    given = with_image(family)
    expected = stock.generate(**given, **PLAIN)
    draft_now_and_then(monkeypatch, expected.sequences)
    counted = CountedForwards(model)
    found = model.generate(**given, num_branches=num_branches, **PLAIN)
    assert_drafted(found, expected)
    assert len(counted.num_queries) == found.num_forwards + found.num_prefill_forwards < 12
    assert all(plan.draft_length for plan in found.plans)  # drafted, not decoded plainly
    without = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    if family == "gemma3":
        without["token_type_ids"] = torch.zeros_like(given["input_ids"])
    assert stock.generate(**without, **PLAIN).logits[0].ne(expected.logits[0]).any()  # the image is seen


@pytest.mark.parametrize("family", EVERY_COMPOSITE)
def test_conversion_takes_the_whole_checkpoint(family, tmp_path):
    stock, _ = tiny_composite(family)
    stock.save_pretrained(tmp_path / "stock")
    result = convert(tmp_path / "stock", tmp_path / "tidar", draft_length=4)
    assert result.proof.max_abs_difference == 0.0 and result.num_layers == stock.config.text_config.num_hidden_layers
    model = TiDARForCausalLM.from_pretrained(tmp_path / "tidar").eval()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "tidar").eval()
    assert type(again) is type(stock)
    for one in (stock, model):
        one.generation_config.pad_token_id, one.generation_config.eos_token_id = 0, None
    given = with_image(family, seed=2)
    expected = stock.generate(**given, **PLAIN)
    assert_same(model.generate(**given, num_branches="all", **PLAIN), expected)
    assert to_ar(tmp_path / "tidar", tmp_path / "back").proof.max_abs_difference == 0.0


@pytest.mark.parametrize("family", EVERY_COMPOSITE)
def test_rows_of_different_lengths_with_an_image_each(family, monkeypatch):
    stock, model = tiny_composite(family)
    given = ragged(family)
    assert not given["attention_mask"].all()
    expected = stock.generate(**given, **PLAIN)
    draft_now_and_then(monkeypatch, expected.sequences)
    for num_branches in (1, "all"):
        assert_drafted(model.generate(**given, num_branches=num_branches, **PLAIN), expected)


@pytest.mark.parametrize("family", EVERY_COMPOSITE)
def test_a_second_turn_of_text_goes_on_from_the_returned_cache(family, monkeypatch):
    stock, model = tiny_composite(family)
    results = []
    for one in (stock, model):
        options = {} if one is stock else {"num_branches": 2}
        first = one.generate(**with_image(family), **PLAIN, **options)
        given = followed_by(with_image(family), first.sequences[:, with_image(family)["input_ids"].shape[1] :])
        given = followed_by(given, torch.tensor([[5, 6, 7, 8]]))
        given = {name: value for name, value in given.items() if value.shape == given["input_ids"].shape}
        results.append(one.generate(**given, **PLAIN, **options, **{CACHE: getattr(first, CACHE)}))
        draft_now_and_then(monkeypatch, results[0].sequences)
    assert_drafted(results[1], results[0])


@pytest.mark.parametrize("family", EVERY_COMPOSITE)
def test_a_second_turn_with_an_image_goes_on_from_the_returned_cache(family, monkeypatch):
    """Qwen's stock class cannot: it counts the places of every image, and would read all of them again."""
    stock, model = tiny_composite(family)
    texts, firsts = [], []
    for one in (stock, model):
        options = {} if one is stock else {"num_branches": 1}
        firsts.append(one.generate(**with_image(family), **PLAIN, **options))
        given = second_turn(family, firsts[-1].sequences) | {CACHE: getattr(firsts[-1], CACHE)}
        if family in QWEN:
            with pytest.raises(StopIteration):
                one.generate(**given, **PLAIN)
            continue
        texts.append(one.generate(**given, **PLAIN, **options))
        draft_now_and_then(monkeypatch, texts[0].sequences)
    if texts:
        assert_drafted(texts[1], texts[0])
        last = {name: value for name, value in given.items() if name not in ("pixel_values", "image_sizes", CACHE)}
        blind = stock.generate(**last, **PLAIN)
        assert blind.logits[0].ne(texts[0].logits[0]).any()  # the images are seen


@pytest.mark.parametrize("family", EVERY_COMPOSITE)
def test_a_prompt_to_be_read_in_chunks_gives_the_same_text(family, monkeypatch):
    """Images cannot be cut: the stock class encodes them before it reads in chunks, and here all is read at once."""
    stock, model = tiny_composite(family)
    given = with_image(family)
    expected = stock.generate(**given, **PLAIN, prefill_chunk_size=6)
    draft_now_and_then(monkeypatch, expected.sequences)
    assert_drafted(model.generate(**given, num_branches=1, **PLAIN, prefill_chunk_size=6), expected)


@pytest.mark.parametrize("family", EVERY_COMPOSITE)
def test_a_row_with_an_image_ends_inside_a_run(family, monkeypatch):
    stock, model = tiny_composite(family)
    given = ragged(family)
    texts = stock.generate(**given, **PLAIN).sequences
    ends = {"eos_token_id": [int(texts[0, -8]), int(texts[1, -5])], "pad_token_id": 0}
    expected = stock.generate(**given, **PLAIN, **ends)
    draft_now_and_then(monkeypatch, texts)
    found = model.generate(**given, num_branches="all", **PLAIN, **ends)
    assert found.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("family", EVERY_COMPOSITE)
def test_texts_sampled_after_an_image_have_the_stock_models_distribution(family):
    stock, model = tiny_composite(family, 3)
    few, num_new, num_draws = 4, 3, 6000
    only = {"suppress_tokens": [*range(few, 61)], "top_k": 0, "temperature": 2.0, "do_sample": True}
    joint = torch.ones(1)
    for step in range(num_new):
        prefixes = [[place // few**i % few for i in reversed(range(step))] for place in range(few**step)]
        rows = []
        for prefix in prefixes:
            given = followed_by(with_image(family), torch.tensor([prefix], dtype=torch.long).view(1, step))
            asked = PLAIN | only | {"max_new_tokens": 1, "output_scores": True}
            rows.append(stock.generate(**given, **asked).scores[0].softmax(-1)[0, :few])
        joint = (joint.flatten()[:, None] * torch.stack(rows)).flatten()
    given = {name: torch.cat([one] * 1000) for name, one in with_image(family).items()}
    counts, asked = torch.zeros(few**num_new), PLAIN | only | {"max_new_tokens": num_new, "output_logits": False}
    torch.manual_seed(1)
    for _ in range(num_draws // 1000):
        new = model.generate(**given, num_branches="all", **asked).sequences[:, -num_new:]
        counts += sum(new[:, i] * few ** (num_new - 1 - i) for i in range(num_new)).bincount(minlength=few**num_new)
    wanted = joint * num_draws
    common = wanted >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([wanted[common], wanted[~common].sum()[None]]).clamp(min=1e-9)
    assert len(wanted) > 8
    assert ((observed - wanted) ** 2 / wanted).sum().item() < chi_square_bound(len(wanted) - 1)


def test_a_family_that_was_not_tried_is_refused_by_name():
    config = AutoConfig.for_model("llama4")
    with pytest.raises(ValueError, match="'llama4' model cannot draft"):
        TiDARForCausalLM.from_config(config)
