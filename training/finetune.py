"""One fine-tune from a converted checkpoint to a model that drafts, through Trainer and PEFT."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoTokenizer, EarlyStoppingCallback, TrainingArguments, set_seed

from ..generation.model_card import write_card
from ..modeling_tidar import DraftObjective, TiDARForCausalLM
from ..modeling_tidar.modeling_tidar import write_adapter_code
from .curve import draw_curve
from .dialogue import IGNORED, PaddingCollator, encode_rows, pack_rows, read_jsonl
from .gated_adapter import gated_adapter_config
from .regenerate import without_loops
from .run_folder import (
    SafeStop,
    TrainingStopped,
    check_manifest,
    data_fingerprint,
    fingerprint,
    last_whole_checkpoint,
    write_manifest,
)
from .trainer_tidar import TiDARTrainer, measure_drafting

# transformers 5.22 and 5.23 have a name each for it, and the older one ends with version 6.
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))


def finetune(
    model_path: str | Path,
    data_path: str | Path,
    output_dir: str | Path,
    *,
    eval_prompts_path: str | Path | None = None,
    mode: str = "gated",
    draft_loss: str = "cross_entropy",
    alpha: float = 1.0,
    slot_decay: float = 1.0,
    from_adapter: str | Path | None = None,
    rank: int = 32,
    max_steps: int = 300,
    batch_size: int = 4,
    gradient_accumulation_steps: int = 1,
    learning_rate: float | None = None,
    max_length: int = 320,
    pack: bool = False,
    num_eval_prompts: int = 10,
    eval_steps: int | None = None,
    patience: int | None = None,
    save_steps: int = 100,
    report_to: str = "none",
    bf16: bool = False,
    activation_checkpointing: bool = False,
    resume: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Teaches a converted checkpoint to draft and reports real tokens per forward before and after.

    Args:
        model_path: a TiDAR checkpoint (`wavedraft convert`).
        data_path: JSONL rows as `dialogue.encode_row` reads them; best what the model itself wrote.
        output_dir: where checkpoints and the result go. Gated, or with a `rank` above 0, the result is a PEFT
            adapter; otherwise a whole checkpoint.
        eval_prompts_path: JSONL rows with `prompt`, never trained on.
        mode: "gated" (base frozen, text unchanged) or "joint" (the paper's loss).
        draft_loss, alpha, slot_decay: see `DraftObjective`.
        from_adapter: an adapter of the same mode to go on from, instead of a new one; its rank stays.
        rank: of the LoRA adapter; 0, in joint mode only, trains every weight.
        learning_rate: by default 1e-3 for an adapter, 1e-5 for every weight.
        max_length: tokens a row is cut to.
        pack: puts several rows into one sequence of `max_length`, none of which sees another: less padding.
        eval_steps: decodes the prompts every so many steps, and saves there; what is kept at the end is the
            checkpoint with the most tokens per forward.
        patience: ends the run after so many such evaluations in a row without more tokens per forward.
        report_to: where else Trainer logs: "tensorboard", "wandb", ...
        resume: goes on from the last whole checkpoint in `output_dir`, with the same model, data and arguments.

    Returns:
        The report that is also written to `output_dir`/report.json, beside curve.png where matplotlib is installed.

    Raises:
        ValueError: nothing to learn from, an argument out of range, an `output_dir` in use without `resume`, or another
            run than the one to resume.
        TrainingStopped: SIGTERM or Ctrl-C came; the last step is saved.
    """
    output_dir = Path(output_dir)
    if mode == "gated" and rank < 1:
        raise ValueError(f"`rank` must be at least 1 in gated mode, whose base is frozen, but is {rank}.")
    if max_steps < 1:
        raise ValueError(f"`max_steps` must be at least 1, but is {max_steps}.")
    if eval_steps and not eval_prompts_path:
        raise ValueError(f"`eval_steps` is {eval_steps}, but there is nothing to decode. Give `eval_prompts_path`.")
    if patience is not None and (patience < 1 or not eval_steps):
        raise ValueError(
            f"`patience` counts evaluations, so it must be at least 1 and needs `eval_steps`, but is {patience} with "
            f"`eval_steps` {eval_steps}."
        )
    last_checkpoint = last_whole_checkpoint(output_dir) if resume else None
    if resume and last_checkpoint is None:
        raise ValueError(f"There is no checkpoint to resume from in {output_dir}. Start without `--resume`.")
    if not resume and output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir} is not empty. Go on with `--resume`, or choose another folder.")
    for path in (data_path, *([eval_prompts_path] if eval_prompts_path else [])):
        if not Path(path).is_file():
            raise ValueError(f"There is no file {path}.")
    objective = DraftObjective(mode=mode, draft_loss=draft_loss, alpha=alpha, slot_decay=slot_decay)

    if not Path(model_path).is_dir() and len(Path(model_path).parts) != 2:
        raise ValueError(f"There is no folder {model_path}. Make one: `wavedraft convert SOURCE {model_path}`.")
    learning_rate = learning_rate if learning_rate is not None else (1e-3 if rank else 1e-5)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, max_steps // 20),
        weight_decay=0.0,
        logging_steps=max(1, min(10, max_steps // 10)),
        eval_strategy="steps" if eval_steps else "no",
        eval_steps=eval_steps,
        load_best_model_at_end=bool(eval_steps),
        metric_for_best_model="tokens_per_forward" if eval_steps else None,
        greater_is_better=True,
        save_steps=eval_steps or save_steps,
        save_total_limit=2,
        bf16=bf16,
        **{CHECKPOINTING: activation_checkpointing},
        use_cpu=not torch.accelerator.is_available(),
        remove_unused_columns=False,
        report_to=report_to,
        seed=seed,
    )
    PartialState(cpu=arguments.use_cpu).wait_for_everyone()  # every process has seen the folder as it was
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = TiDARForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16 if bf16 and rank else torch.float32)
    rows = list(read_jsonl(data_path))
    written = [row for row in rows if "answer" in row]
    rows, filtered = without_loops(written) if len(written) == len(rows) else (rows, None)
    dataset = encode_rows(rows, tokenizer, max_length, model.config.tidar_config["draft_length"])
    if not dataset:
        raise ValueError(
            f"No row of {data_path} has more than {model.config.tidar_config['draft_length']} tokens to learn from "
            f"(the checkpoint's draft length) within `max_length` {max_length}."
        )
    num_rows, num_labels = len(dataset), sum(label != IGNORED for row in dataset for label in row["labels"])
    if pack:
        dataset = pack_rows(dataset, max_length)
    eval_prompt_ids = prompt_ids(eval_prompts_path, tokenizer, num_eval_prompts) if eval_prompts_path else []
    trained = model
    if from_adapter is not None:
        trained = PeftModel.from_pretrained(model, str(from_adapter), is_trainable=True)
    elif mode == "gated":
        trained = get_peft_model(model, gated_adapter_config(model, rank))
    elif rank:
        config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        trained = get_peft_model(model, config)

    manifest = {
        "model": fingerprint(trained),
        "data": data_fingerprint(dataset),
        **asdict(objective),
        "max_steps": max_steps,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "learning_rate": learning_rate,
        "bf16": bf16,
        "seed": seed,
    }
    trainer = TiDARTrainer(
        model=trained,
        args=arguments,
        train_dataset=dataset,
        data_collator=PaddingCollator(tokenizer.pad_token_id or 0),
        objective=objective,
        eval_prompt_ids=eval_prompt_ids,
    )
    safe_stop = SafeStop(trainer.accelerator)
    trainer.add_callback(safe_stop)
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=patience))
    if resume:
        check_manifest(output_dir, manifest)
    elif trainer.is_world_process_zero():
        write_manifest(output_dir, manifest)
    before = measure_drafting(model, eval_prompt_ids) if eval_prompt_ids else None
    trainer.train(resume_from_checkpoint=str(last_checkpoint) if resume else None)
    if safe_stop.stopped_by is not None:
        raise TrainingStopped(trainer.state.global_step, output_dir, safe_stop.stopped_by)
    after = measure_drafting(model, eval_prompt_ids, compare_with_plain=True) if eval_prompt_ids else None

    if trainer.is_world_process_zero():
        if rank and bf16:
            trained.to(torch.bfloat16)
        trained.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
    report = {
        "mode": mode,
        "draft_loss": draft_loss,
        "slot_decay": slot_decay,
        "from_adapter": from_adapter and str(from_adapter),
        "draft_length": model.config.tidar_config["draft_length"],
        "rank": rank,
        "rows": num_rows,
        "sequences": len(dataset),
        "loops": filtered,
        "labels": num_labels,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "batch_size": batch_size * gradient_accumulation_steps,
        "seed": seed,
        "before": before and asdict(before),
        "after": after and asdict(after),
    }
    if trainer.is_world_process_zero():
        draw_curve(trainer.state.log_history, output_dir / "curve.png")
        if mode == "gated":
            write_adapter_code(output_dir, model.tidar_config)
        if mode == "gated" or not rank:
            kind = "adapter" if rank else "tidar"
            write_card(output_dir, kind, output_dir.name, origin=Path(model_path), figures=report)
        (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def prompt_ids(path: str | Path, tokenizer: Any, num_prompts: int) -> list[torch.Tensor]:
    """The ids of `num_prompts` prompts of a JSONL file, taken evenly through it."""
    prompts = [row["prompt"] for row in read_jsonl(path)]
    return [chat_prompt_ids(prompt, tokenizer) for prompt in prompts[:: max(1, len(prompts) // num_prompts)]][
        :num_prompts
    ]


def chat_prompt_ids(prompt: str, tokenizer: Any) -> torch.Tensor:
    """A user's words in the model's chat form, ready for its answer, [P]."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
