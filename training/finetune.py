"""One fine-tune from a converted checkpoint to a model that drafts, through Trainer and PEFT."""

import inspect
import json
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import is_bitsandbytes_available, logging

from ..generation.drafting.draft_head import HEAD_FILE, draft_head_of, new_draft_head
from ..hub.hub_repository import card_kind_of
from ..hub.model_card import write_card
from ..modeling_recurrent import LORA_CORE_AND_ADAPTER, RecurrentDepthForCausalLM
from ..modeling_recurrent.checkpoint_recurrent import is_recurrent_config
from ..modeling_tidar import DraftObjective, TiDARForCausalLM
from ..modeling_tidar.modeling_tidar import write_adapter_code
from .curve import draw_curve
from .dialogue import IGNORED, PaddingCollator, RowEncoder, encode_row, pack_rows, read_jsonl
from .gated_adapter import gated_adapter_config
from .row_sources import RowStream, open_rows
from .run_folder import (
    SafeStop,
    TrainingStopped,
    check_manifest,
    data_fingerprint,
    fingerprint,
    last_whole_checkpoint,
    write_manifest,
)
from .trainer_recurrent import RecurrentTrainer, measure_recurrent
from .trainer_tidar import TiDARTrainer, measure_drafting

NUM_TOKENS_OF_TEXT = 32  # of a held-out text that are its prompt
LEAST_FOR_A_HEAD = 1.1  # tokens per forward of masks that were taught to draft
logger = logging.get_logger(__name__)

# transformers 5.22 and 5.23 have a name each for it, and the older one ends with version 6.
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))


