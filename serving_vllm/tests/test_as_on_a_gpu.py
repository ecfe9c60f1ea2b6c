"""What a GPU does by default and a CPU does not: asynchronous scheduling, and the runner's warm-up."""

import pytest
from vllm.sampling_params import StructuredOutputsParams

from helpers_engines import Counted, core_of, engine_that_plans_ahead, greedy, prompts, texts
from helpers_tiny import DRAFT_LENGTH


@pytest.fixture(scope="module")
def asynchronous(folders):
    return engine_that_plans_ahead(*folders)


def test_steps_that_are_planned_ahead_write_the_same_text(plain, asynchronous):
    asked = prompts(5, seed=21)
    want = texts(plain, asked, greedy(14))
    with Counted(asynchronous) as counted:
        assert texts(asynchronous, asked, greedy(14)) == want
    assert counted.num_accepted > 0


def test_a_grammar_and_drafts_in_steps_that_are_planned_ahead(plain, asynchronous):
    asked = prompts(3, seed=22)
    params = [greedy(12, structured_outputs=StructuredOutputsParams(choice=["left", "right"])), greedy(12), greedy(9)]
    assert texts(asynchronous, asked, params) == texts(plain, asked, params)


def test_the_warm_up_of_a_gpus_runner_takes_drafts(drafting, plain):
    """It runs steps with extra tokens that no scheduler of ours planned."""
    from vllm.v1.worker.gpu import warmup

    core_of(drafting).step()  # requests of other tests that ended in the last step give their places back
    worker = core_of(drafting).model_executor.driver_worker.worker
    warmup.warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)
    assert worker.model_runner.decode_query_len == 2 * DRAFT_LENGTH
    asked = prompts(2, seed=23)
    assert texts(drafting, asked, greedy(8)) == texts(plain, asked, greedy(8))
