"""Drafting changes the number of forwards and not the text."""

import itertools

import pytest
import torch

from helpers_tidar import FAMILIES, CountedForwards, plain_greedy_loop, random_prompts, script_drafts, tiny_tidar
from wavedraft.generation.drafting.draft_cache import stack_rows
from wavedraft.generation.drafting.draft_network import new_network
from wavedraft.generation.drafting.draft_step import StepState, draft_inputs
from wavedraft.generation.drafting.step_runner import StepRunner
from wavedraft.generation.stock_model import CACHE


@pytest.mark.parametrize("draft_length", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_plain_loops(family, draft_length):
    model = tiny_tidar(family, draft_length)
    for seed in range(3):
        prompt_ids = random_prompts(1, 7, seed)
        expected_ids = plain_greedy_loop(model, prompt_ids[0], num_new=40)

        output = model.generate(prompt_ids, max_new_tokens=40, do_sample=False, return_dict_in_generate=True)

        assert output.sequences[0].tolist() == expected_ids.tolist()
        assert output.num_forwards <= 39


@pytest.mark.parametrize("draft_length", [1, 2, 5, 8])
def test_a_shorter_draft_than_the_taught_one_gives_the_same_text(draft_length):
    model = tiny_tidar("qwen3", draft_length=8)
    prompt_ids = random_prompts(1, 5)
    expected_ids = plain_greedy_loop(model, prompt_ids[0], num_new=30)
    output = model.generate(prompt_ids, max_new_tokens=30, do_sample=False, draft_length=draft_length)
    assert output[0].tolist() == expected_ids.tolist()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_left_padded_rows_write_what_they_write_alone(implementation):
    model = tiny_tidar("mistral", draft_length=4)
    model.set_attn_implementation(implementation)
    lengths = [3, 9, 1, 6, 12]
    rows = [random_prompts(1, length, seed)[0] for seed, length in enumerate(lengths)]
    input_ids = torch.stack([torch.nn.functional.pad(row, (12 - len(row), 0)) for row in rows])
    attention_mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (12 - len(row), 0)) for row in rows])

    output = model.generate(input_ids, attention_mask=attention_mask, max_new_tokens=30, do_sample=False)

    for row, prompt_ids in zip(output, rows, strict=True):
        assert row[12 - len(prompt_ids) :].tolist() == plain_greedy_loop(model, prompt_ids, num_new=30).tolist()


@pytest.mark.parametrize("draft_length", [2, 4, 8])
def test_perfect_drafts_take_one_forward_for_every_k_tokens(draft_length, monkeypatch):
    model = tiny_tidar(draft_length=draft_length)
    prompt_ids = random_prompts(1, 5)
    text = plain_greedy_loop(model, prompt_ids[0], num_new=60)
    hook = CountedForwards(model)
    script_drafts(monkeypatch, text, is_right=True)
    output = model.generate(
        prompt_ids, max_new_tokens=1 + 3 * draft_length, do_sample=False, return_dict_in_generate=True
    )
    assert output.sequences[0].tolist() == text[: 5 + 1 + 3 * draft_length].tolist()
    assert output.num_forwards == 3
    assert output.tokens_per_forward.tolist() == [draft_length]
    assert output.accepted_lengths[0].tolist() == [0] * (draft_length - 1) + [3]
    queries = draft_length * (draft_length + 1)
    assert hook.num_queries == [5 + draft_length, queries, queries, queries]


def test_drafts_that_are_never_right_cost_one_forward_a_token_and_change_nothing(monkeypatch):
    model = tiny_tidar(draft_length=4)
    prompt_ids = random_prompts(1, 5)
    text = plain_greedy_loop(model, prompt_ids[0], num_new=40)
    script_drafts(monkeypatch, text, is_right=False)
    output = model.generate(prompt_ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    assert output.sequences[0].tolist() == text[:25].tolist()
    assert output.num_forwards == 19
    assert output.tokens_per_forward.tolist() == [1.0]


def test_forwards_are_counted_where_the_network_is_called():
    model = tiny_tidar("qwen2", draft_length=4)
    hook = CountedForwards(model)
    output = model.generate(random_prompts(2, 6), max_new_tokens=25, do_sample=False, return_dict_in_generate=True)
    assert len(hook.num_queries) == output.num_forwards + output.num_prefill_forwards
    assert output.num_prefill_forwards == 1
    assert output.accepted_lengths.sum(dim=1).max() == output.num_forwards


def test_lm_head_runs_on_the_rows_that_are_read():
    draft_length = 4
    model = tiny_tidar(draft_length=draft_length)
    rows_read = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows_read.append(output.shape[:-1].numel()))
    output = model.generate(random_prompts(1, 9), max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    # prefill: the last prompt token and K - 1 masks of its one block; then K draft tokens, and K - 1 masks of a block
    expected = [1 + draft_length - 1] + [draft_length, draft_length - 1] * output.num_forwards
    assert rows_read == expected  # the last step writes a draft, too, that nobody reads


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7, 8, 9])
def test_max_new_tokens_is_never_exceeded(max_new_tokens):
    model = tiny_tidar(draft_length=8)
    prompt_ids = random_prompts(1, 4)
    expected_ids = plain_greedy_loop(model, prompt_ids[0], num_new=max_new_tokens)
    assert model.generate(prompt_ids, max_new_tokens=max_new_tokens)[0].tolist() == expected_ids.tolist()