def finetune(
    model_path: str | Path,
    data: str | Path,
    output_dir: str | Path,
    *,
    split: str = "train",
    streaming: bool = False,
    eval_prompts_path: str | Path | None = None,
    mode: str | None = None,
    draft_loss: str = "cross_entropy",
    alpha: float = 1.0,
    slot_decay: float = 1.0,
    random_depth: bool = False,
    from_adapter: str | Path | None = None,
    rank: int | None = None,
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
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    attn_implementation: str | None = None,
    activation_checkpointing: bool = False,
    torch_compile: bool = False,
    resume: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Teaches a checkpoint to think ahead and reports real tokens per forward before and after.

    A TiDAR checkpoint learns to draft, also one converted from a recurrent depth. A recurrent-depth one learns the text
    itself, at depths drawn anew each step with back-propagation through the last of them, and is measured by decoding
    with diffusion forcing.

    Args:
        model_path: a TiDAR checkpoint (`wavedraft convert`), or a recurrent-depth one.
        data: rows as `dialogue.encode_row` reads them, from a file, a folder or the Hub as `row_sources.open_rows`
            does; best what the model itself wrote.
        split: of a dataset that has several.
        streaming: rows are read as training comes to them, and drawn from the next thousand.
        output_dir: where checkpoints and the result go. Gated, or with a `rank` above 0, the result is a PEFT
            adapter; otherwise a whole checkpoint. A draft head is a file beside either.
        eval_prompts_path: JSONL rows with `prompt`, never trained on. Of a recurrent-depth model the perplexity of
            their answers is measured too; its rows may be `text`, whose first 32 tokens are the prompt.
        mode: "gated" (base frozen, text unchanged), "joint" (the paper's loss), "full" (joint, on every weight) or
            "head": a draft head for a model that was taught to draft, everything else frozen.
            Of a recurrent-depth model "lora", on core and adapter, or "full". By default the first of each.
        draft_loss, alpha, slot_decay: see `DraftObjective`.
        random_depth: of a recurrent-depth checkpoint that drafts: each step's depth, of text and masks alike, is drawn
            anew, as in the model's own training. By default it is the full one, that of decoding.
        from_adapter: an adapter of the same mode to go on from, instead of a new one; its rank stays. In head mode the
            adapter whose drafts the head is for, which is saved with it; its head, if it has one, is gone on from.
        rank: of the LoRA adapter, by default 32; 0, in joint mode only, trains every weight. In head mode the head's
            inner channels, by default 512.
        learning_rate: by default 1e-3 for an adapter, 2e-3 for a head, 1e-5 for every weight.
        max_length: tokens a row is cut to.
        pack: puts several rows into one sequence of `max_length`, none of which sees another: less padding.
        eval_steps: decodes the prompts every so many steps, and saves there; what is kept at the end is the
            checkpoint with the most tokens per forward.
        patience: ends the run after so many such evaluations in a row without more tokens per forward.
        load_in_4bit, load_in_8bit: the base is loaded quantized by bitsandbytes, to train an adapter on.
        attn_implementation: as in `from_pretrained`; by default "eager" on a CPU with rows of at most 1024 tokens,
            where it takes half the time sdpa does, and else the checkpoint's own.
        torch_compile: compiles the decoder; the first steps then take minutes.
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
    if not Path(model_path).is_dir() and len(Path(model_path).parts) != 2:
        raise ValueError(f"There is no folder {model_path}. Make one: `wavedraft convert SOURCE {model_path}`.")
    model_config = AutoConfig.from_pretrained(model_path)
    is_recurrent, has_depth = is_recurrent_config(model_config), hasattr(model_config, "mean_recurrence")
    drafting: dict[str, Any] = {"draft_loss": draft_loss, "alpha": alpha, "slot_decay": slot_decay}
    if random_depth and not has_depth:
        raise ValueError(f"`random_depth` is for models of a recurrent depth, but {model_path} has none. Leave it out.")
    if has_depth and not is_recurrent and torch_compile:
        raise ValueError("`torch_compile` compiles stock decoders, but this one has a recurrent depth. Leave it out.")
    if is_recurrent:
        of_drafts = {"pack": pack, "attn_implementation": attn_implementation, "torch_compile": torch_compile}
        of_drafts |= {"random_depth": random_depth}
        mode = check_recurrent_mode(mode, drafting | of_drafts)
    mode = mode or "gated"
    if not is_recurrent and mode not in ("gated", "joint", "full", "head"):
        raise ValueError(f"`mode` must be 'gated', 'joint', 'full' or 'head' for a TiDAR checkpoint, but is {mode!r}.")
    if from_adapter is not None and not Path(from_adapter).is_dir() and len(Path(from_adapter).parts) != 2:
        raise ValueError(
            f"There is no folder {from_adapter}. Teach an adapter first: `wavedraft train ... --mode gated`."
        )
    trains_head = mode == "head"
    head_rank = (512 if rank is None else rank) if trains_head else 0
    rank = 0 if mode in ("full", "head") else (32 if rank is None else rank)
    if trains_head and head_rank < 1:
        raise ValueError(f"`rank` must be at least 1 in head mode, but is {head_rank}.")
    if trains_head and has_depth:
        raise ValueError(f"`mode='head'` is for stock decoders that draft, but {model_path} has a recurrent depth.")
    if trains_head and torch_compile:
        raise ValueError("`torch_compile` compiles what learns, which in head mode is the head alone. Leave it out.")
    if mode == "lora" and rank < 1:
        raise ValueError(f"`rank` must be at least 1 in lora mode, but is {rank}. `mode='full'` trains every weight.")
    if mode == "gated" and rank < 1:
        raise ValueError(f"`rank` must be at least 1 in gated mode, whose base is frozen, but is {rank}.")
    if mode in ("gated", "head") and alpha != 1.0:
        raise ValueError(f"`alpha` weighs the autoregressive loss, which {mode} mode has not, but is {alpha}.")
    if mode == "full" and from_adapter is not None:
        raise ValueError(f"`from_adapter` is {from_adapter}, but full mode trains no adapter. Leave one of them out.")
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
    if eval_prompts_path and not Path(eval_prompts_path).is_file():
        raise ValueError(f"There is no file {eval_prompts_path}.")
    if pack and streaming:
        raise ValueError("`pack` puts the longest rows first, so it must know all. Leave out `pack` or `streaming`.")
    quantization = quantization_config(load_in_4bit, load_in_8bit, rank or head_rank)
    read_rows = open_rows(data, split, streaming)
    objective = None if is_recurrent else DraftObjective(mode="joint" if mode == "full" else mode, **drafting)
    if learning_rate is None:
        learning_rate = 2e-3 if trains_head else 1e-3 if rank else 1e-5
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
        accelerator_config={"dispatch_batches": False} if streaming else None,
        use_cpu=not torch.accelerator.is_available(),
        remove_unused_columns=False,
        report_to=report_to,
        seed=seed,
    )
    PartialState(cpu=arguments.use_cpu).wait_for_everyone()  # every process has seen the folder as it was
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    if attn_implementation is None and arguments.use_cpu and max_length <= 1024 and not is_recurrent:
        attn_implementation = "eager"
    model_class: Any = RecurrentDepthForCausalLM if is_recurrent else TiDARForCausalLM
    model = model_class.from_pretrained(
        model_path,
        dtype=torch.bfloat16 if bf16 and (rank or trains_head) else torch.float32,
        **({"attn_implementation": attn_implementation} if attn_implementation else {}),
        **({"quantization_config": quantization} if quantization else {}),
    )
    draft_length = 1 if is_recurrent else model.config.tidar_config["draft_length"]
    encoder = RowEncoder(tokenizer, max_length, draft_length)
    dataset: Any = RowStream(read_rows, encoder, seed)
    known_rows = list(islice(dataset.in_order(), 16 if streaming else None))
    if encoder.refused:
        logger.warning(f"{encoder.refused} rows of {data} are left out. {encoder.reason}")
    if not known_rows:
        raise ValueError(
            f"No row of {data} has more than {draft_length} tokens to learn from (the checkpoint's draft length) "
            f"within `max_length` {max_length}. {encoder.reason}"
        )
    num_rows, num_labels = len(known_rows), sum(label != IGNORED for row in known_rows for label in row["labels"])
    if not streaming:
        dataset = pack_rows(known_rows, max_length) if pack else known_rows
    eval_prompt_ids = prompt_ids(eval_prompts_path, tokenizer, num_eval_prompts) if eval_prompts_path else []
    held_out_rows = answered_rows(eval_prompts_path, tokenizer, max_length) if is_recurrent else []
    trained = model
    if trains_head:
        add_taught_head(model, from_adapter, head_rank)
    elif from_adapter is not None:
        trained = PeftModel.from_pretrained(model, str(from_adapter), is_trainable=True)
        if Path(from_adapter, HEAD_FILE).is_file():
            logger.warning(
                f"The draft head of {from_adapter} is not carried on: it is for the drafts of that adapter. Teach "
                "one for the result: `--mode head`."
            )
    elif mode == "gated":
        trained = get_peft_model(model, gated_adapter_config(model, rank))
    elif rank:
        targets = LORA_CORE_AND_ADAPTER if is_recurrent else "all-linear"
        config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=2 * rank, target_modules=targets)
        trained = get_peft_model(model, config)

    manifest = {
        "model": fingerprint(trained),
        "data": data_fingerprint(known_rows if streaming else dataset),
        **(asdict(objective) if objective else {"mode": mode}),
        "random_depth": random_depth,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "learning_rate": learning_rate,
        "bf16": bf16,
        "seed": seed,
    }
    trainer_class: Any = RecurrentTrainer if is_recurrent else TiDARTrainer
    trainer = trainer_class(
        model=trained,
        args=arguments,
        train_dataset=dataset,
        data_collator=PaddingCollator(tokenizer.pad_token_id or 0),
        eval_prompt_ids=eval_prompt_ids,
        **(
            {"held_out_rows": held_out_rows} if is_recurrent else {"objective": objective, "random_depth": random_depth}
        ),
    )
    safe_stop = SafeStop(trainer.accelerator)
    trainer.add_callback(safe_stop)
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=patience))
    if torch_compile:
        model.base_model.compile(dynamic=True)  # the decoder alone: what is around it changes from step to step
    if resume:
        check_manifest(output_dir, manifest)
    elif trainer.is_world_process_zero():
        write_manifest(output_dir, manifest)
    measure = partial(measure_recurrent, held_out_rows=held_out_rows) if is_recurrent else measure_drafting
    before = measure(model, eval_prompt_ids) if eval_prompt_ids else None
    if trains_head and before is not None and before.tokens_per_forward < LEAST_FOR_A_HEAD:
        logger.warning(
            f"{model_path} drafts {before.tokens_per_forward:.2f} tokens per forward: a head mends what masks predict "
            "and cannot replace it. Teach the masks first (`--mode gated`), then a head behind them (`--from-adapter`)."
        )
    trainer.train(resume_from_checkpoint=str(last_checkpoint) if resume else None)
    if safe_stop.stopped_by is not None:
        raise TrainingStopped(trainer.state.global_step, output_dir, safe_stop.stopped_by)
    after = measure(model, eval_prompt_ids, compare_with_plain=True) if eval_prompt_ids else None

    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        if (rank or trains_head) and bf16 and not quantization:
            trained.to(torch.bfloat16)
        trained.save_pretrained(output_dir, **({"state_dict": weights} if weights else {}))
        tokenizer.save_pretrained(output_dir)
    report = {
        "mode": mode,
        **({} if is_recurrent else {"draft_loss": draft_loss, "slot_decay": slot_decay, "draft_length": draft_length}),
        "from_adapter": from_adapter and str(from_adapter),
        "rank": rank or head_rank,
        "rows": None if streaming else num_rows,
        "sequences": None if streaming else len(dataset),
        "loops": encoder.loops if encoder.loops["kept"] else None,
        "assistant_words": encoder.assistant_words,
        "labels": None if streaming else num_labels,
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
            write_adapter_code(output_dir, model.tidar_config, has_code=not has_depth)
        if not is_recurrent and (not rank or (mode == "gated" and not has_depth)):
            kind = card_kind_of(output_dir, model.card_kind)
            write_card(output_dir, kind, output_dir.name, origin=Path(model_path), figures=report)
        (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def add_taught_head(model: Any, adapter: str | Path | None, rank: int) -> None:
    """Loads the adapter whose drafts a head is for, and leaves nothing but the head to be trained, in float32."""
    if adapter is not None:
        model.load_adapter(str(adapter))
    model.requires_grad_(False)
    head = draft_head_of(model) or new_draft_head(model, rank)
    head.float().requires_grad_(True)


def quantization_config(load_in_4bit: bool, load_in_8bit: bool, rank: int) -> BitsAndBytesConfig | None:
    """How bitsandbytes is to hold the base.

    Raises:
        ValueError: both, no adapter to train on it, or no bitsandbytes.
    """
    if not (load_in_4bit or load_in_8bit):
        return None
    if load_in_4bit and load_in_8bit:
        raise ValueError("`load_in_4bit` and `load_in_8bit` exclude each other. Choose one.")
    name = "load_in_4bit" if load_in_4bit else "load_in_8bit"
    if rank < 1:
        raise ValueError(
            f"`{name}` holds weights that cannot be trained. Train an adapter: give a `rank` above 0, not {rank}."
        )
    if not is_bitsandbytes_available():
        raise ValueError(f"`{name}` needs bitsandbytes: pip install bitsandbytes. Or train without `{name}`.")
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def prompt_ids(path: str | Path, tokenizer: Any, num_prompts: int) -> list[torch.Tensor]:
    """The ids of `num_prompts` prompts of a JSONL file, taken evenly through it."""
    rows = list(read_jsonl(path))
    chosen = rows[:: max(1, len(rows) // num_prompts)][:num_prompts]
    return [
        chat_prompt_ids(row["prompt"], tokenizer)
        if "prompt" in row
        else torch.tensor(tokenizer(row["text"])["input_ids"][:NUM_TOKENS_OF_TEXT])
        for row in chosen
    ]


def answered_rows(path: str | Path | None, tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """The encoded rows of a JSONL file that have more than a prompt."""
    rows = [] if path is None else [row for row in read_jsonl(path) if row.keys() & {"answer", "text", "messages"}]
    return [encode_row(row, tokenizer, max_length) for row in rows]


def check_recurrent_mode(mode: str | None, of_drafts: dict[str, Any]) -> str:
    """The mode of a recurrent-depth model's run.

    Raises:
        ValueError: another one, or an option that only drafts have.
    """
    if mode not in (None, "lora", "full"):
        raise ValueError(f"`mode` must be 'lora' or 'full' for a recurrent-depth model, but is {mode!r}.")
    defaults = inspect.signature(finetune).parameters
    if given := [name for name, value in of_drafts.items() if value != defaults[name].default]:
        raise ValueError(f"`{given[0]}` is for TiDAR checkpoints, but this is a recurrent-depth model. Leave it out.")
    return mode or "lora"


def chat_prompt_ids(prompt: str, tokenizer: Any) -> torch.Tensor:
    """A user's words in the model's chat form if it has one, ready for its answer, [P]."""
    if tokenizer.chat_template is None:
        return torch.tensor(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
