"""Drafts copied from the text: they change the number of forwards and never the text."""

import random
from pathlib import Path

import pytest
import torch

from helpers_marks import slow_but
from helpers_sampling import NUM_DRAWS, SMALL_VOCABULARY, chi_square_bound, draw, exact_joint
from helpers_tidar import plain_greedy_loop, ragged, random_prompts, script_drafts, tiny_tidar
from wavedraft.generation.drafting import copied_drafts, decode_tidar
from wavedraft.generation.drafting.copied_drafts import LONGEST, Repeats, with_copies
from wavedraft.generation.drafting.draft_planner import Acceptance, DraftPlanner, StepTimes
from wavedraft.generation.drafting.draft_step import PLAIN, Plan, StepState
from wavedraft.training.trainer_tidar import measure_drafting

LONG = {"max_new_tokens": 40, "do_sample": False, "draft_copies": True, "return_dict_in_generate": True}


def longest_repetition(ids: list[int]) -> int:
    """By definition: how many of the last tokens stand, in order, somewhere before; 0 for fewer than two."""

    def length_at(place: int) -> int:
        return max(n for n in range(min(place, LONGEST) + 1) if ids[place - n : place] == ids[len(ids) - n :])

    longest = max(map(length_at, range(1, len(ids))), default=0)
    return longest if longest > 1 else 0


@pytest.mark.parametrize("num_letters", [2, 3, 8])
def test_the_longest_repetition_is_the_one_that_a_search_of_all_places_finds(num_letters):
    draws = random.Random(num_letters)
    text = Repeats([])
    for _ in range(30):
        text.add(draws.randrange(num_letters))
        assert text.length == longest_repetition(text.ids)
        if text.length:
            assert text.ids[text.source - text.length : text.source] == text.ids[-text.length :]


def copied_ids(ids: list[int], num_tokens: int, excluded_id: int | None = None) -> list[int]:
    return [token for token, _ in Repeats(ids).copy(num_tokens, excluded_id)]


def test_a_copy_is_what_followed_and_reads_on_in_itself():
    assert copied_ids([5, 6, 7, 8, 9, 5, 6], 3) == [7, 8, 9]
    assert copied_ids([5, 6, 5, 6], 5) == [5, 6, 5, 6, 5]
    assert copied_ids([5, 6, 7, 5, 8], 5) == []
    assert copied_ids([5], 5) == []


def test_a_copy_ends_before_the_id_that_is_never_written():
    assert copied_ids([5, 6, 7, 60, 9, 5, 6], 4, excluded_id=60) == [7]


def test_chances_are_how_often_a_repetition_of_that_length_went_on():
    text = Repeats([1, 2, 3, 9, 1, 2, 4, 1, 2, 4, 7, 1, 2])  # after [1, 2]: no, yes; after [1, 2, 4]: no
    first_guesses = [2 / 4, 3 / 5, 4 / 6]
    seen_and_stood = [(2, 1), (1, 0), (0, 0)]
    expected = [(n + 2 * guess) / (m + 2) for guess, (m, n) in zip(first_guesses, seen_and_stood, strict=True)]
    assert [chance for _, chance in text.copy(3, None)] == pytest.approx(expected)


@pytest.mark.parametrize("family", slow_but({"llama", "gemma2"}, ("llama", "qwen3", "mistral", "gemma2")))
@pytest.mark.parametrize("num_branches", ["all", 1, "auto"])
def test_greedy_texts_of_padded_rows_are_the_plain_loops(family, num_branches):
    model, batch = tiny_tidar(family), ragged()
    found = model.generate(**batch, **LONG, num_branches=num_branches)
    for row, ids in enumerate(batch["input_ids"]):
        prompt = ids[batch["attention_mask"][row].bool()]
        assert found.sequences[row, 7:].tolist() == plain_greedy_loop(model, prompt, 40)[len(prompt) :].tolist()


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("num_branches", ["all", 1])
def test_where_masks_are_always_wrong_copies_still_stand(monkeypatch, cache, num_branches):
    """With one branch, no draft is left after each miss: a copy fills the gap."""
    model, prompt = tiny_tidar(), random_prompts(1, 7)
    text = plain_greedy_loop(model, prompt[0], 44)
    script_drafts(monkeypatch, text, is_right=False, sureness=20.0)
    options = LONG | {"num_branches": num_branches, "cache_implementation": cache}
    without = model.generate(prompt, **options | {"draft_copies": False})
    found = model.generate(prompt, **options)
    assert found.sequences[0].tolist() == text[:47].tolist()
    assert without.num_forwards == 39
    assert found.num_forwards < 32
    assert found.accepted_lengths[0, 3] > 0


