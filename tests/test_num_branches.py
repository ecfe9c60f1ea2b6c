"""Drafting for only the likeliest numbers of accepted tokens changes the number of forwards, never the text."""

import itertools

import pytest
import torch

from helpers_marks import slow_but
from helpers_sampling import NUM_DRAWS, SMALL_VOCABULARY, chi_square_bound, draw, exact_joint
from helpers_tidar import CountedForwards, plain_greedy_loop, random_prompts, script_drafts, tiny_tidar
from wavedraft.generation.acceptance import draft_confidence, likely_lengths
from wavedraft.generation.drafting.draft_network import DraftNetwork, new_network
from wavedraft.generation.drafting.draft_step import with_masks
from wavedraft.generation.stock_model import CACHE, lm_head_logits


def test_likely_lengths_are_those_a_loop_finds():
    confidence = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))
    num_drafted = torch.tensor([6] * 30 + [1] * 5 + [3] * 5)
    for num_branches in range(1, 7):
        found = likely_lengths(confidence, num_drafted, num_branches)
        for row, chances in enumerate(confidence.tolist()):
            stops, reached = {}, 1.0
            for length in range(1, 7):
                stands = chances[length - 1] if length < num_drafted[row] else 0.0
                stops[length] = reached * (1 - stands)
                reached *= stands
            best = sorted(stops, key=stops.get, reverse=True)[:num_branches]
            assert len(set(found[row].tolist())) == num_branches
            assert sum(stops[length] for length in found[row].tolist()) == pytest.approx(
                sum(stops[length] for length in best)
            )
            assert found[row].tolist() == sorted(found[row].tolist())
        assert (found[30:35, 0] == 1).all()


def test_confidence_is_the_probability_of_the_drafted_token():
    scores = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    ids = scores.argmax(dim=-1)
    torch.testing.assert_close(draft_confidence(ids, scores), scores.softmax(-1).max(-1).values)


@pytest.mark.parametrize("draft_length, num_branches", [(2, 1), (4, 1), (4, 2), (8, 1), (8, 3), (8, 7)])
@pytest.mark.parametrize("family", slow_but({"llama", "gemma2"}, ("llama", "qwen3", "mistral", "gemma2")))
def test_greedy_text_is_the_plain_loops(family, draft_length, num_branches):
    model = tiny_tidar(family, draft_length)
    hook = CountedForwards(model)
    for seed in range(2):
        prompt_ids = random_prompts(1, 7, seed)
        expected_ids = plain_greedy_loop(model, prompt_ids[0], num_new=30)
        hook.num_queries.clear()
        output = model.generate(
            prompt_ids,
            max_new_tokens=30,
            do_sample=False,
            num_branches=num_branches,
            return_dict_in_generate=True,
        )
        assert output.sequences[0].tolist() == expected_ids.tolist()
        assert len(hook.num_queries) == output.num_forwards + 1 <= 30
        assert set(hook.num_queries[1:]) <= {draft_length * (1 + num_branches), 1 + draft_length}


@pytest.mark.parametrize("num_branches", [1, 2, 4])
def test_a_late_block_drafts_with_the_masks_that_stand_where_the_next_tokens_do(num_branches):
    draft_length = 4
    model = tiny_tidar("llama", draft_length)
    network = new_network(model, 1, mask_embedding_id=3)
    with torch.no_grad(), network.form.applied():
        _, _, position = network.prefill(random_prompts(1, 5), None, draft_length)
    draft_ids, positions = random_prompts(1, draft_length, seed=1), position + torch.arange(draft_length)
    for lengths in itertools.combinations(range(1, draft_length + 1), num_branches):
        branches, cached = torch.tensor([lengths]), torch.tensor([5])
        with torch.no_grad(), network.form.applied():
            _, predictions = network(
                with_masks(draft_ids, positions, branches, cached, draft_length, draft_length, network.masks)
            )
        for num_accepted in range(1, draft_length + 1):
            block = max((i for i, length in enumerate(lengths) if length <= num_accepted), default=None)
            # Mask j = 1..K of a block after `length` tokens predicts token `length` + j of what this forward began.
            wanted = range(num_accepted + 2, num_accepted + 1 + draft_length)
            places = [] if block is None else [target - lengths[block] for target in wanted]
            masks = [block * draft_length + j - 1 for j in places if j <= draft_length]
            with torch.no_grad():
                slots = predictions.after(torch.tensor([num_accepted]))
                expected = lm_head_logits(model, predictions.states[:, masks])
            logits = slots.logits
            assert slots.num_masks.tolist() == [len(masks)]
            assert logits.shape == (1, draft_length - 1, model.config.vocab_size)
            torch.testing.assert_close(logits[:, : len(masks)], expected)


