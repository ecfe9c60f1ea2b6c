"""lm-evaluation-harness, `--model hf` with trust_remote_code: scores and texts equal the stock model's."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (`pip install lm_eval`)")
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from helpers_tidar import tiny_tidar
from helpers_tokenizers import letter_tokenizer

TASKS = ["letters_choice", "letters_write"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The tasks of tests/data/lm_eval, reading their own file wherever the tests run."""
    folder, source = tmp_path_factory.mktemp("tasks"), Path(__file__).parent / "data" / "lm_eval"
    for path in source.glob("*.yaml"):
        text = path.read_text().replace("letters.jsonl", json.dumps(str(source / "letters.jsonl")))
        (folder / path.name).write_text(text)
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_tidar("qwen3").save_pretrained(folder)
    tokenizer = letter_tokenizer()
    tokenizer.eos_token = "7"  # the harness begins and ends its texts with it
    tokenizer.save_pretrained(folder)
    return folder


def evaluate(model, tasks):
    """Figures of every task, and what the model answered to every document."""
    found = simple_evaluate(model, tasks=TASKS, task_manager=tasks, log_samples=True, bootstrap_iters=0)
    answers = {task: [sample["filtered_resps"] for sample in found["samples"][task]] for task in TASKS}
    return found["results"], answers


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods_and_texts_are_the_stock_models(folder, tasks, batch_size):
    options = {"pretrained": str(folder), "device": "cpu", "dtype": "float32", "batch_size": batch_size}
    stock = HFLM(**options, trust_remote_code=False)
    drafting = HFLM(**options, trust_remote_code=True)
    assert type(drafting.model).__name__ == "TiDARQwen3ForCausalLM" and type(stock.model).__name__ == "Qwen3ForCausalLM"
    queries = []
    drafting.model.register_forward_pre_hook(
        lambda module, args, kwargs: queries.append(kwargs["input_ids"].shape[1]) if "input_ids" in kwargs else None,
        with_kwargs=True,
    )
    expected_figures, expected = evaluate(stock, tasks)
    figures, answers = evaluate(drafting, tasks)
    assert figures == expected_figures
    assert answers["letters_write"] == expected["letters_write"] and len(set(map(str, answers["letters_write"]))) > 1
    for mine, theirs in zip(answers["letters_choice"], expected["letters_choice"], strict=True):
        mine, theirs = torch.tensor([one[0] for one in mine]), torch.tensor([one[0] for one in theirs])
        assert torch.equal(mine, theirs)  # bit for bit: no drafting in a likelihood
    assert any(length == 4 + 4 * 4 for length in queries), "nothing was drafted"
