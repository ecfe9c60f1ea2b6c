"""Models of text and images: their text is drafted, and images are read by the stock forward."""

import pytest
import torch

from helpers_composites import COMPOSITES, tiny_composite, with_image

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