def test_late_blocks_save_forwards(monkeypatch):
    """Unsure drafts, of which two tokens always stand: the block after the first token is two tokens late."""
    model, prompt_ids = tiny_tidar("llama", 8), random_prompts(1, 7)
    text = plain_greedy_loop(model, prompt_ids[0], num_new=42)
    script_drafts(monkeypatch, text, is_right=True, num_right=2)
    output = model.generate(prompt_ids, max_new_tokens=41, num_branches=1, return_dict_in_generate=True)
    assert output.sequences[0].tolist() == text[:48].tolist()
    assert output.accepted_lengths[0].tolist() == [1, 0, 13, 0, 0, 0, 0, 0]  # the first forward has no draft yet


@pytest.mark.parametrize("is_static", [False, True])
def test_on_a_cpu_only_the_paper_s_own_form_reads_masks_after_the_prompt(is_static):
    model, prompt_ids = tiny_tidar("llama", 4), random_prompts(1, 7)
    options = {"cache_implementation": "static"} if is_static else {}
    for num_branches, num_first in ((4, 7 + 4), (3, 7), (1, 7), ("auto", 7)):
        hook = CountedForwards(model)
        model.generate(prompt_ids, max_new_tokens=6, num_branches=num_branches, **options)
        assert hook.num_queries[0] == num_first, num_branches


@pytest.mark.parametrize("num_branches", [1, 2])
def test_left_padded_rows_write_what_they_write_alone(num_branches):
    model = tiny_tidar("mistral", draft_length=4)
    lengths = [3, 9, 1, 6, 12]
    rows = [random_prompts(1, length, seed)[0] for seed, length in enumerate(lengths)]
    input_ids = torch.stack([torch.nn.functional.pad(row, (12 - len(row), 0)) for row in rows])
    attention_mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (12 - len(row), 0)) for row in rows])
    output = model.generate(
        input_ids, attention_mask=attention_mask, max_new_tokens=30, do_sample=False, num_branches=num_branches
    )
    for row, prompt_ids in zip(output, rows, strict=True):
        assert row[12 - len(prompt_ids) :].tolist() == plain_greedy_loop(model, prompt_ids, num_new=30).tolist()


def test_sure_and_perfect_drafts_need_one_branch(monkeypatch):
    model = tiny_tidar(draft_length=4)
    prompt_ids = random_prompts(1, 5)
    text = plain_greedy_loop(model, prompt_ids[0], num_new=60)
    hook = CountedForwards(model)
    script_drafts(monkeypatch, text, is_right=True, sureness=20.0)
    output = model.generate(
        prompt_ids, max_new_tokens=2 + 3 * 4, do_sample=False, num_branches=1, return_dict_in_generate=True
    )
    assert output.sequences[0].tolist() == text[: 5 + 2 + 3 * 4].tolist()
    assert hook.num_queries == [5, 1 + 4, 8, 8, 8]


def test_a_branch_that_was_not_drafted_is_drafted_by_the_next_forward(monkeypatch):
    model = tiny_tidar(draft_length=4)
    prompt_ids = random_prompts(1, 5)
    text = plain_greedy_loop(model, prompt_ids[0], num_new=40)
    hook = CountedForwards(model)
    script_drafts(monkeypatch, text, is_right=False, sureness=20.0)  # sure of 4, and 1 is accepted
    output = model.generate(
        prompt_ids, max_new_tokens=10, do_sample=False, num_branches=1, return_dict_in_generate=True
    )
    assert output.sequences[0].tolist() == text[: 5 + 10].tolist()
    assert hook.num_queries == [5, 5] + [8, 5] * 4
    assert output.accepted_lengths.tolist() == [[9, 0, 0, 0]]


