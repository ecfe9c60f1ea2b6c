"""The script that counts texts in half precision: in float32 all are plain decoding's, and it goes on where it was."""

import json
import sys
from pathlib import Path

import pytest
import torch

from helpers_stock import save_tiny_stock
from helpers_tokenizers import save_tokenizer
from wavedraft import convert

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bfloat16_share
from bfloat16_share import Texts, lines_of, new_ids

NAMES = ["AR", "lookup", "default", "K=4 B=1", "default tie-safe", "K=4 B=1 tie-safe", "AR in batches of 8"]


@pytest.fixture
def arguments(tmp_path):
    save_tiny_stock(tmp_path / "stock")
    save_tokenizer(tmp_path / "stock", num_words=61)
    convert(tmp_path / "stock", tmp_path / "tidar", draft_length=4)
    (tmp_path / "prompts.txt").write_text("".join(f"w{number} w{number + 3}\n" for number in range(6)))
    (tmp_path / "page.md").write_text("before\n<!-- half precision -->\n<!-- end of half precision -->\nafter\n")
    options = ["--prompts", "prompts.txt", "--num-prompts", 6, "--max-new-tokens", 5, "--dtype", "float32"]
    return [tmp_path / "tidar", *options, "--no-compile", "--output", "share.json", "--page", "page.md"]


def run(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["bfloat16_share.py", *map(str, arguments)])
    bfloat16_share.main()


def test_in_float32_every_text_is_plain_decodings_and_a_stopped_run_goes_on(monkeypatch, arguments, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    original, calls = bfloat16_share.timed, []

    def stopped(*given):
        calls.append(given)
        if len(calls) == 20:  # 6 warm up, and 6 are of each prompt
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(bfloat16_share, "timed", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, arguments)
    kept = json.loads(Path("share.json").read_text())["texts"]
    assert all(sorted(rows) == ["0", "1"] for rows in kept.values())
    run(monkeypatch, arguments)
    assert len(calls) == 20 + 6 + 4 * 6 + 1
    found = json.loads(Path("share.json").read_text())
    assert [one["name"] for one in found["lines"]] == NAMES
    assert all(one["num_equal"] == one["num_texts"] == 6 for one in found["lines"])
    assert {name: kept[name]["0"] for name in kept} == {name: found["texts"][name]["0"] for name in kept}
    costs = {one["name"]: one["over_same_plan"] for one in found["lines"] if one["over_same_plan"]}
    assert set(costs) == {"default tie-safe", "K=4 B=1 tie-safe"}
    page = Path("page.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "| default | 6/6 | 100% |" in page
    with pytest.raises(ValueError, match="has texts of `max_new_tokens` 5, but now it is 4"):
        run(monkeypatch, [4 if one == 5 else one for one in arguments])


def test_a_cost_is_the_time_with_exact_over_that_without_and_texts_part_where_they_differ():
    def rows(ids, seconds):
        return {str(place): {"ids": ids, "seconds": seconds, "waited": 0.0} for place in range(5)}

    texts = Texts(
        {}, {"AR": rows([1, 2, 3], 6.0), "default": rows([1, 9, 3], 3.0), "default tie-safe": rows([1, 2], 3.0)}
    )
    _, ours, exact = lines_of(texts)
    assert ours["num_equal"] == 0 and ours["tokens_before_they_part"] == 1 and exact["tokens_before_they_part"] == 2
    assert ours["speed_up"]["mean"] == pytest.approx(2) and ours["over_same_plan"] is None
    assert exact["over_same_plan"]["mean"] == pytest.approx(1.5)


def test_what_follows_the_end_of_a_text_is_no_part_of_it():
    assert new_ids(torch.tensor([[5, 1, 2, 0], [6, 3, 4, 7]]), 1, {2}) == [[1, 2], [3, 4, 7]]
