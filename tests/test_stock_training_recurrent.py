"""Stock tools train every form of a recurrent-depth model: LoRA, Trainer, accumulation, packed rows, the command."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from helpers_family import CONFIGS, tiny_model
from wavedraft.modeling_recurrent import RecurrentDepthForCausalLM
from wavedraft.training import finetune

FIXED = {"num_recurrences": 4, "init_scale": 0.0}
ROWS = [[5, 6, 7, 8, 9], [11, 12, 13], [14, 15, 16, 17, 18, 19, 20], [21, 22, 23, 24]]


def padded(rows):
    """A batch padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), **FIXED}


def one_step(model, folder, collator, **arguments):
    """Weights after one step of the stock Trainer by plain gradient descent."""
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    settings = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 1e9, "lr_scheduler_type": "constant"}
    settings |= {"max_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), remove_unused_columns=False, **settings | arguments)
    Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def collate(rows):
    return padded([row["input_ids"] for row in rows])


@pytest.mark.parametrize("kind", CONFIGS)
def test_accumulation_is_a_large_batch_at_a_fixed_depth(kind, tmp_path):
    large = one_step(tiny_model(kind), tmp_path, collate, per_device_train_batch_size=4)
    for size in (1, 2):
        found = one_step(
            tiny_model(kind), tmp_path, collate,
            per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
        )  # fmt: skip
        before = dict(tiny_model(kind).named_parameters())
        assert any(not torch.equal(large[name], before[name]) for name in large)
        for name, weight in large.items():
            torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_rows_are_the_rows_apart(kind):
    model = tiny_model(kind).train()
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    model(**padded(ROWS)).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    packed = DataCollatorWithFlattening()(rows)
    assert packed["input_ids"].shape == (1, sum(map(len, ROWS)))
    model(**packed, **FIXED).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_default_lora_trains_in_the_stock_trainer_and_comes_back(kind, tmp_path):
    model = get_peft_model(tiny_model(kind), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    after = one_step(model, tmp_path, collate, per_device_train_batch_size=4)
    assert any("lora_B" in name and not torch.equal(after[name], before[name]) for name in after)
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_model(kind), tmp_path / "adapter").eval()
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids, **FIXED).logits, model(input_ids=ids, **FIXED).logits)
    merged = again.merge_and_unload()
    text = model.generate(input_ids=ids, max_new_tokens=4, init_scale=0.0)
    assert merged.generate(ids, max_new_tokens=4, init_scale=0.0).tolist() == text.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_command_trains_every_form_by_default(kind, tmp_path, tokenizer):
    tiny_model(kind).save_pretrained(tmp_path / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": "the cat sat on a mat and slept all day on the mat"}] * 4
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = finetune(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "run", max_steps=2, batch_size=2,
                      eval_prompts_path=tmp_path / "data.jsonl", num_eval_prompts=1, eval_steps=2)  # fmt: skip
    assert report["after"]["perplexity"] > 0
    base = RecurrentDepthForCausalLM.from_pretrained(tmp_path / "model")
    assert PeftModel.from_pretrained(base, tmp_path / "run").peft_config