@pytest.mark.parametrize("num_branches", [1, 2])
@pytest.mark.parametrize("processors", [{}, {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}])
def test_processors_scores_ends_and_the_cache_are_plain_decodings(processors, num_branches):
    model = tiny_tidar("qwen3", draft_length=4)
    prompts = random_prompts(3, 6, seed=2)
    keywords = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": [25, 36, 44], "output_scores": True}
    keywords |= {"return_dict_in_generate": True, **processors}
    expected = model.generate(prompts, draft_length=0, **keywords)
    found = model.generate(prompts, num_branches=num_branches, **keywords)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for row, text in enumerate(found.sequences):
        num_new = int((text[6:] != 0).sum())
        for mine, theirs in zip(found.scores[:num_new], expected.scores[:num_new], strict=True):
            torch.testing.assert_close(mine[row], theirs[row], atol=1e-3, rtol=1e-3)
        for mine, theirs in zip(found[CACHE].layers, expected[CACHE].layers, strict=True):
            length = 6 + num_new - 1
            torch.testing.assert_close(mine.keys[row, :, :length], theirs.keys[row, :, :length], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_branches", [1, 2])
def test_joint_distribution_of_three_tokens_is_plain_samplings(num_branches):
    model = tiny_tidar(draft_length=3, vocab_size=SMALL_VOCABULARY, initializer_range=0.12)
    prompt_ids = random_prompts(1, 4) % (SMALL_VOCABULARY - 1) + 1
    expected = exact_joint(model, prompt_ids, 3, top_k=0) * NUM_DRAWS
    counts = draw(model, prompt_ids, 3, NUM_DRAWS, seed=num_branches, top_k=0, num_branches=num_branches)
    is_common = expected >= 5
    observed = torch.cat([counts[is_common], counts[~is_common].sum()[None]])
    expected = torch.cat([expected[is_common], expected[~is_common].sum()[None]])
    assert expected.min() > 1
    assert ((observed - expected) ** 2 / expected).sum().item() < chi_square_bound(len(expected) - 1)


@pytest.mark.parametrize("num_branches", [1, 2])
def test_a_row_with_its_own_seed_writes_the_same_in_any_batch(num_branches):
    model = tiny_tidar("qwen3", draft_length=4)
    prompts = random_prompts(4, 6)
    seeds = [11, 7, 11, 2**40]
    keywords = {"do_sample": True, "max_new_tokens": 25, "num_branches": num_branches}
    together = model.generate(prompts, seed=seeds, **keywords)
    for row, seed in enumerate(seeds):
        alone = model.generate(prompts[row : row + 1], seed=[seed], **keywords)
        assert alone[0].tolist() == together[row].tolist()


def test_half_precision_text_is_plain_decodings_with_one_branch():
    model = tiny_tidar(draft_length=4).to(torch.bfloat16)
    keywords = {"max_new_tokens": 30, "do_sample": False}
    for seed in range(3):
        prompts = random_prompts(1, 9, seed)
        plain = model.generate(prompts, draft_length=0, **keywords).tolist()
        assert model.generate(prompts, num_branches=1, exact="tie-safe", **keywords).tolist() == plain


@pytest.mark.parametrize("num_branches", [0, 5, 1.0, True, "some"])
def test_what_cannot_be_is_refused_by_name(num_branches):
    with pytest.raises(ValueError, match="num_branches"):
        tiny_tidar(draft_length=4).generate(random_prompts(1, 4), max_new_tokens=3, num_branches=num_branches)


@pytest.mark.parametrize("num_branches", ["all", 2, 3])
@pytest.mark.parametrize("cache", [None, "static"])
def test_logits_of_all_masks_read_at_once_draft_what_those_read_later_do(num_branches, cache, monkeypatch):
    """A CPU reads two blocks' masks at once, an accelerator those of more blocks too."""
    model, prompts = tiny_tidar(draft_length=4), random_prompts(3, 6)
    keywords = {"max_new_tokens": 24, "num_branches": num_branches, "cache_implementation": cache}
    keywords |= {"return_dict_in_generate": True}
    reads_all_here, at_once = DraftNetwork.reads_all_masks, []

    def reads_all(self, num_rows, inputs):
        at_once.append(inputs.num_blocks)
        return inputs.num_blocks > 0 and not reads_all_here(self, num_rows, inputs)

    for how in ({"do_sample": False}, {"do_sample": True, "seed": 3}):
        expected = model.generate(prompts, **keywords, **how)
        with monkeypatch.context() as patch:
            patch.setattr(DraftNetwork, "reads_all_masks", reads_all)
            found = model.generate(prompts, **keywords, **how)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found.accepted_lengths.tolist() == expected.accepted_lengths.tolist()
        assert expected.accepted_lengths[:, 1:].sum() > 0 or how["do_sample"]
    assert max(at_once) > 1


@pytest.mark.parametrize(("num_branches", "reads_again"), [(1, False), (2, False), (3, True)])
def test_a_cpu_reads_the_lm_head_again_only_where_many_masks_would_be_read_in_vain(num_branches, reads_again):
    model, calls = tiny_tidar(draft_length=4), []
    hook = model.lm_head.register_forward_hook(lambda *about: calls.append(about))
    given = {"max_new_tokens": 20, "do_sample": False, "packed_weights": False, "return_dict_in_generate": True}
    found = model.generate(random_prompts(1, 6), num_branches=num_branches, **given)
    hook.remove()
    # The step that ends the text needs no drafts, so it never reads the masks again.
    masks_alone = found.num_forwards - 1 if reads_again else 0
    assert len(calls) == found.num_prefill_forwards + found.num_forwards + masks_alone
