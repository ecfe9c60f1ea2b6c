"""Models of text and images: their text is drafted, and images are read by the stock forward."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from helpers_composites import COMPOSITES, tiny_composite, with_image
from wavedraft import TiDARForCausalLM, convert, to_ar

PLAIN = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def assert_same(found, expected):
    assert found.sequences.tolist() == expected.sequences.tolist()
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def text_alone(batch_size=2):
    ids = torch.randint(1, 57, (batch_size, 9), generator=torch.Generator().manual_seed(1))
    ids[1:, :3] = 0
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


@pytest.mark.parametrize("num_branches", [1, "all"])
@pytest.mark.parametrize("family", COMPOSITES)
def test_text_alone_is_the_stock_models(family, num_branches):
    stock, model = tiny_composite(family)
    for batch_size in (1, 2):
        expected = stock.generate(**text_alone(batch_size), **PLAIN)
        found = model.generate(**text_alone(batch_size), num_branches=num_branches, **PLAIN)
        assert_same(found, expected)
        assert found.num_forwards <= 11


@pytest.mark.parametrize("num_branches", [1, "all"])
@pytest.mark.parametrize("family", COMPOSITES)
def test_behind_an_image_drafting_goes_on(family, num_branches):
    stock, model = tiny_composite(family)
    given = with_image(family)
    expected = stock.generate(**given, **PLAIN)
    found = model.generate(**given, num_branches=num_branches, **PLAIN)
    assert_same(found, expected)
    assert all(plan.draft_length for plan in found.plans)  # drafted, not decoded plainly
    without = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    if family == "gemma3":
        without["token_type_ids"] = torch.zeros_like(given["input_ids"])
    assert stock.generate(**without, **PLAIN).logits[0].ne(expected.logits[0]).any()  # the image is seen


@pytest.mark.parametrize("family", COMPOSITES)
def test_conversion_takes_the_whole_checkpoint(family, tmp_path):
    stock, _ = tiny_composite(family)
    stock.save_pretrained(tmp_path / "stock")
    result = convert(tmp_path / "stock", tmp_path / "tidar", draft_length=4)
    assert result.proof.max_abs_difference == 0.0 and result.num_layers == 2
    model = TiDARForCausalLM.from_pretrained(tmp_path / "tidar").eval()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "tidar").eval()
    assert type(again) is type(stock)
    for one in (stock, model):
        one.generation_config.pad_token_id, one.generation_config.eos_token_id = 0, None
    given = with_image(family, seed=2)
    expected = stock.generate(**given, **PLAIN)
    assert_same(model.generate(**given, num_branches="all", **PLAIN), expected)
    assert to_ar(tmp_path / "tidar", tmp_path / "back").proof.max_abs_difference == 0.0


def test_a_family_that_was_not_tried_is_refused_by_name():
    config = AutoConfig.for_model("llama4")
    with pytest.raises(ValueError, match="'llama4' model cannot draft"):
        TiDARForCausalLM.from_config(config)