def test_a_copy_stays_out_where_the_record_expects_more_of_masks(monkeypatch):
    model, prompt, copied = tiny_tidar(), random_prompts(1, 7), copies_made(monkeypatch)
    for chance, has_copies in ((0.99, False), (0.1, True)):
        model.generation_config.draft_acceptance = {"chances": [chance] * 3}
        model.generate(prompt, **LONG)
        assert bool(copied) == has_copies


def test_an_end_token_inside_a_copy_ends_the_row():
    model, prompts = tiny_tidar(), random_prompts(3, 7)
    endless = model.generate(prompts, **LONG).sequences[:, 7:].tolist()
    for row, place in ((0, 30), (1, 25), (2, 38)):
        end = endless[row][place]
        found = model.generate(prompts, **LONG, eos_token_id=end, pad_token_id=0).sequences
        for text, one in zip(found, prompts, strict=True):
            expected = plain_greedy_loop(model, one, 40, (end,))
            assert text[: len(expected)].tolist() == expected.tolist()
            assert not text[len(expected) :].any()


@pytest.mark.parametrize("processors", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}])
def test_processors_read_the_prefix_that_a_copied_token_really_has(processors):
    model, prompts = tiny_tidar("qwen3"), random_prompts(3, 7).repeat(1, 2)
    plain = model.generate(prompts, **LONG, **processors | {"draft_length": 0})
    assert model.generate(prompts, **LONG, **processors).sequences.tolist() == plain.sequences.tolist()


def test_a_callers_own_processor_is_asked_in_order():
    model, prompts, asked = tiny_tidar(), random_prompts(2, 7).repeat(1, 2), {True: [], False: []}
    for copies, seen in asked.items():
        own = [lambda ids, scores, seen=seen: seen.append(ids.tolist()) or scores]
        model.generate(prompts, **LONG | {"draft_copies": copies}, logits_processor=own)
    assert asked[True] == asked[False]


REPETITIVE = torch.tensor([[1, 2, 3, 1, 2]])


@pytest.mark.parametrize("num_branches", ["all", 1])
def test_joint_distribution_of_three_tokens_is_plain_samplings(num_branches, monkeypatch):
    model, copied = sampled_tidar(), copies_made(monkeypatch)
    statistic, bound = statistic_of(model, num_branches=num_branches)
    assert statistic < bound
    assert len(copied) > 1


def test_the_test_would_notice_copies_that_pass_for_draws_of_the_masks(monkeypatch):
    """The same statistic where the copy's draft distribution stays the masks'."""
    honest = copied_drafts.with_copies
    monkeypatch.setattr(
        copied_drafts, "with_copies", lambda state, copies: honest(state, copies)._replace(draft_probs=uniform(state))
    )
    statistic, bound = statistic_of(sampled_tidar(), num_branches="all")
    assert statistic > 2 * bound


def uniform(state: StepState) -> torch.Tensor:
    return torch.full((len(state.draft_ids), 2, SMALL_VOCABULARY), 1 / SMALL_VOCABULARY)


def sampled_tidar():
    return tiny_tidar(draft_length=3, vocab_size=SMALL_VOCABULARY, initializer_range=0.12)


def statistic_of(model, **options) -> tuple[float, float]:
    """Chi-square of 8,000 draws against the enumerated probabilities, and the bound that an exact sampler keeps."""
    expected = exact_joint(model, REPETITIVE, 3, top_k=0).flatten() * NUM_DRAWS
    counts = draw(model, REPETITIVE, 3, NUM_DRAWS, seed=0, top_k=0, draft_copies=True, **options).flatten()
    return ((counts - expected) ** 2 / expected).sum().item(), chi_square_bound(len(expected) - 1)


def copies_made(monkeypatch) -> list:
    made, honest = [], copied_drafts.with_copies
    monkeypatch.setattr(
        copied_drafts, "with_copies", lambda state, copies: made.append(copies) or honest(state, copies)
    )
    return made


def test_a_row_with_its_own_seed_writes_the_same_in_any_batch(monkeypatch):
    model, copied, seeds = tiny_tidar("qwen3"), copies_made(monkeypatch), [11, 7, 11]
    batch = ragged()
    batch["input_ids"][:, 4:] = batch["input_ids"][:, 2:5]
    how = {"do_sample": True, "max_new_tokens": 30, "temperature": 0.3, "draft_copies": True}
    together = model.generate(**batch, **how, seed=seeds)
    assert copied
    for row, seed in enumerate(seeds):
        start = int((batch["attention_mask"][row] == 0).sum())
        alone = model.generate(batch["input_ids"][row : row + 1, start:], **how, seed=[seed])
        assert alone[0].tolist() == together[row, start:].tolist()


