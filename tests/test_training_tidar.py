"""Fine-tuning with Trainer and PEFT: learning, resuming, and measuring by decoding."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from helpers_marks import slow_but
from helpers_tidar import random_prompts, tiny_tidar
from wavedraft.modeling_tidar import DraftObjective, TiDARForCausalLM
from wavedraft.modeling_tidar.objective_tidar import (
    cross_entropy,
    kl_divergence,
    negative_log_acceptance,
    total_variation,
)
from wavedraft.training import finetune, gated_adapter_config, measure_drafting
from wavedraft.training.dialogue import IGNORED, PaddingCollator, encode_row, pack_rows
from wavedraft.training.row_forms import row_of
from wavedraft.training.row_sources import rows_of_file


def test_only_the_assistants_words_teach(tokenizer):
    row = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}] * 2}
    encoded = encode_row(row_of(row, "here"), tokenizer, max_length=99)
    words = [tokenizer.convert_ids_to_tokens(i) for i in encoded["input_ids"]]
    taught = [word for word, label in zip(words, encoded["labels"], strict=True) if label != IGNORED]
    assert words == ["<user>", "the", "cat", "<assistant>", "sat", "on", "<end>"] * 2
    assert taught == ["sat", "on", "<end>"] * 2


def test_an_answer_that_was_cut_teaches_no_end(tokenizer):
    encoded = encode_row(
        row_of({"prompt": "the", "answer": "cat", "finished": False}, "here"), tokenizer, max_length=99
    )
    assert tokenizer.eos_token_id not in encoded["labels"]


def test_the_collator_pads_on_the_right():
    batch = PaddingCollator(0)([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}])
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert batch["labels"].tolist() == [[-100, 6], [7, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def random_rows(lengths, draft_length, seed=0):
    """Rows with labels after their first `draft_length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 60, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [IGNORED] * draft_length + ids[draft_length:]} for ids in rows]


def test_packing_fills_sequences_and_loses_no_row():
    rows = random_rows([5, 17, 9, 9, 12, 3], 2)
    packed = pack_rows(rows, max_length=20)
    assert all(len(row["input_ids"]) <= 20 for row in packed)
    assert len(packed) == 3
    unpacked = [
        [token for token, document in zip(row["input_ids"], row["document_ids"], strict=True) if document == number]
        for row in packed
        for number in range(max(row["document_ids"]) + 1)
    ]
    assert sorted(unpacked) == sorted(row["input_ids"] for row in rows)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("mode", ["joint", "gated"])
def test_packed_documents_teach_what_each_teaches_alone(family, mode):
    model = tiny_tidar(family, draft_length=4)
    if mode == "gated":
        get_peft_model(model, gated_adapter_config(model, 4))
    rows = random_rows([12, 8, 16, 8], 4)  # whole blocks, so that they begin at the same tokens
    objective, num_labels = DraftObjective(mode=mode), sum(len(row["labels"]) - 4 for row in rows)
    collate = PaddingCollator(0)

    def gradients(batches):
        model.zero_grad()
        losses = [model(**collate(b), objective=objective, num_items_in_batch=num_labels).loss for b in batches]
        sum(losses).backward()
        return sum(losses).item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    alone, gradients_alone = gradients([[row] for row in rows])
    packed, gradients_packed = gradients([pack_rows(rows, max_length=28)])
    assert packed == pytest.approx(alone, rel=1e-5)
    for one, other in zip(gradients_packed, gradients_alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_draft_losses_against_their_definitions():
    generator = torch.Generator().manual_seed(0)
    draft, target = torch.randn(3, 5, generator=generator), torch.randn(3, 5, generator=generator)
    ids = torch.tensor([1, 4, 0])
    p, q = target.softmax(-1), draft.softmax(-1)
    for row in range(3):
        kl = sum(float(p[row, v] * (p[row, v].log() - q[row, v].log())) for v in range(5))
        overlap = sum(float(torch.minimum(p[row, v], q[row, v])) for v in range(5))  # the chance of acceptance
        assert cross_entropy(draft, ids, target)[row].item() == pytest.approx(-float(q[row, ids[row]].log()), abs=1e-5)
        assert kl_divergence(draft, ids, target)[row].item() == pytest.approx(kl, abs=1e-5)
        assert total_variation(draft, ids, target)[row].item() == pytest.approx(1 - overlap, abs=1e-5)
        assert negative_log_acceptance(draft, ids, target)[row].item() == pytest.approx(-math.log(overlap), abs=1e-4)


def test_measuring_agrees_with_generate():
    model = tiny_tidar("qwen3")
    prompts = [random_prompts(1, 5, seed)[0] for seed in range(3)]
    report = measure_drafting(model, prompts, max_new_tokens=20, compare_with_plain=True)
    outputs = [
        model.generate(p[None], max_new_tokens=20, do_sample=False, return_dict_in_generate=True) for p in prompts
    ]
    assert report.num_forwards == sum(output.num_forwards for output in outputs)
    assert report.tokens_per_forward == pytest.approx(3 * 19 / report.num_forwards)
    assert report.identical == 1.0


@pytest.fixture
def fluent_checkpoint(checkpoint, tokenizer):
    """The same checkpoint once its autoregressive side writes the answers by itself; it cannot draft yet."""
    folder, data = checkpoint
    model = TiDARForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = PaddingCollator(0)([encode_row(row, tokenizer, 99) for row in rows_of_file(data)])
    for _ in range(120):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    model.save_pretrained(folder)
    return folder, data


@pytest.mark.parametrize(
    ("draft_loss", "max_steps", "least"),
    [("cross_entropy", 100, 3), ("kl", 100, 3), ("lk", 100, 3), pytest.param("tv", 250, 1.7, marks=pytest.mark.slow)],
)
def test_gated_training_makes_drafts_stand_and_leaves_the_text_alone(
    fluent_checkpoint, tmp_path, draft_loss, max_steps, least
):
    folder, data = fluent_checkpoint
    before = TiDARForCausalLM.from_pretrained(folder).eval()
    report = finetune(
        folder, data, tmp_path / "out", eval_prompts_path=data, num_eval_prompts=2, rank=16, max_steps=max_steps,
        batch_size=4, learning_rate=2e-2, draft_loss=draft_loss,
    )  # fmt: skip
    assert report["before"]["tokens_per_forward"] < 1.5
    assert report["after"]["tokens_per_forward"] > least
    assert report["after"]["identical"] == 1.0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["after"] == report["after"]
    taught = TiDARForCausalLM.from_pretrained(folder).eval()
    taught.load_adapter(str(tmp_path / "out"))
    ids = random_prompts(2, 9) % 13 + 1
    assert torch.equal(taught(ids).logits, before(ids).logits)

    stock = AutoModelForCausalLM.from_pretrained(folder)
    del stock.config.tidar_config  # what it was taught with stands beside the adapter
    stock.load_adapter(str(tmp_path / "out"))
    by_path = {"custom_generate": str(tmp_path / "out"), "trust_remote_code": True}
    assert stock.generate(ids, max_new_tokens=9, **by_path).tolist() == taught.generate(ids, max_new_tokens=9).tolist()
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"| {report['after']['tokens_per_forward']:.2f} | 100% | float32 |" in card and "More Information" not in card
    )


def test_joint_training_learns_to_write_and_to_draft(checkpoint, tmp_path):
    folder, data = checkpoint
    report = finetune(
        folder, data, tmp_path / "out", eval_prompts_path=data, num_eval_prompts=1, mode="joint", rank=0,
        max_steps=150, batch_size=4, learning_rate=1e-2,
    )  # fmt: skip
    assert report["before"]["tokens_per_forward"] < 2
    assert report["after"]["tokens_per_forward"] > 3
    assert report["after"]["identical"] == 1.0
    assert TiDARForCausalLM.from_pretrained(tmp_path / "out").tidar_config.draft_length == 4


def losses_of(run):
    history = json.loads((run / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def weights_of(folder, run):
    return PeftModel.from_pretrained(TiDARForCausalLM.from_pretrained(folder), run).state_dict()


def test_a_half_written_checkpoint_is_skipped_by_name_and_the_run_ends_where_a_straight_one_does(
    checkpoint, tmp_path, caplog
):
    folder, data = checkpoint
    common = {"rank": 4, "batch_size": 2, "save_steps": 3, "max_steps": 8}
    finetune(folder, data, tmp_path / "straight", **common)
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    half_written = tmp_path / "killed" / "checkpoint-8"
    for name in ("complete", "optimizer.pt", "trainer_state.json"):  # as a kill leaves it
        (half_written / name).unlink()
    finetune(folder, data, tmp_path / "killed", resume=True, **common)
    assert f"{half_written} is incomplete" in caplog.text
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "straight")
    straight, resumed = weights_of(folder, tmp_path / "straight"), weights_of(folder, tmp_path / "killed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize(("mode", "rank"), [("gated", 4), ("joint", 0)])
def test_accumulated_batches_lose_what_one_batch_does(checkpoint, tmp_path, mode, rank):
    """Rows of unequal length, 2 + 2 at a time as well as 4 at once: one mean over all labels of the step."""
    folder, data = checkpoint
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "all", "answer": "day the cat sat on"}) + "\n")
    common = {"mode": mode, "rank": rank, "max_steps": 8, "save_steps": 8, "slot_decay": 0.7}
    finetune(folder, data, tmp_path / "whole", batch_size=4, **common)
    finetune(folder, data, tmp_path / "parts", batch_size=2, gradient_accumulation_steps=2, **common)
    assert len(losses_of(tmp_path / "whole")) == 8
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-4)


@pytest.mark.parametrize("mode", slow_but({"gated"}, ("gated", "head")))
def test_two_processes_lose_what_one_does(checkpoint, tmp_path, mode):
    """The same global batch of 4 on two processes (gloo), in the two steps before an odd row goes to both of them."""
    folder, data = checkpoint
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "all", "answer": "day the cat sat on"}) + "\n")
    finetune(folder, data, tmp_path / "one", mode=mode, rank=4, max_steps=8, save_steps=8, batch_size=4)
    options = ["--mode", mode, "--rank", "4", "--max-steps", "8", "--save-steps", "8", "--batch-size", "2", "--no-bf16"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "wavedraft"]
    train = [*launch, "train", str(folder), str(data), str(tmp_path / "two"), *options]
    done = subprocess.run(train, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("what was measured in report.json") == 1
    assert losses_of(tmp_path / "two")[:2] == pytest.approx(losses_of(tmp_path / "one")[:2], rel=1e-4)


@pytest.mark.parametrize("signal_number", slow_but({signal.SIGTERM}, (signal.SIGTERM, signal.SIGINT)))
def test_a_signal_saves_the_step_and_ends_the_run(checkpoint, tmp_path, signal_number):
    folder, data = checkpoint
    common = {"rank": 4, "batch_size": 2, "save_steps": 100, "max_steps": 8}
    finetune(folder, data, tmp_path / "straight", **common)
    program = (
        "import os, sys\nfrom wavedraft.training import finetune, run_folder\n"
        "import wavedraft.training.trainer_tidar as t\nlog = t.TiDARTrainer.log\n"
        "def kill_at_three(self, logs, *args, **kwargs):\n"
        "    log(self, logs, *args, **kwargs)\n"
        f"    if self.state.global_step == 3: os.kill(os.getpid(), {int(signal_number)})\n"
        "t.TiDARTrainer.log = kill_at_three\nfrom wavedraft.cli import app, main\n"
        "sys.argv = ['wavedraft', 'train', *sys.argv[1:]]\nmain()\n"
    )
    options = ["--rank", "4", "--batch-size", "2", "--save-steps", "100", "--max-steps", "8", "--no-bf16"]
    run = [sys.executable, "-c", program, str(folder), str(data), str(tmp_path / "stopped"), *options]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums of other threads round differently
    stopped = subprocess.run(run, capture_output=True, text=True, env=os.environ | threads)
    assert stopped.returncode == 128 + signal_number, stopped.stderr
    assert "Stopped after step" in stopped.stderr.splitlines()[-1] and "--resume" in stopped.stderr.splitlines()[-1]
    finetune(folder, data, tmp_path / "stopped", resume=True, **common)
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"draft_loss": "kl"}, "draft_loss was 'cross_entropy' and is now 'kl'"),
        ({"seed": 1}, "seed was 0 and is now 1"),
    ],
)
def test_resuming_as_another_run_is_refused_with_the_differences(checkpoint, tmp_path, changed, named):
    folder, data = checkpoint
    common = {"rank": 4, "batch_size": 2, "save_steps": 1, "max_steps": 2}
    finetune(folder, data, tmp_path / "run", **common)
    with pytest.raises(ValueError, match=named):
        finetune(folder, data, tmp_path / "run", resume=True, **common | changed)


def test_resuming_on_other_data_is_refused(checkpoint, tmp_path):
    folder, data = checkpoint
    common = {"rank": 4, "batch_size": 2, "save_steps": 1, "max_steps": 2}
    finetune(folder, data, tmp_path / "run", **common)
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"data was .* and is now"):
        finetune(folder, data, tmp_path / "run", resume=True, **common)


def test_the_checkpoint_with_the_most_tokens_per_forward_is_kept(checkpoint, tmp_path):
    """The learning rate is so high that the drafts get worse again; patience ends the run early."""
    folder, data = checkpoint
    report = finetune(
        folder, data, tmp_path / "run", eval_prompts_path=data, num_eval_prompts=2, rank=16, max_steps=400,
        batch_size=4, learning_rate=3e-2, eval_steps=20, patience=2,
    )  # fmt: skip
    history = json.loads((tmp_path / "run" / f"checkpoint-{report['steps']}" / "trainer_state.json").read_text())
    evaluated = {
        row["step"]: row["eval_tokens_per_forward"]
        for row in history["log_history"]
        if "eval_tokens_per_forward" in row
    }
    assert report["steps"] < 400
    assert evaluated[report["best_step"]] == max(evaluated.values())
    assert report["after"]["tokens_per_forward"] == pytest.approx(max(evaluated.values()))
    assert (tmp_path / "run" / "curve.png").stat().st_size > 5000
    assert all(row["eval_identical"] == 1.0 for row in history["log_history"] if "eval_identical" in row)


def test_an_adapter_can_be_taught_further(checkpoint, tmp_path):
    folder, data = checkpoint
    finetune(folder, data, tmp_path / "first", rank=4, max_steps=2, pack=True, max_length=64)
    finetune(folder, data, tmp_path / "second", from_adapter=tmp_path / "first", max_steps=1, learning_rate=0.0)
    first, second = (
        PeftModel.from_pretrained(TiDARForCausalLM.from_pretrained(folder), tmp_path / run).state_dict()
        for run in ("first", "second")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_output_folder_in_use_is_refused_before_anything_is_loaded(checkpoint, tmp_path):
    folder, data = checkpoint
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty"):
        finetune(folder, data, tmp_path / "out", max_steps=1)
    with pytest.raises(ValueError, match="no checkpoint to resume"):
        finetune(folder, data, tmp_path / "new", max_steps=1, resume=True)
    with pytest.raises(ValueError, match="There is no folder"):
        finetune(tmp_path / "nowhere", data, tmp_path / "new", max_steps=1)
    with pytest.raises(ValueError, match="There is no file"):
        finetune(folder, tmp_path / "nothing.jsonl", tmp_path / "new", max_steps=1)
    with pytest.raises(ValueError, match="no prompts to decode"):
        finetune(folder, data, tmp_path / "new", max_steps=1, eval_steps=1)
    assert not (tmp_path / "new").exists()
