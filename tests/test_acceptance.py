"""How much of a draft is accepted, compared with rules written one token at a time."""

import pytest
import torch

from wavedraft.generation.acceptance import accept_by_equality, accept_by_rejection, residual_probs, sample
from wavedraft.generation.drafting.choice import decided_run


@pytest.mark.parametrize(
    ("draft", "target", "accepted"),
    [
        ([5, 6, 7], [6, 7, 9], 3),
        ([5, 6, 7], [6, 8, 9], 2),
        ([5, 6, 7], [1, 7, 9], 1),
        ([5, 6, 7], [1, 2, 3], 1),
        ([5], [6], 1),
    ],
)
def test_the_longest_agreeing_run_is_accepted(draft, target, accepted):
    assert accept_by_equality(torch.tensor([draft]), torch.tensor([target])).tolist() == [accepted]


def test_rows_accept_at_their_own_pace():
    draft, target = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([[2, 3, 4], [9, 3, 4]])
    assert accept_by_equality(draft, target).tolist() == [3, 1]


def test_what_a_forward_decides_ends_with_the_models_own_token():
    decided = decided_run(torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([1, 3]), torch.tensor([8, 9]))
    assert decided[0, :1].tolist() == [8]
    assert decided[1].tolist() == [2, 3, 9]


def test_rejection_follows_the_ratio_of_target_to_draft():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(200, 4, 6, generator=generator).softmax(-1)
    draft = torch.rand(200, 3, 6, generator=generator).softmax(-1)
    ids = torch.randint(0, 6, (200, 4), generator=generator)
    uniforms = torch.rand(200, 3, generator=generator)
    expected = []
    for row in range(200):
        accepted = 1
        while accepted < 4:
            token = ids[row, accepted]
            if uniforms[row, accepted - 1] >= target[row, accepted - 1, token] / draft[row, accepted - 1, token]:
                break
            accepted += 1
        expected.append(accepted)
    assert accept_by_rejection(ids, target, draft, uniforms).tolist() == expected
    assert len(set(expected)) == 4


def test_residual_is_the_normalised_positive_part_or_the_target_itself():
    target = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]])
    draft = torch.tensor([[[0.2, 0.7, 0.1]]])
    rejected = residual_probs(target, draft, torch.tensor([1]))
    torch.testing.assert_close(rejected, torch.tensor([[0.75, 0.0, 0.25]]))
    all_accepted = residual_probs(target, draft, torch.tensor([2]))
    torch.testing.assert_close(all_accepted, target[:, 1])


def test_residual_of_two_equal_distributions_is_the_target():
    target = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
    torch.testing.assert_close(residual_probs(target, target[:, :1], torch.tensor([1])), target[:, 0])


def test_a_draw_never_gives_an_id_of_probability_zero():
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).expand(5, -1)
    uniforms = torch.tensor([0.0, 0.2999, 0.3001, 0.9, 1 - 2**-24])
    assert sample(probs, uniforms).tolist() == [1, 1, 3, 3, 3]


def test_draws_follow_the_probabilities():
    probs = torch.tensor([0.1, 0.2, 0.0, 0.7])
    uniforms = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    counts = sample(probs.expand(40_000, -1), uniforms).bincount(minlength=4)
    assert (counts / 40_000 - probs).abs().max() < 0.01
