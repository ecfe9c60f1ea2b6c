"""The audit measures whether a recurrent-depth model shares keys across depths, and names the safe policies."""

import itertools

import pytest
import torch

from helpers_recurrent import random_model
from wavedraft.audit import audit
from wavedraft.commands.audit import print_shared_keys
from wavedraft.modeling_recurrent import OuroConfig, OuroForCausalLM, RecurrentCache
from wavedraft.shared_keys import SharedKeys, measure_shared_keys

PROMPTS = [torch.tensor([5, 6, 7, 8]), torch.tensor([12, 13])]


def restless_model():
    """Its states move at every recurrence, and its attention is sharp: what keys are read makes a difference."""
    model = random_model(0)
    with torch.no_grad():
        for block in model.transformer["core_block"]:
            block.attn.Wqkv.weight.mul_(4)
        model.transformer["adapter"].weight[:, : model.config.n_embd].mul_(3)
    return model


def plain_texts(model, options):
    return [model.generate(ids[None], **options)[0, len(ids) :].tolist() for ids in PROMPTS]


@torch.no_grad()
def same_by_hand(model, prompt_ids, text, depth):
    """Token by token, by forwards over a cache of the last keys."""
    cache = RecurrentCache.latest_only(model.config, 1, 64, torch.float32, "cpu")
    model(prompt_ids[None], cache=cache, num_recurrences=depth, init_scale=0.0)
    num_same = 0
    for token, following in itertools.pairwise(text):
        logits = model(torch.tensor([[token]]), cache=cache, num_recurrences=depth, init_scale=0.0).logits
        num_same += int(logits[0, -1].argmax()) == following
    return num_same


@pytest.mark.parametrize("make", [random_model, restless_model])
def test_the_share_is_that_of_forwards_over_a_cache_of_the_last_keys(make):
    model = make() if make is restless_model else make(0)
    plain = {"policy": "autoregressive", "num_recurrences": 6, "init_scale": 0.0}
    texts = plain_texts(model, plain | {"max_new_tokens": 12, "do_sample": False})
    found = measure_shared_keys(model, PROMPTS, texts, plain)
    expected = [same_by_hand(model, ids, text, 6) for ids, text in zip(PROMPTS, texts, strict=True)]
    assert (found.num_same, found.num_tokens) == (sum(expected), 22)
    with torch.no_grad():
        early, late = (
            [model(ids[None], num_recurrences=r, init_scale=0.0, output_hidden_states=True).hidden_states[-1]
             for ids in PROMPTS]
            for r in (5, 6)
        )  # fmt: skip
    moved = [((b - a).norm(dim=-1) / b.norm(dim=-1)).mean() for a, b in zip(early, late, strict=True)]
    assert found.movement == pytest.approx(float(sum(moved)) / 2, rel=1e-4)


def test_a_model_that_needs_the_keys_of_each_depth_is_found():
    found = audit(restless_model(), PROMPTS, plain={"policy": "autoregressive"}, parallel={"policy": "exact"},
                  max_new_tokens=24)  # fmt: skip
    keys = found.shared_keys
    assert found.parallel.num_identical == 2 and keys.share < 0.95 and not keys.is_shared
    assert keys.safe_policies == ["autoregressive", "exact", "self-speculative"]
    assert found.to_dict()["shared_keys"]["safe_policies"] == keys.safe_policies


def test_at_depth_one_there_is_nothing_to_share():
    model = restless_model()
    plain = {"policy": "autoregressive", "num_recurrences": 1}
    texts = plain_texts(model, plain | {"max_new_tokens": 12, "do_sample": False})
    found = measure_shared_keys(model, PROMPTS, texts, plain)
    assert found.share == 1.0 and {"adaptive", "diffusion-forcing", "published"} < set(found.safe_policies)


def test_ouro_is_not_told_to_use_diffusion_forcing():
    model = OuroForCausalLM(OuroConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=37,
                                       intermediate_size=48, total_ut_steps=4)).eval()  # fmt: skip
    found = audit(model, PROMPTS, plain={"policy": "autoregressive"}, parallel={"policy": "exact"}, max_new_tokens=6)
    assert set(found.shared_keys.safe_policies) - {"adaptive"} == {"autoregressive", "exact", "self-speculative"}
    assert found.shared_keys.readers == ["adaptive"]


@pytest.mark.parametrize(("num_same", "is_safe"), [(95, True), (94, False)])
def test_the_command_names_what_is_safe_and_what_is_not(capsys, num_same, is_safe):
    print_shared_keys(SharedKeys(100, num_same, 0.23, reinjects_input=True))
    printed = capsys.readouterr().out
    assert f"{num_same} of 100 next tokens" in printed and "23.0%" in printed
    assert ("not safe: adaptive, diffusion-forcing, published" in printed) == (not is_safe)
