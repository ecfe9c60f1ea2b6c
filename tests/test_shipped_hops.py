"""The shipped model that needs its depth: right at full depth on fresh problems, seldom at depth 2."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import depth_tasks

from wavedraft.modeling_recurrent import RecurrentDepthForCausalLM
from wavedraft.shared_keys import measure_shared_keys

FOLDER = Path(__file__).parents[1] / "checkpoints" / "hops-recurrent"
SEED = 90_001  # of no other run


@pytest.fixture(scope="module")
def shipped():
    return RecurrentDepthForCausalLM.from_pretrained(FOLDER).eval()


def answers_of(model, problems, **options):
    ids = problems.prompt_ids
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("level", depth_tasks.LEVELS)
def test_it_is_right_at_full_depth_and_seldom_at_depth_two(shipped, level):
    problems = depth_tasks.test_problems(level, 100, SEED)
    right = {
        depth: (answers_of(shipped, problems, num_recurrences=depth) == problems.answers).all(1).float().mean().item()
        for depth in (2, 12)
    }
    assert right[2] < 0.35 and right[12] > 0.9


@pytest.mark.parametrize("level", depth_tasks.LEVELS)
def test_exact_policies_write_full_depths_answers(shipped, level):
    problems = depth_tasks.test_problems(level, 16, SEED)
    ids = problems.prompt_ids
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "return_dict_in_generate": True}
    plain = shipped.generate(ids, **options)
    for policy in ("exact", "self-speculative"):
        found = shipped.generate(ids, policy=policy, **options)
        assert found.sequences.tolist() == plain.sequences.tolist()
        if level != "roots, harder":  # there `exact` drafts too much that does not stand
            assert found.tokens_per_forward.mean() > plain.tokens_per_forward.mean()


def test_it_shares_keys_across_its_recurrences(shipped):
    problems = depth_tasks.test_problems("roots", 16, SEED)
    texts = answers_of(shipped, problems).tolist()
    found = measure_shared_keys(shipped, list(problems.prompt_ids), texts, {"policy": "autoregressive"})
    assert found.num_tokens == 16 * 5 and found.is_shared


def test_its_weights_stay_small():
    assert (FOLDER / "model.safetensors").stat().st_size < 25_000_000