def test_an_end_inside_an_accepted_run_ends_the_text_there(monkeypatch):
    model = tiny_tidar(draft_length=8)
    prompt_ids = random_prompts(1, 4)
    text = plain_greedy_loop(model, prompt_ids[0], num_new=40)
    script_drafts(monkeypatch, text, is_right=True)
    for place in range(5, 30):
        eos_token_id = int(text[place])
        expected = plain_greedy_loop(model, prompt_ids[0], 40, (eos_token_id, 999)).tolist()
        output = model.generate(prompt_ids, max_new_tokens=40, do_sample=False, eos_token_id=[eos_token_id, 60])
        stop = next((n for n, i in enumerate(expected[4:], start=5) if i in (eos_token_id, 60)), len(expected))
        assert output[0].tolist() == expected[:stop]


def test_rows_end_on_their_own_and_are_padded_after_their_end():
    model = tiny_tidar(draft_length=4)
    prompt_ids = random_prompts(6, 5)
    texts = [plain_greedy_loop(model, row, num_new=30) for row in prompt_ids]
    eos_token_id = int(texts[2][9])
    expected = [plain_greedy_loop(model, row, 30, (eos_token_id,)).tolist() for row in prompt_ids]
    assert len({len(row) for row in expected}) > 1

    output = model.generate(prompt_ids, max_new_tokens=30, do_sample=False, eos_token_id=eos_token_id)

    longest = max(len(row) for row in expected)
    assert output.tolist() == [row + [0] * (longest - len(row)) for row in expected]


def test_nothing_of_the_masks_or_of_rejected_tokens_stays_in_the_cache():
    model = tiny_tidar("qwen3", draft_length=4)
    prompt_ids = random_prompts(1, 6)
    network = new_network(model, 1, mask_embedding_id=3)
    every_branch, length = torch.tensor([[1, 2, 3, 4]]), 6
    with torch.no_grad(), network.form.applied():
        _, _, positions = network.prefill(prompt_ids, None, 4)
        for draft_ids, num_accepted in (([11, 12, 13, 14], 2), ([21, 22, 23, 24], 1)):
            unasked, lengths = torch.zeros(1, 3), torch.tensor([length])
            state = StepState(torch.tensor([draft_ids]), unasked, torch.tensor([4]), unasked, positions, lengths)
            network(draft_inputs(state, every_branch, 4, network.masks))
            network.rows.advance([num_accepted])
            positions, length = positions + num_accepted, length + num_accepted
        kept_ids = torch.cat([prompt_ids, torch.tensor([[11, 12, 21]])], dim=1)
        expected = model(kept_ids, use_cache=True)[CACHE]
    kept = stack_rows([network.rows.cache.row(0, 9)], [9])
    assert network.rows.lengths == [9]
    for layer, expected_layer in zip(kept.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected_layer.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.values, expected_layer.values, atol=1e-5, rtol=1e-5)


def test_a_mask_token_inside_the_vocabulary_is_never_written():
    model = tiny_tidar(draft_length=4)
    prompt_ids = random_prompts(1, 6)
    favourite = int(plain_greedy_loop(model, prompt_ids[0], num_new=1)[-1])
    model.config.tidar_config = {"draft_length": 4, "mask_token_id": favourite, "mask_embedding_id": favourite}
    for draft_length in (4, 0):
        output = model.generate(prompt_ids, max_new_tokens=30, do_sample=False, draft_length=draft_length)
        assert favourite not in output[0, 6:].tolist()


@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True, "seed": 1}])
@pytest.mark.parametrize("num_branches", ["all", 1])
def test_a_step_waits_for_the_device_once(how, num_branches, monkeypatch):
    model, waits, begun = tiny_tidar(draft_length=4), [], []
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, plain=plain, name=name: (waits.append(name), plain(self, *a))[1]
        )
    run_step = StepRunner.__call__

    def noted(run, plan, state):
        begun.append(len(waits))
        after = run_step(run, plan, state)
        assert len(waits) == begun[-1], "a step waits inside"
        return after

    monkeypatch.setattr(StepRunner, "__call__", noted)
    model.generate(random_prompts(2, 6), max_new_tokens=20, num_branches=num_branches, **how)
    assert len(begun) > 5
    assert all(later - earlier == 1 for earlier, later in itertools.pairwise(begun))
