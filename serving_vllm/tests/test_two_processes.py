"""Tensor parallelism in two processes: adapter, lm_head and draft head are split as the layers are."""

import pytest

from helpers_engines import Counted, engine, greedy, prompts, texts
from helpers_tiny import tiny_adapter, tiny_checkpoint


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_two_ranks_write_the_text_of_one(family, tmp_path):
    """And as many drafts stand: a rank with the wrong share of the adapter would draft worse."""
    checkpoint = tiny_checkpoint(family, tmp_path)
    (tmp_path / "adapter").mkdir()
    adapter = tiny_adapter(checkpoint, tmp_path / "adapter", mask_row=0)
    asked = prompts(8, seed=12)
    want = texts(engine(checkpoint), asked, greedy(14))
    one = engine(checkpoint, adapter)
    with Counted(one) as alone:
        assert texts(one, asked, greedy(14)) == want
    two = engine(checkpoint, adapter, tensor_parallel_size=2, distributed_executor_backend="mp")
    with Counted(two) as shared:
        assert texts(two, asked, greedy(14)) == want
    assert alone.num_accepted > 0 and shared.num_accepted == alone.num_accepted
