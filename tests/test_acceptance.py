"""How much of a draft is accepted, compared with rules written one token at a time."""

import pytest
import torch

from helpers_sampling import chi_square_bound
from wavedraft.generation.acceptance import accept_block, accept_by_equality, sample
from wavedraft.generation.drafting.choice import decided_run
from wavedraft.generation.recurrent.rejection import accept_by_rejection, residual_probs


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


def some_drafts(num, longest, num_ids):
    """Drafts [num, K] of a drafter that differs from the target, after every prefix, and both sides' distributions."""
    generator = torch.Generator().manual_seed(0)
    target, drafter = ((1.4 * torch.randn(num_ids**longest, num_ids, generator=generator)).softmax(-1) for _ in "td")
    ids, prefix = [torch.zeros(num, dtype=torch.long)], torch.zeros(num, dtype=torch.long)
    target_probs, draft_probs = [target[prefix]], []
    for _ in range(longest - 1):
        draft_probs.append(drafter[prefix])
        ids.append(sample(draft_probs[-1], torch.rand(num, generator=generator)))
        prefix = prefix * num_ids + ids[-1] + 1
        target_probs.append(target[prefix])
    return torch.stack(ids, 1), torch.stack(target_probs, 1), torch.stack(draft_probs, 1), target, generator


@pytest.mark.parametrize("num_drafted", [1, 2, 3, 4])
def test_a_block_and_what_follows_it_have_the_targets_distribution(num_drafted):
    """The first three tokens, of which the later ones are drawn from the target where the draft fell before them."""
    num, num_ids = 60_000, 3
    ids, target_probs, draft_probs, target, generator = some_drafts(num, 4, num_ids)
    uniforms = torch.rand(num, 3, generator=generator)
    count, left = accept_block(ids, target_probs, draft_probs, uniforms, torch.full((num,), num_drafted))
    assert set(count.tolist()) == set(range(1, num_drafted + 1))
    decided = decided_run(ids, count, sample(left, torch.rand(num, generator=generator)))
    joint, cell, prefix = torch.ones(1), torch.zeros(num, dtype=torch.long), torch.zeros(num, dtype=torch.long)
    prefixes = torch.zeros(1, dtype=torch.long)
    for i in range(3):
        drawn = sample(target[prefix], torch.rand(num, generator=generator))
        token = torch.where(count > i, decided[:, i], drawn)
        cell, prefix = cell * num_ids + token, prefix * num_ids + token + 1
        joint = (joint[:, None] * target[prefixes]).flatten()
        prefixes = (prefixes[:, None] * num_ids + torch.arange(num_ids) + 1).flatten()
    expected = joint * num
    assert expected.min() > 5
    statistic = ((cell.bincount(minlength=num_ids**3) - expected) ** 2 / expected).sum()
    assert statistic < chi_square_bound(num_ids**3 - 1)


def test_a_block_stands_as_far_as_its_worst_run_up_to_there():
    """The chance is that of the least likely end of the run, under the target beside the drafter, and at most 1. Token
    by token fewer stand."""
    ids, target_probs, draft_probs, _, generator = some_drafts(20_000, 4, 3)
    all_drafted, uniforms = torch.full((len(ids),), 4), torch.rand(20_000, 3, generator=generator)
    count, _ = accept_block(ids, target_probs, draft_probs, uniforms, all_drafted)
    drawn = ids[:, 1:, None]
    ratios = (target_probs[:, :-1].gather(2, drawn) / draft_probs.gather(2, drawn))[..., 0]
    for i in range(1, 4):
        chance = torch.stack([ratios[:, j:i].prod(1) for j in range(i)], 1).amin(1).clamp(max=1)
        assert (count > i).float().mean().item() == pytest.approx(chance.mean().item(), abs=0.015)
    by_token = accept_by_rejection(ids, target_probs, draft_probs, uniforms)
    assert count.float().mean() > 1.03 * by_token.float().mean()


def test_rows_of_a_block_end_where_their_drafts_end():
    ids, target_probs, draft_probs, _, generator = some_drafts(400, 4, 3)
    uniforms, lengths = torch.rand(400, 3, generator=generator), torch.arange(400) % 4 + 1
    count, left = accept_block(ids, target_probs, draft_probs, uniforms, lengths)
    assert (count <= lengths).all()
    for n in range(1, 5):
        rows = lengths == n
        probs = target_probs[rows, :n], draft_probs[rows, : n - 1]
        alone, left_alone = accept_block(ids[rows, :n], *probs, uniforms[rows, : n - 1], lengths[rows])
        assert alone.tolist() == count[rows].tolist()
        torch.testing.assert_close(left_alone, left[rows])


def test_two_equal_distributions_accept_all_and_go_on_from_the_target():
    ids, target_probs, _, _, generator = some_drafts(50, 3, 3)
    uniforms, lengths = torch.rand(50, 2, generator=generator), torch.full((50,), 3)
    count, left = accept_block(ids, target_probs, target_probs[:, :-1], uniforms, lengths)
    assert count.tolist() == [3] * 50
    torch.testing.assert_close(left, target_probs[:, -1])


def test_a_draw_never_gives_an_id_of_probability_zero():
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).expand(5, -1)
    uniforms = torch.tensor([0.0, 0.2999, 0.3001, 0.9, 1 - 2**-24])
    assert sample(probs, uniforms).tolist() == [1, 1, 3, 3, 3]


def test_draws_follow_the_probabilities():
    probs = torch.tensor([0.1, 0.2, 0.0, 0.7])
    uniforms = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    counts = sample(probs.expand(40_000, -1), uniforms).bincount(minlength=4)
    assert (counts / 40_000 - probs).abs().max() < 0.01
