"""The freeze criteria and the rule that freezes positions in order, on numbers small enough to check by hand."""

import pytest
import torch

from wavedraft.generation.recurrent.freezing import (
    count_frozen,
    fixed_recurrences,
    is_resting,
    latent_acceleration,
    latent_difference,
    token_stability,
)


def test_latent_difference_is_the_share_of_a_state_that_moved():
    states, previous = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 3.0], [0.0, 2.0]])
    assert latent_difference(states, previous).tolist() == pytest.approx([0.2, 0.0])


def test_latent_acceleration_of_a_steady_movement_is_none():
    states = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    velocity, previous = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert latent_acceleration(states, velocity, previous).tolist() == pytest.approx([0.0, 0.2])


def test_token_stability_asks_for_more_than_its_patience():
    assert token_stability([0, 8, 9], patience=8) == [False, False, True]


def test_fixed_recurrences_asks_for_enough():
    assert fixed_recurrences([31, 32, 33], enough=32) == [False, True, True]


NO, YES = False, True
# The wavefront is fed a, b, c, d: a is frozen, b, c, d are drafts. "bcde" predicts each of them again.
CASES = {
    "all settled, all drafts stand": ("abcd", "bcde", [YES] * 4, [NO] * 4, 3),
    "a draft that has just changed does not freeze": ("abcd", "bxde", [YES] * 4, [NO] * 4, 1),
    "an unsettled position holds back those after it": ("abcd", "bcde", [YES, NO, YES, YES], [NO] * 4, 0),
    "a token needs its own state settled": ("abcd", "bcde", [YES, YES, NO, NO], [NO] * 4, 1),
    "an unsettled last frozen token holds back all": ("abcd", "bcde", [NO, YES, YES, YES], [NO] * 4, 0),
    "an exhausted position is not waited for": ("abcd", "bcde", [YES, NO, YES, NO], [NO, YES, NO, NO], 1),
    "but what it predicts is": ("abcd", "bcde", [NO] * 4, [YES] * 4, 0),
    "the token after the wavefront waits for its own state": ("a", "b", [YES], [NO], 0),
}
FINAL_CASES = {
    "a final position freezes what it predicts": ("abcd", "xcde", [YES, NO, NO, NO], 1),
    "after frozen tokens only": ("abcd", "bcde", [NO, YES, YES, YES], 0),
    "what follows a changed token is not frozen with it": ("abcd", "xcde", [YES] * 4, 1),
    "all are": ("abcd", "bcde", [YES] * 4, 4),
    "no position after it is needed": ("a", "b", [YES], 1),
}


def letters(*texts):
    return [list(map(ord, text)) for text in texts]


@pytest.mark.parametrize(("fed", "predicted", "settled", "exhausted", "expected"), CASES.values(), ids=list(CASES))
def test_only_a_final_run_from_the_left_freezes(fed, predicted, settled, exhausted, expected):
    assert count_frozen(*letters(fed, predicted), settled, exhausted, [NO] * 4, max_wavefront=128) == expected


@pytest.mark.parametrize(("fed", "predicted", "final", "expected"), FINAL_CASES.values(), ids=list(FINAL_CASES))
def test_final_positions_freeze_in_order_whatever_their_states_do(fed, predicted, final, expected):
    assert count_frozen(*letters(fed, predicted), [NO] * 4, [NO] * 4, final, max_wavefront=128) == expected


def test_only_a_wavefront_of_one_position_freezes_a_token_without_a_state_of_its_own():
    assert count_frozen([1], [2], [YES], [NO], [NO], max_wavefront=1) == 1
    assert count_frozen([1], [2], [NO], [NO], [NO], max_wavefront=1) == 0
    assert count_frozen([1, 2], [2, 3], [YES, YES], [NO, NO], [NO, NO], max_wavefront=2) == 1
    assert count_frozen([1, 2], [2, 3], [YES, NO], [NO, NO], [NO, NO], max_wavefront=2) == 0


def test_a_position_rests_when_it_has_settled_and_has_no_news_for_the_one_after_it():
    assert is_resting(*letters("ab", "bc"), [YES, NO], 0)
    assert not is_resting(*letters("ab", "xc"), [YES, NO], 0)
    assert not is_resting(*letters("ab", "bc"), [YES, NO], 1)
    assert is_resting(*letters("ab", "bc"), [YES, YES], 1)
    assert is_resting(*letters("ab", "bc"), [NO, NO], 2)  # a position that has not begun
