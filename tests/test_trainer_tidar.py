"""TiDARTrainer on its own, and what Trainer and TRL's SFTTrainer teach a TiDAR checkpoint."""

import inspect
import json
import textwrap

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from helpers_tidar import random_prompts, tiny_tidar
from wavedraft.modeling_tidar import DraftObjective, TiDARForCausalLM, modeling_tidar
from wavedraft.training import PaddingCollator, RowEncoder, TiDARTrainer, finetune, gated_adapter_config, open_rows

CPU = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


@pytest.fixture
def warnings(monkeypatch):
    """What the model's file warns of, each line as often as it is said."""
    said = []
    monkeypatch.setattr(modeling_tidar.logger, "warning_once", said.append)
    return said


def encoded_rows(data, tokenizer):
    encode = RowEncoder(tokenizer, 64, draft_length=4)
    return [encoded for row in open_rows(data)() for encoded in encode(row)]


def test_the_example_of_the_docstring_trains_and_evaluates(checkpoint, tmp_path, capsys):
    folder, data = checkpoint
    example = inspect.getdoc(TiDARTrainer).split("```python\n")[1].split("```")[0]
    code = textwrap.dedent(example)
    assert code.count("\n") <= 30
    places = f"MODEL, DATA, OUTPUT = {str(folder)!r}, {str(data)!r}, {str(tmp_path / 'run')!r}  #"
    code = code.replace('MODEL, DATA, OUTPUT = "model-tidar", "rows.jsonl", "runs/mine"  #', places)
    code = code.replace("TrainingArguments(OUTPUT, ", f"TrainingArguments(OUTPUT, **{CPU!r}, ")
    assert str(tmp_path) in code and "use_cpu" in code
    names = {}
    exec(code, names)
    assert "eval_tokens_per_forward" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter_config.json").is_file()
    assert any("diffusion_loss" in row for row in names["trainer"].state.log_history) or names["trainer"].loss_parts


def test_the_trainer_has_the_papers_objective_and_a_collator_by_default(checkpoint, tokenizer, tmp_path, warnings):
    folder, data = checkpoint
    model = TiDARForCausalLM.from_pretrained(folder)
    args = TrainingArguments(tmp_path / "run", max_steps=2, per_device_train_batch_size=3, logging_steps=1, **CPU)
    rows = encoded_rows(data, tokenizer)
    trainer = TiDARTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.objective == DraftObjective() and trainer.data_collator.fillers["input_ids"] == 0
    for row in trainer.state.log_history[:2]:
        assert row["loss"] == pytest.approx((row["ar_loss"] + row["diffusion_loss"]) / 2, abs=2e-3)
    assert not warnings
    with pytest.raises(ValueError, match="Give `eval_prompt_ids`"):
        trainer.evaluate()


def test_the_parts_of_a_loss_after_a_resume_are_means_over_the_steps_since_then(checkpoint, tmp_path):
    folder, data = checkpoint
    common = {"mode": "joint", "rank": 4, "batch_size": 2, "save_steps": 4, "max_steps": 8, "logging_steps": 2}
    finetune(folder, data, tmp_path / "run", **common)
    (tmp_path / "run" / "checkpoint-8" / "complete").unlink()
    finetune(folder, data, tmp_path / "run", resume=True, **common)
    history = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    logged = [row for row in history if "loss" in row]
    assert [row["step"] for row in logged] == [2, 4, 6, 8]
    for row in logged:  # alpha is 1
        assert row["loss"] == pytest.approx((row["ar_loss"] + row["diffusion_loss"]) / 2, abs=2e-3), row


def test_what_stands_second_in_a_forward_is_the_mask_of_the_stock_class():
    model = tiny_tidar()
    ids = random_prompts(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    named = model(ids, attention_mask=mask, labels=ids, objective=DraftObjective())
    assert torch.equal(model(ids, mask, labels=ids, objective=DraftObjective()).loss, named.loss)
    assert not torch.equal(model(ids, labels=ids, objective=DraftObjective()).loss, named.loss)
    with pytest.raises(TypeError, match="multiple values"):
        model(ids, mask, attention_mask=mask, objective=DraftObjective())


@pytest.mark.parametrize("is_gated", [False, True])
def test_labels_without_an_objective_have_the_stock_loss_and_a_warning(is_gated, warnings):
    model = tiny_tidar()
    ids = random_prompts(2, 9)
    stock = model.eval()(ids, labels=ids).loss
    trained = get_peft_model(model, gated_adapter_config(model, 4)) if is_gated else model
    assert not warnings, "an evaluation teaches nothing"
    trained.train()
    assert len(warnings) == 1, "TRL's forward has no other place to say it"
    assert torch.equal(trained(input_ids=ids, labels=ids).loss, stock)
    assert warnings == [modeling_tidar.UNTAUGHT] * 2
    trained(input_ids=ids)
    trained(input_ids=ids, labels=ids, objective=DraftObjective("gated" if is_gated else "joint"))
    assert len(warnings) == 2


def test_trainer_trains_the_text_and_says_that_drafts_are_not_taught(checkpoint, tokenizer, tmp_path, warnings):
    folder, data = checkpoint
    args = TrainingArguments(tmp_path / "run", max_steps=2, per_device_train_batch_size=3, **CPU)
    model = TiDARForCausalLM.from_pretrained(folder)
    rows = encoded_rows(data, tokenizer)
    Trainer(model=model, args=args, train_dataset=rows, data_collator=PaddingCollator(0)).train()
    assert set(warnings) == {modeling_tidar.UNTAUGHT}


@pytest.mark.parametrize("has_adapter", [False, True])
def test_trls_trainer_trains_the_text_and_says_that_drafts_are_not_taught(
    checkpoint, tokenizer, tmp_path, warnings, has_adapter
):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets")
    folder, data = checkpoint
    model = TiDARForCausalLM.from_pretrained(folder)
    rows = [{"messages": row.messages} for row in open_rows(data)()]
    args = trl.SFTConfig(str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=3, bf16=False, **CPU)
    trainer = trl.SFTTrainer(
        model=model,
        args=args,
        peft_config=LoraConfig(r=2, target_modules="all-linear") if has_adapter else None,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    assert set(warnings) == {modeling_tidar.UNTAUGHT}
