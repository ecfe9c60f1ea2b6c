"""The script that measures step costs times forwards of the stated width."""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import step_cost


def test_every_step_that_is_timed_has_the_width_it_is_said_to_have():
    arguments = Namespace(draft_lengths=[2, 4], batch_sizes=[1, 2], context=16, max_new_tokens=6, repeats=1)
    arguments.compiled, arguments.static, arguments.dtype, arguments.device = False, False, "float32", "cpu"
    lines = step_cost.step_costs("tiny", arguments)
    names = ["AR", "no drafts", "K=2 B=1", "K=2 B=2", "K=4 B=1", "K=4 B=2", "K=4 B=3", "K=4 B=4"]
    assert [line["contender"] for line in lines] == names * 2
    for line in lines:
        length, branches = 1, 0
        if line["contender"].startswith("K="):
            length, branches = (int(part[2:]) for part in line["contender"].split())
        assert line["expected_queries"] == length * (1 + branches)
        # Behind an outcome that no branch was drafted for, a forward reads one token and K masks.
        assert min(line["expected_queries"], 1 + length) <= line["queries"] <= line["expected_queries"]
        assert line["ms"] > 0 and line["of_plain"] > 0
    assert {line["of_plain"] for line in lines if line["contender"] == "AR"} == {1.0}