def test_a_copy_takes_its_rows_place_in_a_state():
    vocab_size = 7
    state = StepState(
        torch.tensor([[1], [2]]),
        torch.empty(2, 0),
        torch.ones(2, dtype=torch.long),
        torch.empty(2, 0, vocab_size),
        torch.tensor([[4], [4]]),
        torch.tensor([4, 4]),
    )
    found = with_copies(state, {1: [(5, 0.5), (6, 0.25)]})
    assert found.draft_ids.tolist() == [[1, 0, 0], [2, 5, 6]]
    assert found.confidence.tolist() == [[0, 0], [0.5, 0.25]]
    assert found.num_drafted.tolist() == [1, 3]
    assert found.draft_probs[1].argmax(-1).tolist() == [5, 6]
    assert found.draft_probs.sum(-1).tolist() == [[0, 0], [1, 1]]
    assert state.num_drafted.tolist() == [1, 1]


def timed_planner(seconds_a_query: float) -> DraftPlanner:
    plan = Plan(4, 1)
    times = StepTimes()
    for length in (1, 5):
        for _ in range(3):
            times.see(PLAIN, length, 1 + length * seconds_a_query)
            times.see(plan, length, 1 + (length + 4) * seconds_a_query)
    return DraftPlanner(times, [plan], [0.5] * 3, Acceptance([0.0] * 3, [0.0] * 3), num_rows=2)


def test_the_planner_reads_as_much_of_a_copy_as_pays():
    assert timed_planner(0.01).num_copied(PLAIN, [[0.9, 0.9, 0.9]]) == 3
    assert timed_planner(0.3).num_copied(PLAIN, [[0.9, 0.05, 0.05]]) == 1
    assert timed_planner(10.0).num_copied(PLAIN, [[0.5, 0.5, 0.5]]) == 0


def test_copies_are_read_as_far_as_they_help_the_slowest_row():
    copy = [0.9, 0.9, 0.9]
    assert timed_planner(0.3).num_copied(PLAIN, [copy, copy]) == 3
    assert timed_planner(0.3).num_copied(PLAIN, [copy, [0.9, 0.9]]) == 2
    assert timed_planner(0.3).num_copied(PLAIN, [copy, [0.05, 0.9]]) == 0
    assert timed_planner(0.0).num_copied(PLAIN, [copy, []]) == 0


def test_copies_tell_the_planner_nothing_of_masks():
    planner, plan = timed_planner(0.01), Plan(4, 1)
    planner.saw(plan, [0, 3], 4, [4, 2])
    assert planner.own.reached == planner.usual.reached == [1, 1, 0]
    assert planner.own.stood == [1, 0, 0]
    assert planner.usual.brought[plan][0] == 2
    planner.saw(plan, [0, 0], 4, [4, 4])
    assert planner.own.stood == [1, 0, 0]
    assert planner.usual.brought[plan][0] == 2
    assert planner.usual.num_plain == 1


def test_auto_hands_the_planner_no_copy_as_a_draft_of_the_masks(monkeypatch):
    model, prompt, copied, seen = tiny_tidar(), random_prompts(1, 7), copies_made(monkeypatch), []
    planner_of = decode_tidar.planner_of

    def watched(*about):
        planner = planner_of(*about)
        monkeypatch.setattr(planner, "saw", lambda plan, num_drafted, *rest: seen.append(num_drafted))
        return planner

    monkeypatch.setattr(decode_tidar, "planner_of", watched)
    model.generate(prompt, **LONG)
    assert copied
    assert seen.count([0]) == len(copied)


def test_an_evaluation_measures_masks_alone(monkeypatch):
    model, copied = tiny_tidar(), copies_made(monkeypatch)
    model.generation_config.draft_copies = True
    model.generate(random_prompts(1, 7), max_new_tokens=40)
    assert copied
    copied.clear()
    measure_drafting(model, [random_prompts(1, 7)[0]], 40)
    assert not copied


def test_a_gain_has_an_interval_over_prompts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from drafting import Decoded, gain

    without = [Decoded(60, 30, 0, True)] * 4
    assert gain(without, [Decoded(60, 20, 0, True)] * 4) == (1.5, 1.5, 1.5)
    mean, low, high = gain(without, [Decoded(60, 20, 0, True), Decoded(60, 30, 0, True)] * 2)
    assert low == 1 and mean == pytest.approx(1.2) and high == 1.5


@pytest.mark.parametrize("given", [1, "yes", 0])
def test_what_is_neither_true_nor_false_is_refused_by_name(given):
    with pytest.raises(ValueError, match="draft_copies"):
        tiny_tidar().generate(random_prompts(1, 4), max_new_tokens=3, draft_copies=given)
