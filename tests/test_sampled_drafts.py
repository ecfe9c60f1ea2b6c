"""The replay of benchmarks/sampled_drafts.py expects the forwards that a decode takes."""

import sys
from pathlib import Path

import pytest
import torch

from helpers_tidar import tiny_tidar, with_random_head

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from sampled_drafts import BLOCK, TOKEN, chances, forwards_for, plain_text, read_text


def test_forwards_follow_from_what_stands():
    assert forwards_for([[0.0, 0.0], [0.0], []]) == 3, "each forward decides one token"
    assert forwards_for([[1.0, 1.0], [1.0], []]) == 1, "all stands"
    assert forwards_for([[0.5], []]) == pytest.approx(1.5)


@pytest.mark.parametrize("has_head", [False, True])
def test_a_greedy_replay_counts_the_forwards_of_the_decode(has_head):
    model = tiny_tidar(vocab_size=6)
    model = with_random_head(model, size=0.1) if has_head else model
    num_saved = 0
    with torch.no_grad():
        for seed in range(8):
            ids = torch.randint(1, 6, (5,), generator=torch.Generator().manual_seed(seed))
            text = plain_text(model, ids, 0.0, 20)
            expected = forwards_for(chances(*read_text(model, ids, text, 4), text, 0.0)[TOKEN])
            output = model.generate(ids[None], max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
            assert expected == output.num_forwards
            num_saved += len(text) - 1 - output.num_forwards
    assert num_saved > 8


def test_a_sampled_replay_expects_the_mean_of_many_decodes():
    """Over all texts, the mean of the forwards to expect is that of decodes. Both are of 300 draws."""
    model, ids = tiny_tidar(vocab_size=6), torch.tensor([1, 2, 3])
    options = {"do_sample": True, "top_k": 0, "return_dict_in_generate": True, "max_new_tokens": 12}
    expected = {TOKEN: 0.0, BLOCK: 0.0}
    with torch.no_grad():
        torch.manual_seed(0)
        for _ in range(300):
            text = plain_text(model, ids, 1.0, 12)
            for rule, stand in chances(*read_text(model, ids, text, 4), text, 1.0).items():
                expected[rule] += forwards_for(stand) / 300
        found = sum(model.generate(ids[None], **options).num_forwards for _ in range(300)) / 300
    assert found == pytest.approx(expected[BLOCK], abs=0.3)
    assert expected[BLOCK] < expected[TOKEN]
